"""Drift: identities, a planted change, the naive computation, and the store on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_patch import FastV, Routing, patch
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.drift.measure import DriftMeter, Quantiles, Store, measure_drift, measure_drift_apart
from llava_patch.measurements.drift.measurement import Drift, DriftResult, drift_figure
from tests.support import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "drift"


def shift(model: torch.nn.Module, layer: int, size: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = find(model).layers[layer].mlp.down_proj.weight
        weight.add_(size * torch.randn(weight.shape, generator=generator))
    return model


def opened(model: Any, samples: Any) -> Any:
    return lambda: (model, samples)


def test_a_model_against_itself_is_exactly_one(host: Any) -> None:
    make_model, make_sample = host
    samples = [make_sample(seed=seed, after=seed + 2) for seed in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model().to(dtype)
        cast = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()} for s in samples]
        together = measure_drift(model, model, cast, progress=False)
        assert together == DriftMeter(Drift()).apart(opened(model, cast), opened(model, iter(cast)), progress=False)
        for curves in (together.image, together.text):
            assert curves.median == curves.low == [1.0] * 5 and curves.input == 1.0
        assert "No drift" in together.summary() and together.samples == 3
        assert together.image.positions == 3 * tiny.PATCHES and together.text.positions == 3 * 2 + 2 + 3 + 4


def test_a_planted_change_shows_from_its_layer_on(host: Any) -> None:
    make_model, make_sample = host
    result = measure_drift(shift(make_model(), 2), make_model(), [make_sample()], progress=False)
    for curves in (result.image, result.text):
        assert curves.input == 1.0 and curves.median[:2] == [1.0, 1.0]
        assert max(curves.median[2:]) < 0.999
    assert "layer" in result.summary() and "No drift" not in result.summary()


def test_equals_the_naive_computation_with_hidden_states(host: Any) -> None:
    make_model, make_sample = host
    model, base = shift(make_model(), 0), make_model()
    samples = [make_sample(seed=seed, after=seed + 3) for seed in range(4)]
    found: list[list[np.ndarray]] = [[], []]
    for sample in samples:
        with torch.no_grad():
            a, b = (m(**sample, output_hidden_states=True).hidden_states for m in (model, base))
        values = torch.stack([torch.cosine_similarity(x[0], y[0], dim=-1) for x, y in zip(a[:-1], b[:-1])])
        image = torch.zeros(values.shape[1], dtype=torch.bool)
        image[2 : 2 + tiny.PATCHES] = True
        found[0].append(values[:, image].numpy())
        found[1].append(values[:, ~image].numpy())
    result = measure_drift(model, base, samples, Drift(split=4), progress=False)
    apart = measure_drift_apart(opened(model, samples), opened(base, samples), Drift(split=4), progress=False)
    assert apart == result
    for curves, parts in zip((result.image, result.text), found):
        everything = np.concatenate(parts, axis=1)
        expected = np.median(everything, axis=1)
        np.testing.assert_allclose([curves.input, *curves.median], expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(
            [curves.input_low, *curves.low], np.quantile(everything, 0.05, axis=1), atol=1e-5, rtol=0
        )
        assert len(curves.median) == 4 and min(curves.median) < 0.999


def marked(result: DriftResult) -> list[tuple[str, str]]:
    """Labels and styles of the vertical lines in the figure."""
    (axis,) = drift_figure.__wrapped__(result).axes  # type: ignore[attr-defined]
    return [(str(line.get_label()), line.get_linestyle()) for line in axis.lines if len(set(line.get_xdata())) == 1]


def test_routed_models_are_compared_below_their_split(host: Any, tmp_path: Path) -> None:
    make_model, make_sample = host
    model, base, sample = shift(make_model(), 3), make_model(), make_sample()
    with patch(model, routing=Routing(split=2)):
        result = measure_drift(model, base, [sample], progress=False)
        assert (result.layers, result.split, result.n_layers) == (2, 2, 5)
        assert result.image.median == result.text.median == [1.0, 1.0]
        with pytest.raises(SettingError, match=r"Drift\.split = 3: this model shows all positions to layers 0..1 only"):
            measure_drift(model, base, [sample], Drift(split=3), progress=False)
        with pytest.raises(SettingError, match="leave the base's decoder at layer 2"):
            measure_drift(base, model, [sample], progress=False)
    json_path, png_path = result.save(tmp_path / "new")
    assert DriftResult.from_dict(json.loads(json_path.read_text())) == result
    assert png_path.read_bytes().startswith(b"\x89PNG") and png_path.stat().st_size > 8_000
    assert not result.prunes and marked(result) == [("split 2", "--")]
    with patch(model, pruning=FastV(1, 0.5)):
        pruned = measure_drift(model, base, [sample], progress=False)
        apart = DriftMeter(Drift()).apart(opened(model, [sample]), opened(base, [sample]), progress=False)
    assert pruned.layers == 1 and pruned.prunes and apart == pruned
    assert DriftResult.from_dict(pruned.to_dict()) == pruned and marked(pruned) == [("pruning from layer 1", "-.")]
    drop = find(model).layers[1].register_forward_hook(lambda m, a, o: o[:, :-1])
    with pytest.raises(HostError, match=r"layer 1 sees 10 of 11 positions: set Drift.split to at most 1"):
        measure_drift(model, base, [sample], progress=False)
    drop.remove()


def test_models_that_read_differently_are_refused(host: Any) -> None:
    make_model, make_sample = host
    model, sample = make_model(), make_sample()
    for other in (make_sample(seed=1), make_sample(before=3, after=4)):
        with pytest.raises(InputError, match="drift: sample 0 has"):
            measure_drift(model, model, [sample], progress=False, base_samples=[other])
        with pytest.raises(InputError, match="drift: sample 0 has"):
            DriftMeter(Drift()).apart(opened(model, [sample]), opened(model, [other]), progress=False)
    moved = {k: v.clone() for k, v in sample.items()}
    moved["input_ids"] = moved["input_ids"].roll(1, 1)  # the same text tokens but for their order
    with pytest.raises(InputError, match="other text tokens"):
        measure_drift(model, model, [sample], progress=False, base_samples=[moved])
    with pytest.raises(InputError, match="5 decoder layers, the base 4"):
        measure_drift(model, make_model(layers=4), [sample], progress=False)
    with pytest.raises(InputError, match="got 1 of the checkpoint's 2 samples"):
        DriftMeter(Drift()).apart(opened(model, [sample] * 2), opened(model, [sample]), progress=False)
    blind = {k: v for k, v in sample.items() if k not in ("images", "pixel_values")}
    with pytest.raises(InputError, match="no usable sample for drift: 1 without an image"):
        measure_drift(model, model, [blind], progress=False)
    mixed = DriftMeter(Drift(max_samples=1)).apart(
        opened(model, [blind, sample, sample]), opened(model, [blind, sample, sample]), progress=False
    )
    assert (mixed.samples, mixed.skipped) == (1, 1)


def test_image_tokens_in_other_places_are_refused() -> None:
    model, sample = tiny.hf_model(), tiny.hf_sample()
    ids = sample["input_ids"][0]
    moved = {**sample, "input_ids": torch.cat([ids[2:6], ids[:2], ids[6:]])[None]}
    with pytest.raises(InputError, match="or in other places"):
        measure_drift(model, model, [sample], progress=False, base_samples=[moved])


def test_the_store_is_bounded_and_always_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = tiny.hf_model(), [tiny.hf_sample(seed=seed) for seed in range(4)]
    size = 6 * 11 * 32 * 4  # rows, positions, channels, bytes
    enough, short = Drift(store_gb=4 * size / 1e9), Drift(store_gb=(4 * size - 1) / 1e9)
    seen: list[int] = []

    def base() -> Any:
        seen.append(len(list(cache.glob("*/*.safetensors"))))
        return model, samples

    assert DriftMeter(enough).apart(opened(model, samples), base, progress=False).samples == 4
    assert seen == [4] and not list(cache.glob("states-*"))
    with pytest.raises(InputError, match=r"of 4 samples need .* more than Drift.store_gb"):
        DriftMeter(short).apart(opened(model, samples), base, progress=False)  # known from the first sample on
    with pytest.raises(InputError, match=r"Drift\.store_gb"):
        DriftMeter(short).apart(opened(model, iter(samples)), base, progress=False)  # when it gets there
    assert seen == [4] and not list(cache.glob("states-*"))

    def broken() -> Any:
        raise RuntimeError("base cannot be loaded")

    with pytest.raises(RuntimeError):
        DriftMeter(enough).apart(opened(model, samples), broken, progress=False)
    assert not list(cache.glob("states-*"))


def test_medians_are_exact_however_they_come() -> None:
    values = np.random.default_rng(0).normal(size=(3, 1001)).astype(np.float32)
    whole, parts = Quantiles(), Quantiles()
    whole.add(values)
    for part in np.array_split(values, 17, axis=1):
        parts.add(part)
    assert whole.of(0.5, 0.05) == parts.of(0.5, 0.05)
    np.testing.assert_array_equal(parts.of(0.5)[0], np.median(values.astype(np.float64), axis=1))
    whole.close(), parts.close()


def test_states_that_are_not_finite_are_named() -> None:
    model = tiny.hf_model()
    with torch.no_grad():
        find(model).layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(HostError, match="hidden states of layer 1 are not finite"):
        measure_drift(model, tiny.hf_model(), [tiny.hf_sample()], progress=False)


@pytest.mark.parametrize("field, value", [("split", 0), ("store_gb", 0), ("together", 1), ("max_samples", 0)])
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"Drift.{field} = "):
        Drift(**{field: value})


def test_what_a_killed_process_left_is_removed_and_what_another_one_uses_is_not(cache: Path) -> None:
    (cache / "states-dead").mkdir(parents=True)
    (cache / "states-dead" / "0.safetensors").write_bytes(b"left")
    (cache / "states-dead" / ".lock").touch()
    with Store(1) as one:
        assert one.folder is not None and [f.name for f in cache.glob("states-*")] == [one.folder.name]
        with Store(1) as other:
            assert other.folder is not None and one.folder.is_dir() and other.folder != one.folder
        assert one.folder.is_dir()
    assert not list(cache.glob("states-*"))
