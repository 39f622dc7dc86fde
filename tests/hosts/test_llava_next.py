"""LLaVA-NeXT's package: where LLAVA_PATCH_LLAVA_TREE names its checkout, else a stand-in for its Qwen."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from llava_patch import DeepStack, DenseConnector, DirectFusion, SkipLinks, get_handle, patch
from llava_patch.core.errors import HostError
from llava_patch.hosts import anatomy
from llava_patch.routing.reference import final_states
from tests.support import decoders, llava_tree
from tests.support.fusions import randomise
from tests.support.models import close
from tests.support.routings import ALL, again

REAL = llava_tree.is_next()
ours_only = pytest.mark.skipif(not REAL, reason="LLAVA_PATCH_LLAVA_TREE names no checkout of LLaVA-NeXT")
GRID = [[56, 112], [112, 56], [112, 112]]
SETTINGS = {
    "flat": {},
    "one-token": {"mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "one_token"},
    "grid": {"mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "grid", "mm_spatial_pool_mode": "average"},
    "frame": {"mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "frame", "mm_spatial_pool_mode": "max"},
    "anyres": {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"},
    "anyres-max": {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_1"},
    "maxpool": {"mm_patch_merge_type": "spatial_maxpool2x2", "image_aspect_ratio": "anyres"},
}
"""How images are laid out; without the package, what the stand-in has of it."""
LAYOUTS = list(SETTINGS) if REAL else ["flat"]


@pytest.fixture
def host(tower_folder):
    made = decoders.build("llava", "qwen2", tower_folder)
    made.model.config.mm_spatial_pool_mode, made.model.config.image_grid_pinpoints = "bilinear", GRID
    made.model.model.image_newline = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(2)))
    return made


def _inputs(host, layout):
    """A video, an image in tiles (alone, or several times, where there are tiles), a text: left-padded."""
    vars(host.model.config).update(SETTINGS[layout], tokenizer_padding_side="left")
    generator = torch.Generator().manual_seed(4)
    tiles = 5 if "anyres" in str(SETTINGS[layout].get("image_aspect_ratio")) else 1
    images = [torch.randn(n, 3, 56, 56, generator=generator) for n in (3, tiles, tiles, 1)]
    rows = [[3, 4, -200, 5, 6, 7, 8], [0, 8, -200, 9, -200, 10, 11], [0, 0, 0, 12, 13, 14, 15]]
    ids = torch.tensor(rows)
    return {
        "input_ids": ids, "attention_mask": ids != 0, "images": images, "modalities": ["video", *["image"] * 3],
        "image_sizes": [(56, 56), (112, 100), (100, 112), (56, 56)],
    }  # fmt: skip


def _prepared(host, inputs):
    """What the stock host makes: embeddings, validity and image positions, each [batch, tokens]."""
    prepare = host.model.prepare_inputs_labels_for_multimodal
    ids = inputs["input_ids"]
    labels = torch.arange(ids.numel()).view_as(ids)
    out = prepare(
        ids, None, inputs["attention_mask"], None, labels, inputs["images"], inputs["modalities"], inputs["image_sizes"]
    )
    return out[4], out[2].bool(), out[2].bool() & (out[5] == -100)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_videos_and_tiles_are_routed_as_the_host_places_them(host, layout):
    inputs = _inputs(host, layout)
    embeds, valid, image = _prepared(host, inputs)
    assert image.sum(1)[0] >= 12 and image.sum(1)[2] == 0
    stock = host.model(**inputs).logits
    for case in ("lf", "kv", "pc", "fastv", "lf+fastv"):
        with patch(host.model, **ALL[case]) as handle:
            logits = host.model(**inputs, use_cache=False).logits
            for i in range(3):
                states = final_states(host.decoder, embeds[i][valid[i]], image[i][valid[i]], **ALL[case])
                assert close(logits[i][valid[i]], host.model.lm_head(states)), (case, i)
            ids = inputs["input_ids"]
            rest = {k: v for k, v in inputs.items() if k != "input_ids"}
            answer = host.model.generate(ids, **rest, max_new_tokens=2, min_new_tokens=2, do_sample=False)[:, -2:]
            out = host.model(**inputs, use_cache=True)
            assert torch.equal(answer[:, 0], out.logits[:, -1].index_fill(1, torch.tensor(2), -1e9).argmax(-1)), case
            seen = torch.cat([valid, torch.ones(3, 1, dtype=torch.bool)], 1)
            step = {"attention_mask": seen, "past_key_values": out.past_key_values, "use_cache": True}
            cached = host.model(input_ids=answer[:, :1], **step).logits[:, -1]
            longer = {k: torch.cat([inputs[k], extra], 1) for k, extra in
                      (("input_ids", answer[:, :1]), ("attention_mask", seen[:, -1:]))}  # fmt: skip
            with again(handle, out.past_key_values):
                assert close(cached, host.model(**{**inputs, **longer}, use_cache=False).logits[:, -1]), case
    assert torch.equal(host.model(**inputs).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepstack_adds_what_the_host_makes_of_its_taps(host, layout):
    """Pooled, shrunk and joined as the image is; the host itself lays the taps out, with line ends of zeros."""
    inputs = _inputs(host, layout)
    stock = host.model(**inputs).logits
    with patch(host.model, fusion=DeepStack(taps=(2, 5), start=1, interval=2)) as handle:
        assert torch.equal(host.model(**inputs).logits, stock)
        randomise(handle)
        logits = host.model(**inputs).logits
        states = handle.anatomy.vision_model(torch.cat(inputs["images"]), output_hidden_states=True).hidden_states
        added = [host.decoder.mm_projector_stack(states[tap][:, 1:]) for tap in (2, 5)]
    encode, newline, embed = host.model.encode_images, host.decoder.image_newline, host.decoder.embed_tokens.weight
    kept = newline.clone(), embed.clone()
    newline.zero_(), embed.zero_()
    for layer, feature in zip((1, 3), added, strict=True):
        host.model.encode_images = lambda pixels, feature=feature: feature
        values = _prepared(host, inputs)[0]
        host.decoder.layers[layer].register_forward_pre_hook(
            lambda m, args, values=values: (args[0] + values, *args[1:])
        )
    host.model.encode_images = encode
    newline.copy_(kept[0]), embed.copy_(kept[1])
    valid = _prepared(host, inputs)[1]
    assert close(logits[valid], host.model(**inputs).logits[valid])
    assert not close(logits[valid], stock[valid])


@pytest.fixture
def siglip(host, tmp_path):
    """On its SigLIP: 8 blocks of which it deletes the last, 729 patches as it demands."""
    from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionConfig, SigLipVisionModel, SigLipVisionTower

    torch.manual_seed(0)
    config = SigLipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2, image_size=54, patch_size=2
    )
    SigLipVisionModel(config).save_pretrained(tmp_path / "siglip")
    tower = SigLipVisionTower(str(tmp_path / "siglip"), None, delay_load=True)
    tower.config = tower.cfg_only = config  # else it is the published model's, whatever the folder says
    host.model.model.vision_tower = tower
    host.tokens = 729
    host.model.model.image_newline.requires_grad_(False)  # which takes no part with one tile
    return host


def _siglip_inputs(host):
    return {
        "input_ids": torch.tensor([[3, 4, -200, 5, 6]]), "attention_mask": torch.ones(1, 5).bool(),
        "images": torch.randn(1, 3, 54, 54, generator=torch.Generator().manual_seed(3)), "modalities": ["image"],
        "labels": torch.tensor([[-100, -100, -100, 5, 6]]),
    }  # fmt: skip


@ours_only
@pytest.mark.parametrize("early", [False, True], ids=["loaded", "patched-before"])
@pytest.mark.parametrize("fusion", [
    SkipLinks(stride=2), DenseConnector(), DirectFusion(layers=(3, 6)), DeepStack(taps=(2, 7), start=1, interval=2),
], ids=lambda f: type(f).__name__)  # fmt: skip
def test_its_siglip_ends_before_the_block_that_it_deletes(siglip, fusion, early):
    """The main feature is block 7 of the 8 that the configuration names; a fusion is exact, and trains what it says."""
    tower, inputs = siglip.model.get_vision_tower(), _siglip_inputs(siglip)
    if not early:
        tower.load_model()
    found = anatomy.find(siglip.model)
    assert (found.n_blocks, found.main_block, found.prefix_tokens, found.grid) == (7, 7, 0, (27, 27))
    with patch(siglip.model, fusion=_training(fusion)) as handle:
        tower.load_model()
        tower.vision_tower.float()
        handle.apply_freeze()
        patched = siglip.model(**inputs).logits.detach()
        randomise(handle)
        siglip.model(**inputs).loss.backward()
        asked = {n for n, p in siglip.model.named_parameters() if p.requires_grad}
        assert {n for n, p in siglip.model.named_parameters() if p.grad is not None} == asked
        assert any("vision_tower" in n for n in asked) and not any("post_layernorm" in n for n in asked)
    assert torch.equal(siglip.model(**inputs).logits, patched)
    assert get_handle(siglip.model) is None


def _training(fusion):
    return replace(fusion, train_tower="all")


def test_its_tower_trains_without_a_no_grad_to_lift(host):
    """A parameter of the tower has a gradient if and only if it is listed."""
    if not REAL:
        forward = type(host.model.get_vision_tower()).forward
        assert hasattr(forward, "__wrapped__")  # the original package's, which has one
    inputs = {**_inputs(host, "flat"), "labels": _inputs(host, "flat")["input_ids"].clamp(min=-100)}
    with patch(host.model, fusion=SkipLinks(stride=2, train_tower=3)) as handle:
        randomise(handle)
        host.model(**inputs).loss.backward()
        vision = dict(handle.anatomy.vision_model.named_parameters())
        assert {n for n, p in vision.items() if p.grad is not None} == {n for n, p in vision.items() if p.requires_grad}
        assert any(p.requires_grad for p in vision.values())


@ours_only
@pytest.mark.parametrize("kind", ["pooler", "mlp2x_res1x_gelu"])
def test_projectors_that_a_fusion_cannot_start_in_are_refused(host, kind):
    from llava.model.multimodal_projector.builder import build_vision_projector

    host.model.config.mm_projector_type = kind
    tower = host.model.get_vision_tower()
    host.model.model.mm_projector = build_vision_projector(host.model.config, vision_cfg=tower.config)
    if kind == "pooler":
        with pytest.raises(HostError, match="PoolerProjector, which begins with a Conv2d"):
            patch(host.model, fusion=SkipLinks(stride=2))
    with pytest.raises(HostError, match="DeepStack"):
        patch(host.model, fusion=DeepStack(start=1, interval=1))


@ours_only
def test_other_towers_of_the_package_are_refused_by_name(host):
    class OtherTower(nn.Module):
        is_loaded, vision_tower = True, None
        config = host.model.get_vision_tower().config

    host.model.model.vision_tower = OtherTower()
    with pytest.raises(HostError, match="OtherTower is not a vision tower that llava_patch knows"):
        patch(host.model, fusion=SkipLinks(stride=2))


@ours_only
def test_towers_that_join_layers_themselves_are_refused(host):
    host.model.get_vision_tower().select_feature = "slicefour_patch"
    with pytest.raises(HostError, match="slicefour_patch already fuses several layers"):
        patch(host.model, fusion=SkipLinks(stride=2))
