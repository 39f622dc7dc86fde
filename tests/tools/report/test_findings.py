"""Each section opens with a sentence made from its data, and says so where they do not decide."""

import math
from dataclasses import replace

import pytest

from llava_patch import Routing
from llava_patch.measurements.attention_maps.measurement import AttentionMapsResult, CheckpointMaps
from llava_patch.measurements.drift.measurement import DriftCurves, DriftResult
from llava_patch.measurements.flops.count import Prompt
from llava_patch.measurements.flops.result import measure_flops
from llava_patch.measurements.flops.shape import named
from llava_patch.measurements.fusion_attention.measurement import FusionAttentionResult
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.moments import Step
from llava_patch.measurements.gradients.result import GradientsResult, median_interval
from llava_patch.measurements.rprobe import ablation
from llava_patch.measurements.rprobe.result import RProbeResult
from llava_patch.measurements.saturation.measure import RunningMean
from llava_patch.measurements.saturation.result import Curves, PatchOn, Saturation, SaturationResult
from llava_patch.tools.report import build
from llava_patch.tools.report.sections import DONE, Found, Record, _trend

from .test_figures import part, reach


def curves(fused, mass=0.5):
    flat = [0.9] * len(fused)
    squares = [v * v for v in fused]
    return Curves(flat, flat, [[mass]] * len(fused), flat, flat, [4] * len(fused), [4] * len(fused),
                  withdrawn_kl=fused, fused_kl=fused, withdrawn_square=squares, fused_square=squares)  # fmt: skip


def saturation(*samples, patch=None):
    """The result of samples that lose this much at each split."""
    done = RunningMean()
    for one in samples:
        done = done.plus(curves(one))
    return SaturationResult(done.mean(), done.samples, settings=Saturation(), patch=patch)


def test_a_planted_layer_is_named_as_the_split_with_its_interval():
    result = saturation([1.0, 0.8, 0.5, 0.02, 0.0, 0.0], [1.2, 0.9, 0.6, 0.03, 0.0, 0.0])
    assert result.finding().startswith("Saturated from layer 3 of 6 on: take Routing.split = 3,")
    assert result.split_interval() == (3, 3) and "the split stays 3" in result.summary()
    error = 2 * math.sqrt(((0.02 - 0.025) ** 2 + (0.03 - 0.025) ** 2) / 2)
    assert result.errors("fused_kl")[3] == pytest.approx(error)
    assert f"the answers lose 0.025 ± {error:.2g} nats" in result.summary() and "these 2" in result.caution()


def test_an_interval_that_reaches_the_end_decides_nothing():
    late, early = [1.0, 0.8, 0.0, 0.0, 0.0, 0.0], [1.0, 0.8, 0.08, 0.08, 0.08, 0.08]
    result = saturation(late, early)
    assert result.recommended_split == 2 and result.split_interval() == (2, None)
    assert result.finding().startswith("Undecided: these samples say split 2")


def test_an_interval_that_begins_before_the_end_decides_nothing_either():
    result = saturation([1.0, 0.8, 0.0, 0.0, 0.0, 0.0], [1.0, 0.9, 0.2, 0.2, 0.2, 0.2])
    assert result.recommended_split is None and result.split_interval()[0] is not None
    assert result.finding().startswith("Undecided: the answers seem to need")


def test_answers_that_need_the_image_to_the_end_are_not_saturated():
    assert saturation([1.0, 0.9, 0.8, 0.7, 0.6, 0.5]).finding().startswith("Not saturated: the answers need the image")


def test_answers_that_need_no_image_or_were_not_asked_leave_it_undecided():
    indifferent = saturation([0.001, 0.0, 0.0, 0.0]).finding()
    assert indifferent.startswith("Undecided: the answers hardly change without any image")
    bare = replace(curves([0.0] * 4), withdrawn_kl=[], fused_kl=[], withdrawn_square=[], fused_square=[])
    assert SaturationResult(bare, 1).finding().startswith("Undecided: what the answers lose without the image was not")
    routed = saturation([1.0] * 4, patch=PatchOn(2, None, "routed (lf, split 2)"))
    assert routed.finding().startswith("Nothing is left to decide: the model is routed (lf, split 2)")


def test_reach_names_what_cannot_learn():
    from llava_patch.measurements.reach.measurement import LAYER, NONZERO, ZERO

    whole = reach(states=(NONZERO, NONZERO))
    assert whole.finding() == "Everything that is to train gets a gradient."
    assert "reaches decoder layer 1;" in reach(states=(NONZERO, ZERO)).finding()
    dead = replace(whole, side=replace(whole.side, nonzero=()))
    assert dead.finding().startswith("The side branch cannot be trained")
    frozen = replace(part(LAYER, "frozen"), asking=0)
    assert replace(whole, parts=(frozen,)).finding().startswith("Nothing would train")


def test_drift_says_where_it_begins():
    still = DriftCurves([1.0, 1.0], [1.0, 1.0], 1.0, 1.0, 9)
    base = DriftResult(still, still, 4, 2, 3)
    assert base.finding() == "The lower layers are the base's: nothing has drifted."
    brought = DriftCurves([0.9, 0.88], [0.8, 0.8], 0.9, 0.8, 9)
    made = DriftCurves([0.99, 0.88], [0.9, 0.8], 1.0, 1.0, 9)
    assert (
        "image positions of layer 1; most of it comes in from the vision tower"
        in replace(base, image=brought).finding()
    )
    found = replace(base, text=made)
    assert "text positions of layer 1; most of it appears in the decoder" in found.finding()
    assert "5 % of the positions lie below 1.000000 and 0.800000" in found.summary()
    few = DriftCurves([1.0, 1.0], [1.0, 0.5], 1.0, 1.0, 9)
    assert replace(base, image=few).finding().startswith("Undecided")


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ([0.5, 0.1], "1 of 2 heads"),
        ([0.1, 0.1], "less than in the base"),
        ([0.25, 0.2], "Undecided"),
        ([0, 0], "does not look"),
    ],
)
def test_the_fusion_layer_has_learned_or_not(trained, said):
    assert said in FusionAttentionResult([3], [list(map(float, trained))], [[0.2, 0.2]], 4, 2).finding()


def test_one_head_among_many_that_look_away_decides_nothing():
    found = FusionAttentionResult([3], [[0.003, 0.01, 0.01]], [[0.001, 0.4, 0.4]], 4, 2).finding()
    assert found.startswith("Undecided") and "1 of 3 heads" in found and "all together less" in found


@pytest.mark.parametrize(
    ("masked", "text", "said"),
    [
        (False, False, "The projected tokens carry the text"),
        (False, True, "from tokens and transcript"),
        (True, True, "from its text and what surrounds it"),
        (True, False, "from what surrounds it alone"),
    ],
)
def test_a_probe_says_what_it_rebuilt_the_region_from(masked, text, said):
    result = object.__new__(RProbeResult)
    vars(result).update(
        settings={"masked": masked, "text": text}, mse_interval=(0.1, 0.2), constant_mse=0.5, mse=0.15, fvu=0.3
    )
    assert said in result.finding() and "30%" in result.finding()
    assert ("carry the text" in result.finding()) == (not masked and not text)


def test_maps_are_even_or_narrow_and_alike_or_not():
    def one(*rows):
        return CheckpointMaps("m", "CLS token", "whole image", 4, 8, [[list(row)] for row in rows])

    even, left, right = one([0.25] * 4), one([0.9, 0.1, 0.0, 0.0]), one([0.0, 0.0, 0.1, 0.9])
    finding = lambda *found: AttentionMapsResult(["a"], list(found)).finding()  # noqa: E731
    assert finding(even) == "Block 4 looks at the whole image alike."
    assert finding(left, left).endswith("m at the same places.") and finding(left, right).endswith("m at other places.")
    assert "about 35% of the image" in finding(left)


def test_flops_tell_the_routings_saving_from_the_last_positions():
    small = named("small")
    found = measure_flops(small, [Prompt(64)], own=(Routing(split=4), None))
    row = found.main_row()
    lean, routing = found.saved(row, "prefill"), found.saved_by_routing(row)
    assert 0 < routing < lean and f"{routing:.1%} of generation's prefill" in found.finding()
    assert f"saves the prefill another {lean - routing:.1%}" in found.finding()
    none = measure_flops(small, [Prompt(64)], split=31)  # only the last layer is left to route, which LF fuses
    assert none.saved_by_routing(none.rows[0][0]) == 0.0 and "saves nothing" in none.finding()


def steps(cosines, ratio=0.5, trains=False):
    made = [Step(i, 1.0, ratio**2, 1.0, cosine * ratio) for i, cosine in enumerate(cosines, 1)]
    return GradientsResult(made, [], Gradients(window=2, transition_windows=1), facts={"block": 6, "trains": trains})


def test_gradients_pull_against_each_other_or_the_same_way_or_neither():
    against, along = steps([-0.3, -0.2, -0.4] * 3), steps([0.3, 0.2, 0.4] * 3)
    assert "pulls against" in against.finding() and "the main one's way" in along.finding()
    assert "(95 %: -0.4 to -0.2)" in against.summary()
    assert steps([-0.3, 0.3] * 6).finding().startswith("Undecided")
    assert steps([-0.3] * 4).finding().startswith("Undecided: 4 batches are too few")  # four signs say nothing at 95 %
    assert steps([0.1], ratio=0.0).finding().startswith("Nothing passes")
    assert "from step" in steps([0.1] * 6, ratio=0.5, trains=True).finding()
    assert "never settled" in steps([0.1] * 6, ratio=2.0, trains=True).finding()
    assert "too few steps" in steps([0.1], trains=True).finding()


def test_the_interval_of_a_median_is_that_of_the_sign_test():
    assert median_interval(range(1, 11)) == (2, 9)  # 1 - 2 * 11 / 1024 is the widest that keeps 95 %
    assert median_interval([1.0] * 5) == (-math.inf, math.inf) and median_interval([1.0] * 6) == (1.0, 1.0)


def test_an_ablation_says_whether_the_region_is_read():
    said = lambda low, high: ablation.finding(  # noqa: E731
        {"effects": [{"effect": "region, with text", "mse_falls_by": 0.1, "low": low, "high": high}]}
    )
    assert said(0.05, 0.2).startswith("The tokens carry") and said(-0.1, 0.2).startswith("Undecided")
    assert said(None, None).startswith("Undecided") and said(-0.3, -0.1).startswith("The probe does worse")


def test_a_run_falls_has_levelled_off_or_was_too_short():
    wave = [0.01 * (-1) ** i for i in range(50)]
    assert _trend([5 - 0.1 * i + w for i, w in enumerate(wave)]).startswith("The loss was still falling")
    assert _trend([1 + w for w in wave]).startswith("The loss had levelled off")
    assert _trend([1 + 0.1 * i + w for i, w in enumerate(wave)]).startswith("The loss was rising")
    assert _trend([1.0] * 9).startswith("Undecided")


def test_the_page_opens_with_the_finding_and_links_its_terms(tmp_path):
    found = Found("The logit lens says 3.", finding="Take it & go.", caution="Only on <these>.")
    record = Record("saturation", "Visual saturation", "Attention mass is text's.", DONE, found=found)
    values = {
        "checkpoint": "m", "data": "d", "base": "", "date": "now", "facts": [], "settings": {}, "versions": {},
        "command": "again", "sections": [record],
    }  # fmt: skip
    text = build.write_page(values, tmp_path).read_text()
    order = [
        text.index(part)
        for part in ("Take it &amp; go.", 'The <a href="#term-2">logit lens</a> says 3.', "<b>But:</b>")
    ]
    assert order == sorted(order) and '<a href="#term-1">Attention mass</a> is text' in text and "&lt;these&gt;" in text
    assert 'id="term-2"' in text and "KL(p_final || p_layer)" in text and "FVU" not in text
