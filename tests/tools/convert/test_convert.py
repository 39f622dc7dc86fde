"""Conversion between the hosts: every tensor there and back, and the same logits on both."""

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from llava_patch import DeepStack, Routing, SkipLinks, get_handle, patch
from llava_patch.cli.main import app
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.settings.methods import to_dict
from llava_patch.tools.convert.command import convert
from tests.support.checkpoints import config, edited, load, logits, same_bits, tensors, trained
from tests.support.models import close

PATCH = {"fusion": SkipLinks(stride=2), "routing": Routing(split=2)}


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    """The stock checkpoints converted once: llava -> hf -> llava, and hf -> llava."""
    root = tmp_path_factory.mktemp("made")
    convert(files.llava, root / "hf", "hf")
    convert(root / "hf", root / "back", "llava")
    convert(files.hf, root / "llava", "llava")
    return root


@pytest.fixture(scope="module")
def patched(files, tmp_path_factory):
    """A patched llava model, saved in both forms, and its logits."""
    model = load(files.llava)
    handle = patch(model, **PATCH)
    trained(handle.anatomy.projector)
    trained(handle.anatomy.decoder.side_branch)
    root = tmp_path_factory.mktemp("patched")
    handle.save(root / "full", form="full")
    handle.save(root / "adapter")
    return root, logits(model)


def test_llava_to_hf_and_back_keeps_every_bit(files, made):
    same_bits(tensors(files.llava), tensors(made / "back"))
    same_bits(tensors(files.tower), tensors(made / "back" / "vision_tower"))
    before, after = config(files.llava), config(made / "back")
    derived = ("mm_vision_tower", "transformers_version")
    assert {k: after.get(k) for k in before if k not in derived} == {
        k: v for k, v in before.items() if k not in derived
    }
    assert after["mm_vision_tower"] == str(made / "back" / "vision_tower")


def test_hf_to_llava_and_back_keeps_every_bit(files, made, tmp_path):
    convert(made / "llava", tmp_path / "hf", "hf")
    same_bits(tensors(files.hf), tensors(tmp_path / "hf"))
    before, after = config(files.hf), config(tmp_path / "hf")
    assert all(after[k] == before[k] for k in ("image_token_index", "pad_token_id", "vision_feature_layer"))
    assert after["text_config"]["vocab_size"] == before["text_config"]["vocab_size"] == 576


def test_both_hosts_give_the_same_logits(files, made):
    # The embedding's length changes the shape of the last product, and with it the order of sums.
    assert close(logits(load(made / "hf")), logits(load(files.llava)))
    assert close(logits(load(made / "llava")), logits(load(files.hf)))
    assert torch.equal(logits(load(made / "back")), logits(load(files.llava)))


def test_mistral(made, tmp_path):
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

    values = {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"], "sliding_window": 8}
    source = edited(made / "back", tmp_path / "mistral", config_values=values)
    convert(source, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "llava")
    same_bits(tensors(source), tensors(tmp_path / "again"))
    assert config(tmp_path / "again")["sliding_window"] == 8
    expected = []
    for folder in (source, tmp_path / "again"):
        model = LlavaMistralForCausalLM.from_pretrained(folder)
        model.get_vision_tower().load_model()
        expected.append(logits(model.float().eval()))
    assert torch.equal(*expected)
    assert not close(expected[0], logits(load(made / "back")))  # the window counts
    assert close(logits(load(tmp_path / "hf")), expected[0])
    template = (tmp_path / "hf" / "chat_template.jinja").read_text()
    assert "[INST]" in template


def test_llavas_own_loader_takes_it(made):
    from llava.model.builder import load_pretrained_model

    loaded = load_pretrained_model(str(made / "llava"), None, "llava-small", device_map="cpu", device="cpu")
    tokenizer, model, images, _ = loaded
    assert len(tokenizer) == 512 == model.get_input_embeddings().weight.shape[0]
    assert images.crop_size == {"height": 56, "width": 56}


def test_tokenizer_and_processor(files, made):
    import numpy as np
    from llava.mm_utils import process_images
    from PIL import Image
    from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor

    text = "What is the number in the image? 417"
    ids = {
        name: AutoTokenizer.from_pretrained(folder, use_fast=False)(text).input_ids
        for name, folder in (("before", files.llava), ("hf", made / "hf"), ("back", made / "back"))
    }
    assert ids["before"] == ids["hf"] == ids["back"]
    lengths = [len(AutoTokenizer.from_pretrained(made / "back", use_fast=fast)) for fast in (True, False)]
    assert lengths == [512, 512]  # llava's loader grows the embedding to it
    processor = AutoProcessor.from_pretrained(made / "hf", use_fast=False)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat is it? ASSISTANT:"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8))
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    assert (inputs.input_ids == 512).sum() == 16
    settings = type("Settings", (), {"image_aspect_ratio": "pad"})
    theirs = process_images([image], CLIPImageProcessor.from_pretrained(files.tower), settings)
    assert torch.allclose(inputs.pixel_values, theirs, atol=1e-6)


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_a_patched_checkpoint_keeps_its_patch(patched, form, tmp_path):
    root, expected = patched
    convert(root / form, tmp_path / "hf", "hf")
    model = load(tmp_path / "hf")
    handle = get_handle(model)
    assert (handle.fusion, handle.routing) == (PATCH["fusion"], PATCH["routing"])
    assert close(logits(model), expected)
    convert(tmp_path / "hf", tmp_path / "back", "llava")
    again = load(tmp_path / "back")
    assert get_handle(again).settings() == handle.settings()
    assert torch.equal(logits(again), expected)
    if form == "full":
        held = {k: v for k, v in tensors(root / "full").items() if "vision_tower" not in k}
        same_bits(held, tensors(tmp_path / "back"))


def test_a_trained_tower_is_converted(files, tmp_path):
    model = load(files.llava)
    handle = patch(model, fusion=SkipLinks(stride=2, train_tower=2))
    trained(handle.anatomy.vision_parts().blocks[-2])
    expected = logits(model)
    handle.save(tmp_path / "full", form="full")
    handle.save(tmp_path / "adapter")
    for form in ("full", "adapter"):
        convert(tmp_path / form, tmp_path / f"hf-{form}", "hf")
        assert close(logits(load(tmp_path / f"hf-{form}")), expected)
    convert(tmp_path / "hf-full", tmp_path / "back", "llava")
    assert torch.equal(logits(load(tmp_path / "back")), expected)
    # a later run that freezes the tower does not make it the original one
    patch(model, fusion=SkipLinks(stride=2))
    assert handle.fusion.train_tower == "frozen"
    handle.save(tmp_path / "frozen", form="full")
    convert(tmp_path / "frozen", tmp_path / "hf-frozen", "hf")
    assert close(logits(load(tmp_path / "hf-frozen")), expected)
    assert config(tmp_path / "hf-frozen")["llava_patch"]["trained_tower"] is True


@pytest.mark.parametrize("used", [False, True])
def test_the_tower_that_llavas_loader_takes(used, made, tmp_path):
    """A stock loader takes the tower from its own folder, unless `unfreeze_mm_vision_tower` is set."""
    folder = tensors(made / "back" / "vision_tower")

    def add_tower(held):
        held.update({f"model.vision_tower.vision_tower.{k}": 2 * v for k, v in folder.items()})

    flag = {"unfreeze_mm_vision_tower": used}
    source = edited(made / "back", tmp_path / "in", config_values=flag, change=add_tower)
    convert(source, tmp_path / "hf", "hf")
    name = "vision_model.post_layernorm.weight"
    assert torch.equal(tensors(tmp_path / "hf")[f"vision_tower.{name}"], (2 if used else 1) * folder[name])
    convert(tmp_path / "hf", tmp_path / "back", "llava")
    assert (f"model.vision_tower.vision_tower.{name}" in tensors(tmp_path / "back")) == used


def test_deepstacks_projector_is_converted(made, tmp_path):
    def add_stack(held):
        for i, kind in ((1, "weight"), (1, "bias"), (2, "weight"), (2, "bias")):
            held[f"multi_modal_projector_stack.linear_{i}.{kind}"] = (
                held[f"multi_modal_projector.linear_{i}.{kind}"] * 2
            )

    source = edited(
        made / "hf", tmp_path / "hf", settings={"fusion": to_dict(DeepStack(start=0, interval=1))}, change=add_stack
    )
    convert(source, tmp_path / "llava", "llava")
    held = tensors(tmp_path / "llava")
    assert torch.equal(held["model.mm_projector_stack.2.weight"], held["model.mm_projector.2.weight"] * 2)
    assert config(tmp_path / "llava")["llava_patch"]["fusion"]["start"] == 0
    convert(tmp_path / "llava", tmp_path / "again", "hf")
    same_bits(tensors(source), tensors(tmp_path / "again"))


def test_a_shared_projector_has_no_second_one_to_convert(made, tmp_path):
    record = {"fusion": to_dict(DeepStack(start=0, interval=1, projector="shared"))}
    source = edited(made / "hf", tmp_path / "hf", settings=record)
    convert(source, tmp_path / "llava", "llava")
    assert config(tmp_path / "llava")["llava_patch"]["fusion"]["projector"] == "shared"
    convert(tmp_path / "llava", tmp_path / "again", "hf")
    same_bits(tensors(source), tensors(tmp_path / "again"))

    def add_stack(held):
        held["multi_modal_projector_stack.linear_1.weight"] = held["multi_modal_projector.linear_1.weight"] * 1

    odd = edited(made / "hf", tmp_path / "odd", settings=record, change=add_stack)
    with pytest.raises(CheckpointError, match=r"stack\..*has no place"):
        convert(odd, tmp_path / "x", "llava")


def test_shards(files, made, tmp_path):
    convert(files.llava, tmp_path / "hf", "hf", shard_bytes=100_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    same_bits(tensors(made / "hf"), tensors(tmp_path / "hf"))
    load(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", "llava")
    same_bits(tensors(made / "back"), tensors(tmp_path / "back"))


def test_a_named_tower(files, made, tmp_path):
    convert(made / "hf", tmp_path / "llava", "llava", vision_tower=str(files.tower))
    assert config(tmp_path / "llava")["mm_vision_tower"] == str(files.tower)
    assert not (tmp_path / "llava" / "vision_tower").exists()

    def other(held):
        held["vision_tower.vision_model.pre_layrnorm.weight"] += 1

    changed = edited(made / "hf", tmp_path / "other", change=other)
    with pytest.raises(CheckpointError, match=r"vision-tower .*pre_layrnorm\.weight differs"):
        convert(changed, tmp_path / "x", "llava", vision_tower=str(files.tower))
    moved = edited(made / "back", tmp_path / "moved", config_values={"mm_vision_tower": "/no/such/tower"})
    with pytest.raises(CheckpointError, match="no/such/tower"):
        convert(moved, tmp_path / "x", "hf")
    convert(moved, tmp_path / "found", "hf", vision_tower=str(files.tower))
    same_bits(tensors(made / "hf"), tensors(tmp_path / "found"))
    assert not (tmp_path / "x").exists()


def _without(name):
    return lambda held: held.pop(name)


def _with(name, shape=(2, 2)):
    return lambda held: held.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        ({}, _with("language_model.model.layers.0.mlp.extra.weight"), r"mlp\.extra\.weight has no place"),
        ({}, _with("qformer.weight"), r"qformer\.weight is not one"),
        ({}, _with("multi_modal_projector_stack.linear_1.weight"), r"stack\.0\.weight has no place"),
        ({}, _with("multi_modal_projector.linear_2.bias", (3, 3)), r"projector\.1\.bias has shape"),
        ({}, _with("multi_modal_projector.linear_1.weight", (64, 64)), r"projector\.0\.weight has shape"),
        ({}, _without("language_model.model.norm.weight"), r"norm\.weight is missing"),
        ({}, _without("multi_modal_projector.linear_2.bias"), r"projector\.1\.bias is missing"),
        ({}, _without("vision_tower.vision_model.post_layernorm.bias"), r"post_layernorm\.bias is missing"),
        ({}, _with("language_model.model.norm.weight", (3,)), r"norm\.weight has shape \(3,\)"),
        ({"projector_hidden_act": "relu"}, None, "projector_hidden_act = 'relu'"),
        ({"model_type": "qwen2_vl"}, None, "model_type = 'qwen2_vl'"),
        ({"llava_patch": {"format": 99}}, None, "format 99"),
    ],
)
def test_what_cannot_be_mapped_is_named(made, tmp_path, values, change, message):
    source = edited(made / "hf", tmp_path / "in", config_values=values, change=change)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", "llava")
    assert sorted(os.listdir(tmp_path)) == ["in"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}, "image_newline is missing"),
        ({"image_aspect_ratio": "anyres"}, "not anyres"),
        ({"mm_projector_type": "mlp3x_gelu"}, r"projector\.2\.bias is missing"),
        ({"s2": True}, "S2"),
    ],
)
def test_what_hf_has_no_counterpart_for(made, tmp_path, values, message):
    source = edited(made / "back", tmp_path / "in", config_values=values)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", "hf")


def test_folders_are_never_written_over(made, tmp_path):
    with pytest.raises(CheckpointError, match="is the input itself"):
        convert(made / "hf", made / "hf", "llava")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert(made / "hf", tmp_path / "full", "llava")
    with pytest.raises(CheckpointError, match="of hf already"):
        convert(made / "hf", tmp_path / "out", "hf")
    with pytest.raises(SettingError, match="--to vllm"):
        convert(made / "hf", tmp_path / "out", "vllm")
    with pytest.raises(CheckpointError, match="no such folder"):
        convert(tmp_path / "none", tmp_path / "out", "hf")


def test_a_run_that_fails_midway_leaves_nothing(made, tmp_path, monkeypatch):
    from llava_patch.tools.convert import companions

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(companions, "write_llava", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(made / "hf", tmp_path / "out", "llava")
    assert os.listdir(tmp_path) == []


def test_an_adapter_on_another_base_is_refused(patched, made, tmp_path):
    import shutil

    root, _ = patched
    adapter = tmp_path / "adapter"
    shutil.copytree(root / "adapter", adapter)

    def other(held):
        held["model.layers.1.mlp.up_proj.weight"] *= 2

    base = edited(made / "back", tmp_path / "base", change=other)
    record = json.loads((adapter / "llava_patch.json").read_text())
    (adapter / "llava_patch.json").write_text(json.dumps({**record, "base": str(base)}))
    with pytest.raises(CheckpointError, match=r"another base model: .*layers\.1\.mlp\.up_proj"):
        convert(adapter, tmp_path / "out", "hf")


def test_the_command(files, tmp_path):
    done = CliRunner().invoke(app, ["convert", str(files.hf), "--output", str(tmp_path / "out"), "--to", "llava"])
    assert done.exit_code == 0, done.output
    assert config(tmp_path / "out")["model_type"] == "llava_llama"
