"""Attention maps against the eager attention tensors of every known tower."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_patch import SkipLinks, patch
from llava_patch.core import plotting
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.data.inputs import Inputs
from llava_patch.hosts.anatomy import find
from llava_patch.hosts.towers import attention as tower_attention
from llava_patch.hosts.towers import layout as towers
from llava_patch.measurements.attention_maps import maths
from llava_patch.measurements.attention_maps.measure import measure_attention_maps
from llava_patch.measurements.attention_maps.measurement import (
    WHOLE,
    AttentionMaps,
    AttentionMapsResult,
    CheckpointMaps,
    View,
    _columns,
    attention_maps_figure,
)
from tests.support import tiny, zoo


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.install_timm_stand_in(monkeypatch)


def eager(vision: Any, pixels: torch.Tensor, block: int) -> torch.Tensor:
    """The attention tensor [heads, tokens, tokens] that the block's own eager code makes."""
    layer = zoo.blocks_of(vision)[block - 1]
    if hasattr(layer, "attn"):
        layer.attn.fused_attn = False
        with torch.no_grad():
            vision(pixels)
        layer.attn.fused_attn = True
        return layer.attn.seen[0]
    module = getattr(layer, "self_attn", None) or layer.attention
    kept: list[Any] = []
    hook = module.register_forward_hook(lambda m, a, o: kept.append(o[1]))
    before = vision.config._attn_implementation
    vision.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            vision(pixels, **({"output_attentions": True} if "CLIP" in type(vision).__name__ else {}))
    finally:
        hook.remove()
        vision.config._attn_implementation = before
    return kept[0][0]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_equals_the_eager_attention_of_every_tower(name: str, backend: str) -> None:
    vision = zoo.ours(name)
    if name != "timm":
        vision.set_attn_implementation(backend)
    pixels = torch.randn(1, 3, zoo.SIDE, zoo.SIDE, generator=torch.Generator().manual_seed(1))
    prefix = zoo.PREFIX[name]
    for block in (1, 4, zoo.BLOCKS):
        attention = eager(vision, pixels, block).mean(0)
        expected = attention[0, 1:] if prefix else attention.mean(0)
        described = towers.describe(vision)
        with torch.no_grad(), tower_attention.watched(described, block) as seen:
            vision(pixels)
        cls = tower_attention.has_cls(vision, described)
        assert cls == (prefix == 1)
        for chunk in (3, 256):
            got = maths.patch_attention(seen.q[0], seen.k[0], seen.scaling, described.prefix_tokens, cls, chunk)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert float(expected.max() - expected.min()) > 1e-3  # a flat map would equal anything


def test_query_and_key_norms_of_internvit_count() -> None:
    import transformers as t

    made = zoo.config("internvl")
    made.use_qk_norm = True
    vision = zoo.scramble(type(zoo.ours("internvl"))(t.InternVLVisionConfig(**made.to_dict()))).eval()
    pixels = torch.randn(1, 3, zoo.SIDE, zoo.SIDE)
    expected = eager(vision, pixels, 3).mean(0)[0, 1:]
    with torch.no_grad(), tower_attention.watched(towers.describe(vision), 3) as seen:
        vision(pixels)
    got = maths.patch_attention(seen.q[0], seen.k[0], seen.scaling, 1, True)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_hooks_and_flags_are_gone_afterwards() -> None:
    for name in ("clip", "timm"):
        vision = zoo.ours(name)
        with pytest.raises(RuntimeError), tower_attention.watched(towers.describe(vision), 2):
            raise RuntimeError
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in vision.modules())
        if name == "timm":  # asked again in its fused way, then as it was
            attention = zoo.blocks_of(vision)[1].attn
            attention.fused_attn = False
            with torch.no_grad(), tower_attention.watched(towers.describe(vision), 2) as seen:
                vision(torch.randn(1, 3, zoo.SIDE, zoo.SIDE))
            assert attention.fused_attn is False and seen.q is not None
            expected = attention.seen.mean(1)[0, 0, 1:]
            got = maths.patch_attention(seen.q[0], seen.k[0], seen.scaling, 1, True)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_an_unknown_attention_is_named() -> None:
    vision = zoo.ours("clip")
    del zoo.blocks_of(vision)[0].self_attn.q_proj
    with (
        pytest.raises(HostError, match="attention CLIPAttention of the vision tower is not known"),
        tower_attention.watched(towers.describe(vision), 1),
    ):
        pass


def test_several_models_stand_side_by_side(host: Any, tmp_path: Path) -> None:
    make_model, make_sample = host
    settings = AttentionMaps(block=2)
    samples = [make_sample(seed=seed) for seed in range(3)]
    processor = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.2] * 3)
    stock = measure_attention_maps(
        make_model(), samples, settings, progress=False, image_processor=processor, checkpoint="stock"
    )
    model = make_model()
    with patch(model, fusion=SkipLinks(stride=1)):
        patched = measure_attention_maps(
            model, samples, settings, progress=False, image_processor=processor, checkpoint="patched"
        )
    both = stock.beside(patched)
    assert both.correlations(1) == pytest.approx([1, 1, 1]) and stock.checkpoints[0].query == "CLS token"
    assert _columns(both) == [(0, False), (0, True), (1, True)]
    json_path, png_path = both.save(tmp_path)
    assert png_path.read_bytes().startswith(b"\x89PNG") and png_path.stat().st_size > 10_000
    values = json.loads(json_path.read_text())
    assert AttentionMapsResult.from_dict(values).to_dict() == values
    one = values["checkpoints"][1]["images"][2]
    share = np.array(one["map"]) / np.sum(one["map"])
    assert one["entropy"] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-5)
    assert one["effective_patches"] == pytest.approx(math.exp(one["entropy"])) and 1 < one["effective_patches"] <= 4
    assert "patched" in both.summary() and len(both.table()[1]) == 2
    with pytest.raises(InputError, match="cannot be drawn again"):
        AttentionMapsResult.from_dict(values).save(tmp_path)
    with pytest.raises(InputError, match="other images or with other settings"):
        stock.beside(measure_attention_maps(make_model(), samples[:1], settings, progress=False))
    # A checkpoint that sees the images otherwise brings its own originals.
    inverted = [{k: -v if k in ("images", "pixel_values") else v for k, v in s.items()} for s in samples]
    other = measure_attention_maps(make_model(), inverted, settings, progress=False, image_processor=processor)
    assert _columns(both.beside(other)) == [(0, False), (0, True), (1, True), (2, False), (2, True)]


@pytest.mark.parametrize("side", [4, 24, 48])
def test_what_stands_below_a_map_is_no_wider_than_the_map(side: int, tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plotting, "write_figure", lambda figure, path: drawn.append(figure) or path)
    view = View(np.zeros((side * 14, side * 14, 3), np.uint8), 14)
    one = CheckpointMaps("model", "CLS token", WHOLE, 2, 8, [[[1.0] * side] * side], views=[view])
    attention_maps_figure(AttentionMapsResult(["page"], [one], AttentionMaps()), tmp_path / "maps.png")
    (figure,) = drawn
    figure.canvas.draw()
    _, axis, _ = figure.axes
    label, picture = axis.xaxis.label.get_window_extent(), axis.get_window_extent()
    assert axis.get_xlabel() == f"{side * side:.1f} of {side * side}"
    assert picture.x0 <= label.x0 and label.x1 <= picture.x1


def test_a_tower_without_cls_says_so_and_tiles_give_the_overview(tmp_path: Path) -> None:
    model = zoo.hf_model("siglip")
    tiles = torch.randn(1, 3, 3, zoo.SIDE, zoo.SIDE)
    ids = torch.tensor([[1, 5]])
    result = measure_attention_maps(model, [{"input_ids": ids, "pixel_values": tiles}], progress=False)
    alone = measure_attention_maps(model, [{"input_ids": ids, "pixel_values": tiles[:, 0]}], progress=False)
    one = result.checkpoints[0]
    assert (one.query, one.part) == ("mean over patches", "overview tile") and "mean over patches" in result.summary()
    assert one.maps == alone.checkpoints[0].maps and alone.checkpoints[0].part == "whole image"
    assert np.sum(one.maps[0]) == pytest.approx(1)  # no token but patches to look at
    assert result.save(tmp_path)[1].is_file()


def test_padding_and_what_no_patch_covers_are_shown_as_the_model_sees_them(tmp_path: Path) -> None:
    pytest.importorskip("llava")
    from transformers import CLIPImageProcessor

    model = tiny.llava_model(tmp_path)
    model.config.image_aspect_ratio = "pad"
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})

    class Tokenizer:
        bos_token_id = 1

        def __call__(self, text: str) -> Any:
            return SimpleNamespace(input_ids=[1, 5, 6])

    inputs = Inputs(find(model), Tokenizer(), processor)
    wide = Image.new("RGB", (56, 28), (255, 0, 0))
    sample = inputs.forward_inputs(wide, "What?")
    result = measure_attention_maps(model, [sample], AttentionMaps(block=1), progress=False, image_processor=processor)
    pixels = result.checkpoints[0].views[0].pixels
    assert pixels.shape == (28, 28, 3)
    mean = [int(255 * x) for x in processor.image_mean]
    assert np.abs(pixels[1, 14].astype(int) - mean).max() <= 1  # llava's padding
    assert np.abs(pixels[14, 14].astype(int) - [255, 0, 0]).max() <= 1


def test_nearest_and_min_max() -> None:
    grid = torch.tensor([[1.0, 3.0], [2.0, 5.0]])
    assert torch.equal(maths.min_max(grid), torch.tensor([[0, 0.5], [0.25, 1]]))
    assert torch.equal(maths.min_max(torch.ones(2, 2)), torch.zeros(2, 2))
    assert torch.equal(maths.nearest(grid, 2)[1:3], torch.tensor([[1.0, 1, 3, 3], [2, 2, 5, 5]]))
    assert maths.entropy(torch.ones(3, 5)) == pytest.approx(math.log(15))
    assert maths.entropy(torch.tensor([0.0, 2.0])) == 0
    assert maths.correlation(grid, -grid) == pytest.approx(-1) and math.isnan(maths.correlation(grid, torch.ones(2, 2)))


def test_bad_settings_and_samples_are_named() -> None:
    model, sample = tiny.hf_model(), tiny.hf_sample()
    with pytest.raises(SettingError, match=r"AttentionMaps\.block = 0"):
        AttentionMaps(block=0)
    with pytest.raises(SettingError, match=r"AttentionMaps\.block = 4: .* has blocks 1\.\.3"):
        measure_attention_maps(model, [sample], progress=False)
    with pytest.raises(InputError, match="one image each, got 0"):
        measure_attention_maps(model, [{"input_ids": sample["input_ids"]}], AttentionMaps(1), progress=False)
    with pytest.raises(InputError, match="no image to draw"):
        measure_attention_maps(model, [], AttentionMaps(1), progress=False)
