"""What the answers lose without the image: held to VTW itself, and to the image hidden by the attention mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_patch import Routing, patch
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.saturation.measure import RunningMean, measure_sample, measure_saturation
from llava_patch.measurements.saturation.result import KNOCKOUT, LATER, Curves, Saturation, SaturationResult
from llava_patch.measurements.trace import peak_on_keys, read_positions
from tests.support import tiny

IMAGE = slice(2, 2 + tiny.PATCHES)  # where the samples of two words before it have it


@contextmanager
def hidden(model: nn.Module, layers: range) -> Iterator[None]:
    """The image masked away from what comes behind it, in some layers of a model of eager attention."""

    def hide(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        mask = kwargs["attention_mask"].clone()
        mask[..., IMAGE.stop :, IMAGE] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    hooks = [
        find(model).layers[i].self_attn.register_forward_pre_hook(hide, with_kwargs=True, prepend=True) for i in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def answer(model: nn.Module, sample: dict[str, Tensor], back: int = 1) -> Tensor:
    return model(**sample).logits[0, -back].log_softmax(-1)


def lost(stock: Tensor, found: Tensor) -> float:
    return float((stock.exp() * (stock - found)).sum())


@pytest.mark.parametrize("before", [2, 0])
def test_withdrawn_is_what_vtw_says_at_every_split(host: Any, before: int) -> None:
    make_model, make_sample = host
    model, sample = make_model(), make_sample(before=before)
    curves, stock = measure_sample(find(model), sample), answer(model, sample)
    for split in range(5):
        with patch(model, routing=Routing(variant="vtw", split=split)):
            routed = answer(model, sample)
        assert curves.withdrawn_kl[split] == pytest.approx(lost(stock, routed), rel=1e-3, abs=1e-6)
        assert curves.withdrawn_kept[split] == float(stock.argmax() == routed.argmax())
        assert curves.vtw_kl[split] == pytest.approx(lost(routed, stock), rel=1e-3, abs=1e-6)
    assert curves.withdrawn_kl[0] > 1e-3, "the image must count in this test"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_curves_are_what_a_mask_over_the_image_says(host: Any, attention: str) -> None:
    make_model, make_sample = host
    sample = make_sample()
    curves = measure_sample(find(make_model(attention=attention)), sample)
    model = make_model(attention="eager")
    stock = answer(model, sample)
    for split in range(5):
        for kl, last in ((curves.withdrawn_kl, 5), (curves.fused_kl, 4)):
            with hidden(model, range(split, last)):
                assert kl[split] == pytest.approx(lost(stock, answer(model, sample)), rel=1e-3, abs=1e-6)
    assert curves.fused_kl[4] == pytest.approx(0, abs=1e-6) and curves.fused_kept[4] == 1
    assert curves.fused_kl[0] != pytest.approx(curves.withdrawn_kl[0], rel=1e-2)


def test_many_splits_in_parts_and_any_chunk_give_the_same(host: Any, monkeypatch: Any) -> None:
    make_model, make_sample = host
    anatomy, sample = find(make_model()), make_sample()
    sample["labels"] = sample["input_ids"].clone()
    whole = measure_sample(anatomy, sample)
    monkeypatch.setattr("llava_patch.measurements.saturation.knockout.POSITIONS", 1)
    parts = measure_sample(anatomy, sample, Saturation(chunk=1))
    for name in KNOCKOUT:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-6)


def test_labels_say_what_is_read(host: Any) -> None:
    make_model, make_sample = host
    model, sample = make_model(), make_sample()
    labels = torch.full_like(sample["input_ids"], -100)
    labels[0, -2] = sample["input_ids"][0, -2]  # said by the last position but two
    curves = measure_sample(find(model), {**sample, "labels": labels})
    stock = answer(model, sample, back=3)
    with patch(model, routing=Routing(variant="vtw", split=1)):
        routed = answer(model, sample, back=3)
    assert curves.withdrawn_kl[1] == pytest.approx(lost(stock, routed), rel=1e-3)
    labels[0, -1] = sample["input_ids"][0, -1]  # a further one: VTW's search looks behind the prompt alone
    more = measure_sample(find(model), {**sample, "labels": labels})
    assert more.vtw_kl[1] == curves.vtw_kl[1] == pytest.approx(lost(routed, stock), rel=1e-3)
    assert more.withdrawn_kl[1] != pytest.approx(curves.withdrawn_kl[1], rel=1e-3)


def test_reads_are_text_behind_the_image_whose_next_token_is_labelled() -> None:
    image = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 0, 0]).bool()
    none = torch.full((7,), -100)
    assert read_positions(image, None).tolist() == [9]
    assert read_positions(image, none).tolist() == [9]  # nothing is said: as a prompt
    assert read_positions(image, torch.tensor([1, 1, -100, 5, 6, -100, 7])).tolist() == [4, 5, 8]
    before = none.clone()
    before[1] = 3
    assert read_positions(image, before).tolist() == [9]  # said before the image
    first = none.clone()
    first[2] = 3
    assert read_positions(image, first).tolist() == [9]  # said by the image's last position, which nothing knocks out
    assert read_positions(image, none[:3]).tolist() == [9]


def test_nothing_is_knocked_out_where_it_was_not_asked_for_or_on_a_routed_model(host: Any) -> None:
    make_model, make_sample = host
    model, sample = make_model(), make_sample()
    off = measure_sample(find(model), sample, Saturation(knockout=False))
    assert not off.knocked_out and all(math.isnan(v) for name in KNOCKOUT for v in getattr(off, name))
    with patch(model, routing=Routing(split=2)):
        assert not measure_sample(find(model), sample).knocked_out
    on = measure_sample(find(model), sample)
    assert on.knocked_out
    rest = [name for name in asdict(on) if name not in KNOCKOUT]
    assert all(asdict(on)[name] == asdict(off)[name] for name in rest)


def test_results_without_the_curves_are_read_and_averaged(host: Any) -> None:
    make_model, make_sample = host
    model = make_model()
    result = measure_saturation(model, [make_sample(), make_sample(seed=1)], progress=False)
    written = result.to_dict()
    assert SaturationResult.from_dict(written) == result
    for name in LATER:
        assert len(written[name]) == 5
        del written[name]
    old = SaturationResult.from_dict(written)
    assert not old.curves.knocked_out and math.isnan(old.curves.peak[0])
    assert old.curves.mass == result.curves.mass
    done = RunningMean().plus(old.curves).plus(old.curves)
    done.check()
    assert isinstance(done.mean(), Curves) and not done.mean().knocked_out


def test_the_peak_is_the_largest_single_probability() -> None:
    torch.manual_seed(0)
    q, k, keys = torch.randn(4, 9, 8), torch.randn(2, 9, 8), torch.arange(9) < 4
    scores = torch.einsum("hqd,hkd->hqk", q, k.repeat_interleave(2, 0)) * 0.35
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1)
    expected = scores[:, [5, 8]][..., :4].amax(-1).mean(-1)
    torch.testing.assert_close(peak_on_keys(q, k, torch.tensor([5, 8]), keys, 0.35, None, 1), expected)


def test_the_answers_lens_is_that_of_the_position_that_is_read(host: Any) -> None:
    make_model, make_sample = host
    model, sample, outputs = make_model(), make_sample(), []
    anatomy = find(model)
    for layer in anatomy.layers:
        layer.register_forward_hook(lambda m, a, o: outputs.append(o[0] if isinstance(o, tuple) else o))
    stock = answer(model, sample)
    with torch.no_grad():
        lens = [model.lm_head(anatomy.norm(o))[0, -1].log_softmax(-1) for o in outputs]
    got = measure_sample(anatomy, sample).answer_kl
    assert got == pytest.approx([lost(stock, one) for one in lens], rel=1e-3, abs=1e-6)


def test_the_peak_curve_is_that_of_the_best_head_at_what_is_read(host: Any) -> None:
    make_model, make_sample = host
    model, sample = make_model(attention="eager"), make_sample()
    with torch.no_grad():
        attentions = model(**sample, output_attentions=True).attentions
    expected = [float(a[0, :, -1, IMAGE].amax()) for a in attentions]
    assert measure_sample(find(model), sample).peak == pytest.approx(expected, abs=1e-5)


def test_a_layer_is_called_on_all_splits_at_once(host: Any) -> None:
    make_model, make_sample = host
    model, rows = make_model(), []

    def count(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    for layer in find(model).layers:
        layer.register_forward_pre_hook(count, with_kwargs=True)
    measure_sample(find(model), make_sample())
    assert rows == [1] * 5 + [1, 2, 3, 4, 5, 5]  # the stock pass; then each layer once, the last for both curves
