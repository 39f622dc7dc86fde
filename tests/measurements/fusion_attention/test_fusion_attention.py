"""Fusion attention against eager attention tensors, with the routed layers called as the routed model calls them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_patch import FastV, Routing, patch
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.fusion_attention.measure import (
    MassMeter,
    fusion_layers,
    image_attention,
    measure_fusion_attention,
    measure_sample,
)
from llava_patch.measurements.fusion_attention.measurement import FusionAttention, FusionAttentionResult
from tests.support import tiny

IMAGE = slice(2, 2 + tiny.PATCHES)


def shake(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """As after training: every decoder weight, the side branch's too, a little elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in find(model).decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def eager_mass(model: torch.nn.Module, sample: dict[str, Any], layer: int, text_only: bool = False) -> torch.Tensor:
    """Mass per head from the attention tensor that the layer's own eager code returns."""
    kept: list[torch.Tensor] = []
    attention = find(model).layers[layer].self_attn
    hook = attention.register_forward_hook(lambda m, a, o: kept.append(o[1]))
    with torch.no_grad():
        model(**sample, use_cache=False)
    hook.remove()
    weights = kept[0][0]  # [heads, queries, keys]
    rows = weights[:, 2:] if text_only else weights[:, 2 + tiny.PATCHES :]
    return rows[:, :, IMAGE].sum(-1).mean(-1)


@pytest.mark.parametrize("variant", ["lf", "pc", "kv"])
def test_equals_eager_attention_in_routed_layers(host: Any, variant: str) -> None:
    make_model, make_sample = host
    sample = make_sample(after=6)
    eager, model = make_model(attention="eager"), make_model()
    settings = Routing(variant=variant, split=2, fusion_layers=2 if variant == "lf" else 1)
    with patch(eager, routing=settings), patch(model, routing=settings):
        shake(eager), shake(model)
        layers = fusion_layers(find(model))
        assert layers == ((3, 4) if variant == "lf" else (2, 3, 4))
        for chunk in (2, 128):
            mass, _ = measure_sample(find(model), sample, layers, chunk)
            for index, layer in enumerate(layers):
                kv = variant == "kv" and layer < 4
                expected = eager_mass(eager, sample, layer, text_only=kv)
                torch.testing.assert_close(mass[index], expected, atol=1e-5, rtol=0)
                assert 0 < float(mass[index].min()) < 1
        below, _ = measure_sample(find(model), sample, (1, 2))
        torch.testing.assert_close(below[0], eager_mass(eager, sample, 1), atol=1e-5, rtol=0)
        assert variant != "lf" or not below[1].any()  # a text-only layer


def test_where_the_last_position_looks_is_what_the_fusion_layer_computes(host: Any) -> None:
    make_model, make_sample = host
    sample, eager, model = make_sample(after=6), make_model(attention="eager"), make_model()
    settings, kept = Routing(split=2), []
    with patch(eager, routing=settings), patch(model, routing=settings):
        shake(eager), shake(model)
        hook = find(eager).layers[4].self_attn.register_forward_hook(lambda m, a, o: kept.append(o[1][0]))
        with torch.no_grad():
            eager(**sample, use_cache=False)
        hook.remove()
        found = image_attention(model, sample)
        assert list(found) == [4] and found[4].shape == (4, tiny.PATCHES)
        torch.testing.assert_close(found[4], kept[0][:, -1, IMAGE], atol=1e-5, rtol=0)
        labels = torch.full_like(sample["input_ids"], -100)
        labels[0, -1] = 5  # the last token is the answer's: the one before it says it
        found = image_attention(model, {**sample, "labels": labels}, layers=(4, 3))
        torch.testing.assert_close(found[4], kept[0][:, -2, IMAGE], atol=1e-5, rtol=0)
        assert found[3].shape == (4, 0)  # a text-only layer


@pytest.mark.parametrize("routing", [None, Routing(split=3)], ids=["fastv", "lf+fastv"])
def test_equals_eager_attention_on_the_image_tokens_that_pruning_leaves(host: Any, routing: Routing | None) -> None:
    make_model, make_sample = host
    sample, pruning, kept = make_sample(after=6), FastV(2, 0.5), tiny.PATCHES // 2
    eager, model = make_model(attention="eager"), make_model()
    weights: list[torch.Tensor] = []
    with patch(eager, routing=routing, pruning=pruning), patch(model, routing=routing, pruning=pruning):
        shake(eager), shake(model)
        assert fusion_layers(find(model)) == (4,)
        hook = find(eager).layers[4].self_attn.register_forward_hook(lambda m, a, o: weights.append(o[1][0]))
        with torch.no_grad():
            eager(**sample, use_cache=False)
        hook.remove()
        mass, _ = measure_sample(find(model), sample, (4,))
        result = measure_fusion_attention(model, make_model(), [sample], progress=False)
    assert weights[0].shape[-1] == weights[0].shape[-2] == 2 + kept + 6
    expected = weights[0][:, 2 + kept :, 2 : 2 + kept].sum(-1).mean(-1)
    torch.testing.assert_close(mass[0], expected, atol=1e-5, rtol=0)
    assert result.trained[0] == mass[0].double().tolist() and result.samples == 1


def test_stock_against_stock_is_exactly_one(host: Any) -> None:
    make_model, make_sample = host
    samples = [make_sample(seed=seed, after=seed + 3) for seed in range(3)]
    result = measure_fusion_attention(make_model(), make_model(), samples, FusionAttention(layers=(0, 4)), False)
    for index in range(2):
        assert result.mean_ratio(index) == 1 and result.ratios(index) == [1] * 4 and result.above_twice(index) == 0
    assert result.layers == [0, 4] and result.samples == 3 and "1.00 times" in result.summary()


def test_numbers_figure_and_json(host: Any, tmp_path: Path) -> None:
    make_model, make_sample = host
    stock, model = make_model(), make_model()
    samples = [make_sample(seed=1), make_sample(after=0), make_sample(seed=2, after=9)]
    with patch(model, routing=Routing(split=2)):
        shake(model)
        result = measure_fusion_attention(model, stock, samples, progress=False)
        each = [[measure_sample(find(m), samples[i], (4,))[0][0] for i in (0, 2)] for m in (model, stock)]
        apart = MassMeter(FusionAttention()).apart(
            lambda: (model, iter(samples)), lambda: (stock, iter(samples)), progress=False
        )
    assert apart == result and (result.samples, result.skipped) == (2, 1)
    trained, base = (torch.stack(one).double().mean(0) for one in each)
    assert result.trained[0] == trained.tolist() and result.stock[0] == base.tolist()
    assert result.mean_ratio(0) == pytest.approx(float(trained.mean() / base.mean()))
    json_path, png_path = result.save(tmp_path / "new")
    values = json.loads(json_path.read_text())
    assert png_path.read_bytes().startswith(b"\x89PNG") and png_path.stat().st_size > 10_000
    assert FusionAttentionResult.from_dict(values) == result
    for name in ("skipped", "checkpoint", "base", "settings"):
        with pytest.raises(InputError, match=f"missing: '{name}'"):
            FusionAttentionResult.from_dict({k: v for k, v in values.items() if k != name})
    assert values["layers"][0]["heads_above_twice_stock"] == int((trained > 2 * base).sum())
    assert values["layers"][0]["highest_head_trained"] == int(trained.argmax())
    assert result.table()[1][0][0] == "4"


def test_counts_of_heads() -> None:
    result = FusionAttentionResult([7], [[0.5, 0.21, 0.1]], [[0.2, 0.1, 0.1]], 8, 1)
    assert result.above_twice(0) == 2 and result.mean_ratio(0) == pytest.approx(0.81 / 0.4)
    empty = FusionAttentionResult([3], [[0.0, 0.0]], [[0.0, 0.1]], 8, 1)
    assert math.isnan(empty.ratios(0)[0]) and empty.above_twice(0) == 0
    assert empty.to_dict()["layers"][0]["head_ratios"] == [None, 0.0]


def test_what_cannot_be_compared_is_refused(host: Any) -> None:
    make_model, make_sample = host
    model, sample = make_model(), make_sample()
    other = {**sample, "input_ids": sample["input_ids"].clone()}
    other["input_ids"][0, 0] += 1
    with pytest.raises(InputError, match="sample 1 has other text tokens or image positions"):
        MassMeter(FusionAttention()).apart(
            lambda: (model, [sample, sample]), lambda: (model, [sample, other]), progress=False
        )
    cut = [make_sample(after=0), sample]  # the first is usable in the base alone
    with pytest.raises(InputError, match="sample 0 has other text tokens or image positions"):
        measure_fusion_attention(model, model, cut, progress=False, base_samples=[sample, sample])
    with pytest.raises(InputError, match="sample 0 has other text tokens or image positions"):
        MassMeter(FusionAttention()).apart(lambda: (model, cut), lambda: (model, [sample, sample]), progress=False)
    with pytest.raises(InputError, match="5 layers of 4 heads, the base 4 of 4"):
        measure_fusion_attention(model, make_model(layers=4), [sample], FusionAttention(layers=(3,)), False)
    with pytest.raises(InputError, match="no usable sample for fusion attention: 1 without"):
        measure_fusion_attention(model, model, [make_sample(after=0)], progress=False)
    with pytest.raises(SettingError, match=r"layers = \(5,\): this model has layers 0..4"):
        measure_fusion_attention(model, model, [sample], FusionAttention(layers=(5,)), False)
    with patch(model, routing=Routing(variant="vtw", split=2)), pytest.raises(InputError, match="no fusion layer"):
        measure_fusion_attention(model, model, [sample], progress=False)
    with torch.no_grad():
        find(other_model := make_model()).layers[2].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(HostError, match="layer 4 are not finite"):
        measure_fusion_attention(other_model, model, [sample], progress=False)
    kept = [{**m._forward_hooks, **m._forward_pre_hooks}.values() for m in find(model).decoder.modules()]
    assert all(hook.__module__.startswith("transformers.") for hooks in kept for hook in hooks)  # its recorder's


@pytest.mark.parametrize("field, value", [("layers", ()), ("layers", (-1,)), ("chunk", 0), ("base", 3)])
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"FusionAttention.{field} = "):
        FusionAttention(**{field: value})
