"""Attention mathematics, transition layers and the recommended window."""

from __future__ import annotations

import math

import pytest
import torch

from llava_patch.measurements.saturation.recommend import (
    Recommendation,
    deep_median,
    kept_from,
    recommend,
    recommend_by_answers,
    recommend_vtw,
    settled_layer,
    transition_layer,
)
from llava_patch.measurements.saturation.result import Saturation
from llava_patch.measurements.trace import mass_on_keys

NAN = float("nan")
SHARES = Saturation(transition_share=0.5, mass_tolerance=0.2, fall_share=0.5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [1, 4, 99])
def test_mass_over_all_keys_is_one_and_disjoint_keys_add_up(window: int | None, chunk: int) -> None:
    torch.manual_seed(0)
    q, k, queries = torch.randn(4, 9, 8), torch.randn(2, 9, 8), torch.tensor([2, 5, 6, 7, 8])
    every = torch.ones(9, dtype=torch.bool)
    some = torch.arange(9) < 4
    mass = mass_on_keys(q, k, queries, every, 0.35, window, chunk)
    torch.testing.assert_close(mass, torch.ones(4))
    parts = [mass_on_keys(q, k, queries, keys, 0.35, window, chunk) for keys in (some, ~some)]
    torch.testing.assert_close(parts[0] + parts[1], torch.ones(4))
    # Flash-style reference: the probability on a set of keys is attention applied to an indicator value.
    near = torch.arange(9)[None] > torch.arange(9)[:, None] - (window or 99)
    allowed = torch.ones(9, 9).tril().bool() & near
    value = some.float()[None, None, :, None].expand(1, 4, 9, 1)
    reference = torch.nn.functional.scaled_dot_product_attention(
        q[None], k.repeat_interleave(2, 0)[None], value, attn_mask=allowed, scale=0.35
    )
    torch.testing.assert_close(parts[0], reference[0, :, queries, 0].mean(-1))


def test_places_say_what_is_before_a_query() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(4, 9, 8), torch.randn(2, 9, 8)
    keys, alive, asking = torch.arange(9) < 4, torch.tensor([0, 2, 3, 5, 6, 8]), torch.tensor([5, 8])
    for window in (None, 4):
        got = mass_on_keys(
            q[:, asking], k[:, alive], torch.tensor([0, 1]), keys[alive], 0.35, window, 1, (asking, alive)
        )
        scores = torch.einsum("hqd,hkd->hqk", q[:, asking], k[:, alive].repeat_interleave(2, 0)) * 0.35
        distance = asking[:, None] - alive[None]
        scores[:, (distance < 0) | (distance >= (window or 99))] = float("-inf")
        torch.testing.assert_close(got, (scores.softmax(-1) * keys[alive]).sum(-1).mean(-1))


def test_half_precision_is_summed_in_single() -> None:
    torch.manual_seed(0)
    q, k, queries = torch.randn(2, 40, 8), torch.randn(2, 40, 8), torch.arange(20, 40)
    half = [x.bfloat16() for x in (q, k)]
    keys = torch.arange(40) < 20
    expected = mass_on_keys(half[0].float(), half[1].float(), queries, keys, 0.35)
    assert torch.equal(mass_on_keys(*half, queries, keys, 0.35), expected)


def test_transition_is_where_kl_stays_low() -> None:
    assert transition_layer([2.0, 1.5, 0.9, 0.5, 0.0], 0.5) == 2
    assert transition_layer([2.0, 0.9, 1.5, 0.5, 0.0], 0.5) == 3  # a dip does not count
    assert transition_layer([2.0, 1.9, 1.8, 1.7, 0.0], 0.5) == 4  # only the last layer, whose KL is 0
    assert transition_layer([2.0, 1.5, NAN, NAN, 0.0], 0.5) is None  # gone before it fell; 0 at the end says nothing
    assert transition_layer([2.0, 1.5, 0.9, NAN, 0.0], 0.5) == 2
    assert transition_layer([2.0, 0.9, 1.5, NAN, NAN], 0.5) is None
    assert transition_layer([0.0, 0.0], 0.5) is None
    assert transition_layer([NAN, 0.0], 0.5) is None


def paper_like() -> list[float]:
    return [0.68, 0.4, 0.2, 0.1, 0.07] + [0.06] * 13 + [0.04] * 13 + [0.2]


def test_deep_mass_leaves_the_last_layer_out() -> None:
    assert deep_median(paper_like()) == 0.04
    assert deep_median([9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 4.0, 8.0]) == 2.0  # of 1, 2 and 4: layers 4 to 6 of 8
    assert deep_median([9.0, 9.0, 9.0, 1.0, 2.0, 4.0, 8.0]) == 2.0  # 3 to 5 of 7
    assert deep_median([0.25, 0.75]) == 0.5  # no deep layer: of all
    assert settled_layer(paper_like(), 0.2) == 18
    assert settled_layer([0.9, 0.1, 0.5, 0.1, 0.5, 0.1], 0.2) is None


def test_the_papers_curve_gives_its_split() -> None:
    kl = [4.0] * 20 + [1.0] * 11 + [0.0]
    got = recommend(paper_like(), kl, [0.9] * 18 + [0.99] * 14, [True] * 32, SHARES)
    assert got.split == 18 and got.window == (18, 20) and "disagree" not in got.reason
    turning = recommend(paper_like(), kl, [0.99] * 18 + [0.9] * 14, [True] * 32, SHARES)
    assert turning.split == 18 and "disagree in part" in turning.reason


@pytest.mark.parametrize(
    "mass, kl, words",
    [
        ([0.96, 0.9, 0.85, 0.8, 0.8, 0.8, 0.76, 0.75], [2.7, 2, 1.5, *[0.1] * 4, 0], "does not fall.*layer 3.*disagr"),
        ([0.9, 0.5, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1], [2.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0], "disagree.*window is empty"),
        ([0.9, 0.1, 0.5, 0.1, 0.5, 0.1, 0.5, 0.1], [2.7, 2, 2, 2, 2, 2, 0.1, 0], "does not fall|never settles"),
        ([0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.0] * 8, "no image transition"),
        ([0.9, 0.1, 0.1, 0, 0, 0, 0, 0.1], [2.0, 2, 2, NAN, NAN, NAN, NAN, 0], "already routed, and layers 3..6 have"),
    ],
)  # fmt: skip
def test_no_window_gives_the_reason(mass: list[float], kl: list[float], words: str) -> None:
    import re

    present = [not math.isnan(value) for value in kl]
    got = recommend(mass, kl, [0.9] * 8, present, SHARES)
    assert got.split is None and got.window is None
    assert re.search(words, got.reason), got.reason


def test_answers_are_kept_from_where_they_stay_so() -> None:
    assert kept_from([3.0, 0.1, 0.3, 0.1, 0.0], 0.2) == 3  # one good split before a bad one does not count
    assert kept_from([0.0, 0.0], 0.2) == 0
    assert kept_from([3.0, 0.1, NAN], 0.2) is None
    assert kept_from([3.0, 2.0], 0.2) is None


def test_what_the_answers_lose_decides_over_the_other_signals() -> None:
    early = [4.0, 3.0, 3.0, 0.1, 0.0, 0.0]
    late = [4.0, 3.0, 3.0, 3.0, 3.0, 3.0]  # only the last layer reads what is missing
    again = [4.0, 3.0, 0.1, 0.0, 0.0, 0.0]
    mass = Recommendation("mass settles", (4, 5))
    none = Recommendation("mass does not fall")
    got = recommend_by_answers(early, early, SHARES, True, none)
    assert got.window == (3, 4) and "5% of the 4 nats" in got.reason and "mass does not fall" in got.reason
    assert recommend_by_answers(early, early, SHARES, False, none).window == (3, 5)
    got = recommend_by_answers(late, again, SHARES, True, mass)
    assert got.split == 2 and "signals disagree" in got.reason and "from no split on" in got.reason
    assert "disagree" not in recommend_by_answers(early, early, SHARES, True, Recommendation("", (3, 5))).reason
    got = recommend_by_answers(late, again, SHARES, False, mass)
    assert got.window is None and "need the image to the end" in got.reason and "say 4" in got.reason
    got = recommend_by_answers([4.0, 3.0, 3.0], [4.0, 3.0, 0.0], SHARES, True, mass)
    assert got.window is None, "LF with nothing between split and fusion saves nothing"


def test_answers_that_need_no_image_leave_it_to_the_others() -> None:
    got = recommend_by_answers([0.001, 0.0], [0.001, 0.0], SHARES, True, Recommendation("mass settles", (4, 5)))
    assert got.window == (4, 5) and got.reason.startswith("mass settles; the answers have no say")


def test_vtws_search_takes_the_first_touch_of_its_threshold() -> None:
    kl = [0.0, 0.0, 4.0, 4.0, 4.0, 0.2, 0.003, 0.1, 0.0]
    assert recommend_vtw(kl, Saturation()).window == (6, 8)  # layers below 5 do not count, what comes after neither
    assert recommend_vtw(kl, Saturation(vtw_threshold=0.2)).split == 5
    assert recommend_vtw(kl, Saturation(vtw_first=1)).split == 1
    assert recommend_vtw(kl[:6], Saturation()).split is None
    assert recommend_vtw([NAN] * 6, Saturation()).reason.endswith("was not measured (Saturation.knockout)")
