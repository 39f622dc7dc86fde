"""llava's vision tower where it is not CLIP: its interface, its files, and LLaVA's own scripts on it."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from llava_patch import SkipLinks, patch
from llava_patch.core.errors import CheckpointError, HostError
from llava_patch.hosts.towers import classes as tower_classes
from llava_patch.hosts.towers import llava as llava_tower
from llava_patch.hosts.towers import models as tower_models
from llava_patch.integrations.training.stage1 import tower_width
from llava_patch.probe.transform import Transform
from tests.support import models, tiny_train, zoo

OTHERS = tuple(n for n in zoo.NAMES if n != "clip")


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    zoo.install_timm_stand_in(monkeypatch)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


class Args:
    mm_vision_select_layer, mm_vision_select_feature = -2, "patch"

    def __init__(self, path, **extra):
        self.mm_vision_tower = self.vision_tower = str(path)
        vars(self).update(extra)


def build(path, delay_load=False, **extra):
    from llava.model import llava_arch

    return llava_arch.build_vision_tower(Args(path, **extra), delay_load=delay_load)


def picture(width=100, height=70):
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_clip_is_left_to_llava(folders):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    assert type(build(zoo.folder(folders, "clip"))) is CLIPVisionTower
    with pytest.raises(ValueError, match="Unknown vision tower: nobody/knows-it"):  # llava's own answer
        build("nobody/knows-it")


@pytest.mark.parametrize("name", OTHERS)
def test_it_has_the_whole_interface_of_llavas_tower(folders, name):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    clip, tower = build(zoo.folder(folders, "clip")), build(zoo.folder(folders, name))
    missing = {n for n in (*dir(CLIPVisionTower), *vars(clip)) if not n.startswith("__") and not hasattr(tower, n)}
    assert not missing
    assert hasattr(type(tower).forward, "__wrapped__")
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (32, 16, 4)
    assert (tower.dtype, tower.device, tower.dummy_feature.shape) == (torch.float32, torch.device("cpu"), (1, 32))
    assert (tower.config.image_size, tower.config.patch_size, tower.config.num_hidden_layers) == (56, 14, 8)
    assert tower.is_loaded and not any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("name", OTHERS)
def test_features(folders, name):
    tower = build(zoo.folder(folders, name))
    stock = zoo.ours(name)  # the same weights, made in memory
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        states = stock(pixels, output_hidden_states=True).hidden_states
    features = tower(pixels)
    assert features.shape == (2, 16, 32) and not features.requires_grad
    assert torch.equal(features, states[7][:, zoo.PREFIX[name] :])
    listed = tower([pixels[0], pixels[1]])
    assert [f.shape for f in listed] == [(1, 16, 32)] * 2
    assert torch.allclose(torch.cat(listed), features, atol=1e-5)
    assert tower(pixels.bfloat16()).dtype == torch.bfloat16  # the images' own, as CLIPVisionTower gives it
    tower.select_feature = "cls_patch"
    assert torch.equal(tower(pixels), states[7])
    tower.select_feature = "else"
    with pytest.raises(ValueError, match="Unexpected select feature"):
        tower(pixels)


def test_weights_are_loaded_late_unless_they_train(folders, capsys):
    path = zoo.folder(folders, "siglip")
    tower = build(path, delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters())
    assert (tower.hidden_size, tower.num_patches) == (32, 16)
    tower.load_model()
    weights = list(tower.parameters())
    tower.load_model()
    assert "already loaded" in capsys.readouterr().out and weights[0] is next(tower.parameters())
    assert build(path, delay_load=True, unfreeze_mm_vision_tower=True).is_loaded


@pytest.mark.parametrize("mode", ["resize", "crop", "pad"])
@pytest.mark.parametrize("name", OTHERS)
def test_r_probe_follows_a_box_through_the_processor(folders, name, mode):
    processor = build(zoo.folder(folders, name)).image_processor
    transform = Transform(processor, mode, 56, 56)
    assert transform.pixel_values([picture(80, 40)]).shape == (1, 3, 56, 56)
    stretched = (14.0, 14.0, 42.0, 42.0)
    middle = {"resize": stretched, "pad": (14.0, 21.0, 42.0, 35.0)}
    if mode == "crop" and name != "aimv2":
        middle["crop"] = stretched  # SigLIP's way is to stretch
    assert transform.box((20, 10, 60, 30), (80, 40), "b") == middle.get(mode, (0.0, 14.0, 56.0, 42.0))


@pytest.mark.parametrize("name", OTHERS)
def test_every_use_that_llava_makes_of_its_image_processor(folders, name):
    from llava.mm_utils import process_images

    processor = build(zoo.folder(folders, name)).image_processor
    assert "torchvision" not in sys.modules
    assert processor.crop_size == {"height": 56, "width": 56} and len(processor.image_mean) == 3
    for ratio in ("pad", None):
        made = process_images([picture(), picture(60, 90)], processor, type("C", (), {"image_aspect_ratio": ratio}))
        assert made.shape == (2, 3, 56, 56)
    config = type("C", (), {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[112, 56]]})
    assert process_images([picture()], processor, config).shape == (1, 3, 3, 56, 56)


def test_images_look_as_the_towers_own_processor_makes_them(folders):
    from transformers import SiglipImageProcessor

    square = picture(56, 56)
    ours = build(zoo.folder(folders, "siglip2")).image_processor
    stock = zoo_processor("Siglip2ImageProcessor", folders)(square, return_tensors="pt")
    pixels = ours(square, return_tensors="pt")["pixel_values"]
    assert torch.equal(tower_classes.patchify(pixels, 14), stock["pixel_values"].float())
    wide = picture()
    for name, kind in (("siglip", "SiglipImageProcessor"), ("internvl", "GotOcr2ImageProcessor")):
        ours = build(zoo.folder(folders, name)).image_processor(wide, return_tensors="pt")["pixel_values"]
        stock = zoo_processor(kind, folders, name)(wide, return_tensors="pt")["pixel_values"]
        assert torch.allclose(ours, torch.as_tensor(stock).float(), atol=1e-6)
    colours = build(zoo.folder(folders, "timm")).image_processor
    assert isinstance(colours, SiglipImageProcessor) and list(colours.image_mean) == [0.4, 0.5, 0.6]
    assert colours.resample == Image.Resampling.BICUBIC


def zoo_processor(kind, folders, name="siglip2"):
    import transformers

    return getattr(transformers, kind).from_pretrained(zoo.folder(folders, name))


def test_the_vision_part_of_a_larger_model(folders, tmp_path):
    from transformers import Aimv2Config, Aimv2Model, SiglipConfig, SiglipImageProcessor, SiglipModel

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "projection_size": 32}
    for name, config, model in (("siglip", SiglipConfig, SiglipModel), ("aimv2", Aimv2Config, Aimv2Model)):
        whole = model(config(text_config=text, vision_config=zoo.config(name).to_dict()))
        whole.save_pretrained(tmp_path / name)
        SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path / name)
        tower = build(tmp_path / name)
        mine = tower.vision_tower.state_dict()
        theirs = {k.removeprefix("vision_model."): v for k, v in whole.vision_model.state_dict().items()}
        assert all(torch.equal(v, theirs[k.removeprefix("vision_model.")]) for k, v in mine.items())


def test_the_vision_part_of_a_larger_language_model(tmp_path):
    import transformers as t

    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 96}
    vision = zoo.config("internvl").to_dict()
    internvl = t.InternVLConfig(vision_config=vision, text_config=t.Qwen2Config(**text).to_dict())
    perception = t.PerceptionLMConfig(vision_config=zoo.config("timm"), text_config=t.LlamaConfig(**text).to_dict())
    for whole in (
        t.InternVLForConditionalGeneration(internvl),
        t.PerceptionLMForConditionalGeneration(perception),
        zoo.hf_model("siglip"),
    ):
        folder = tmp_path / type(whole).__name__
        whole.save_pretrained(folder)
        made = tower_models.load_model(str(folder), tower_models.read_config(str(folder))).state_dict()
        theirs = whole.model.vision_tower.state_dict()
        assert made.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in made.items())


def edit(source, target, **changes):
    """A copy of a tower's folder with another config.json."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_refused(folders, tmp_path):
    siglip = zoo.folder(folders, "siglip")
    with pytest.raises(CheckpointError, match=r"holds no .* tensors are missing"):
        build(edit(siglip, tmp_path / "deeper", num_hidden_layers=9))
    with pytest.raises(HostError, match="is of type vit, which is not known"):
        build(edit(siglip, tmp_path / "vit", model_type="vit"))
    with pytest.raises(HostError, match="its configuration cannot be read"):
        build(edit(siglip, tmp_path / "remote", model_type="intern_vit_6b"))
    with pytest.raises(HostError, match="--s2"):
        build(siglip, s2=True)
    with pytest.raises(HostError, match="grid of 4 x 8"):
        build(edit(zoo.folder(folders, "internvl"), tmp_path / "wide", image_size=[56, 112]))
    bare = edit(siglip, tmp_path / "bare")
    (bare / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "DonutImageProcessor"}))
    with pytest.raises(HostError, match="DonutImageProcessor: known are"):
        build(bare)
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(HostError, match=r"has no preprocessor_config.json"):
        build(bare)
    small = edit(zoo.folder(folders, "aimv2"), tmp_path / "small")
    values = json.loads((small / "preprocessor_config.json").read_text())
    values["crop_size"] = {"height": 28, "width": 28}
    (small / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(HostError, match=r"gives \(28, 28\) pixels, its vision tower takes \(56, 56\)"):
        build(small)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_tower_width_before_the_tower_is_built(folders, name):
    decoder = type("D", (), {"get_vision_tower": lambda self: None})()
    assert tower_width(decoder, Args(zoo.folder(folders, name))) == 32


@pytest.mark.parametrize("name", ["internvl", "siglip"])
def test_anyres_tiles(folders, name):
    """llava computes tiles with the tower's own sizes (lists on InternVL's configuration)."""
    model = zoo.llava_model(zoo.folder(folders, name))
    model.config.mm_patch_merge_type, model.config.image_aspect_ratio = "spatial", "anyres"
    model.config.image_grid_pinpoints = [[112, 56]]
    ids = torch.tensor([[5, -200, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids, images=[torch.randn(3, 3, 56, 56)], image_sizes=[(112, 56)]).logits
    assert logits.shape[1] == 2 + 3 * 16


@pytest.mark.parametrize("name", ["siglip", "siglip2", "internvl", "aimv2"])
def test_gradient_checkpointing_changes_no_gradient(folders, name):
    """Hidden states are kept from inside checkpointed blocks, which run without gradients and once more in backward.

    In float64, and not bit for bit: gradients from a tap and from the next block are added in another order then, and
    AIMv2's norms compute in float32.
    """
    pixels, found = torch.randn(1, 3, 56, 56, dtype=torch.float64), []
    model = zoo.llava_model(zoo.folder(folders, name)).double()
    vision = model.get_vision_tower().vision_tower.train()
    with patch(model, fusion=SkipLinks(layers=(2, 5), detach=1, train_tower="all")) as handle:
        handle.anatomy.first_linear()[2].weight.data.normal_(std=0.1)
        for checkpointing in (False, True):
            if checkpointing:
                vision.gradient_checkpointing_enable({"use_reentrant": True})
            model.zero_grad()
            model.encode_images(pixels.requires_grad_()).square().mean().backward()
            found.append({n: p.grad.clone() for n, p in vision.named_parameters() if p.grad is not None})
    assert vision.is_gradient_checkpointing and found[0].keys() == found[1].keys() and len(found[0]) > 50
    for parameter, gradient in found[0].items():
        assert (gradient - found[1][parameter]).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, parameter


def test_a_trained_tower_comes_back(folders, tmp_path):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = zoo.llava_model(zoo.folder(folders, "internvl"))
    handle = patch(model, fusion=SkipLinks(stride=2, train_tower="all"))
    zoo.blocks_of(handle.anatomy.vision_model)[0].mlp.fc1.weight.data.add_(1.0)
    handle.save(tmp_path / "full", form="full")
    loaded = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "full")
    loaded.get_vision_tower().load_model()
    there = loaded.get_vision_tower().state_dict()
    assert all(torch.equal(there[k], v) for k, v in model.get_vision_tower().state_dict().items())


def test_a_clip_tower_needs_no_other_class(folders):
    """timm imports torchvision, which may be broken: nothing of the kind is imported for CLIP."""
    code = (
        "import sys; from llava_patch.hosts.towers.models import read_config; "
        f"print(read_config({str(zoo.folder(folders, 'clip'))!r}), "
        "[m for m in sys.modules if 'timm' in m.split('.')[0] or 'modeling_internvl' in m or 'modeling_timm' in m])"
    )
    assert tiny_train.ok(tiny_train.run(["-c", code])).strip().splitlines()[-1] == "None []"


def test_both_stages_and_loading_with_siglip(tmp_path, folders):
    """LLaVA's unmodified train.py on a SigLIP tower with Detached Skip-Links, and its builder on what came out.

    Stage 2 trains the tower and reads every conversation, those without an image too (crop_size).
    """
    from llava.model.builder import load_pretrained_model

    root, files = tiny_train.make_data(tmp_path / "data")
    gin = tmp_path / "skip.gin"
    gin.write_text("Patch.fusion = @SkipLinks()\nSkipLinks.stride = 3\n")
    out = tmp_path / "llava-siglip"
    tower = zoo.folder(folders, "siglip")
    arguments = tiny_train.arguments((root, files), 1, out, steps=2, vision_tower=tower)
    text = tiny_train.ok(tiny_train.run([tiny_train.TRAIN, *arguments, "--gin_file", gin]))
    assert "SkipLinks" in text and len(tiny_train.losses(out)) == 2
    weights = torch.load(out / "mm_projector.bin", weights_only=True)
    assert weights["model.mm_projector.0.weight"].shape[1] == 3 * 32
    _, model, processor, _ = load_pretrained_model(
        str(out), str(files.language_model), "llava-siglip", device_map="cpu", device="cpu"
    )
    assert isinstance(model.get_vision_tower(), llava_tower.VisionTower)
    pixels = processor.preprocess(picture(), return_tensors="pt")["pixel_values"].half()
    with torch.no_grad():
        assert model.encode_images(pixels).shape == (1, 16, 64)
    assert torch.equal(model.get_model().mm_projector[0].weight, weights["model.mm_projector.0.weight"].half())
    tensors = tower_models.load_model(str(tower), tower_models.read_config(str(tower))).state_dict()
    loaded = model.get_vision_tower().vision_tower.state_dict()
    assert all(torch.equal(loaded[k], v.half()) for k, v in tensors.items())
    with torch.no_grad():
        host = models.Host("llava", model.float())
        assert torch.isfinite(host.logits(host.batch([(2, models.IMAGE, 3)]))).all()
    gin.write_text(gin.read_text() + 'SkipLinks.train_tower = "all"\n')
    arguments = tiny_train.arguments(
        (root, files), 2, tmp_path / "llava-two", steps=2, vision_tower=tower, per_device_train_batch_size=32,
        pretrain_mm_mlp_adapter=out / "mm_projector.bin",
    )  # fmt: skip
    tiny_train.ok(tiny_train.run([tiny_train.TRAIN, *arguments, "--gin_file", gin]))
    model = load_pretrained_model(str(tmp_path / "llava-two"), None, "llava-two", device_map="cpu", device="cpu")[1]
    after = model.get_vision_tower().vision_tower.state_dict()
    moved = {k for k, v in tensors.items() if not torch.equal(after[k], v.half())}
    assert any("layers.6" in k for k in moved) and not any("layers.7" in k or "head" in k for k in moved)
