import numpy as np
import pytest
import scipy.stats
import torch

from llava_patch.tools.evidence import report, statistics, study
from llava_patch.tools.evidence.findings import FAILS, HOLDS, UNDECIDED, Effect, Finding

ABOVE, BELOW, ACROSS = Effect(0.2, 0.1, 0.3), Effect(-0.2, -0.3, -0.1), Effect(0.0, -0.1, 0.1)


def finding(*effect, **others):
    return Finding("claim", "source", "measured", effect, "control", **{"passed": True, **others})


@pytest.mark.parametrize(
    "effect, others, verdict, why",
    [
        ((ABOVE,) * 3, {}, HOLDS, ""),
        ((BELOW,) * 3, {}, FAILS, ""),
        ((ABOVE, ABOVE, ACROSS), {}, UNDECIDED, "interval holds 0"),
        ((ABOVE, ABOVE, BELOW), {}, UNDECIDED, "seeds disagree"),
        ((ABOVE,) * 3, {"least": 0.15}, UNDECIDED, "interval holds 0.15"),
        ((ABOVE,) * 3, {"least": 0.4}, FAILS, ""),
        ((ABOVE,) * 2, {}, UNDECIDED, "2 of at least 3 seeds"),
        ((), {}, UNDECIDED, "0 of at least 3 seeds"),
        ((ABOVE,) * 3, {"passed": False}, UNDECIDED, "control"),
        ((ABOVE,) * 3, {"gate": "stock reads 0.6"}, UNDECIDED, "stock reads 0.6"),
    ],
)
def test_one_rule_gives_every_verdict(effect, others, verdict, why):
    found = finding(*effect, **others)
    assert found.verdict == verdict and why in found.why and bool(found.why) == (verdict == UNDECIDED)


@pytest.mark.parametrize("count", [1, 7, 8, 300])
def test_rows_come_back_as_they_were_packed(count):
    rows = torch.rand(count, generator=torch.Generator().manual_seed(count)) > 0.5
    assert torch.equal(statistics.unpack_bits(statistics.pack_bits(rows)), rows)
    assert statistics.share(statistics.pack_bits(rows)) == rows.float().mean().item()


def test_an_interval_is_that_of_the_normal_law_where_it_applies():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2000, generator=generator) < p for p in (0.8, 0.7))
    found = statistics.paired(statistics.pack_bits(a), statistics.pack_bits(b))
    gap = (a.double() - b.double()).numpy()
    half = 1.96 * gap.std(ddof=1) / np.sqrt(len(gap))
    assert found.value == pytest.approx(gap.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)  # 4,000 draws: a percentile is known to 3 %


def test_a_difference_is_taken_over_the_chosen_rows_of_the_same_samples():
    a, b = (statistics.pack_bits(torch.tensor(rows)) for rows in ([True, True, False], [False, True, True]))
    assert statistics.paired(a, b).value == 0
    assert statistics.paired(a, b, torch.tensor([True, True, False])).value == 0.5
    with pytest.raises(ValueError, match="not the same samples"):
        statistics.paired(a, statistics.pack_bits(torch.ones(4, dtype=torch.bool)))


def test_rank_correlation_is_spearmans_with_ties():
    a, b = [1.0, 2.0, 2.0, 4.0, 5.0, 3.0], [2.0, 1.0, 3.0, 5.0, 5.0, 2.0]
    found = statistics.rank_correlation(a, b)
    assert found.value == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert -1 <= found.low < found.value < found.high <= 1
    assert statistics.rank_correlation(a, a).low == 1


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_study_of_which_nothing_was_run_says_so_and_draws_nothing(name):
    values = {"runs": {}, "seeds": 3}
    (section,) = [section for section in report.sections(values) if section.study.name == name]
    assert section.findings == [] and section.lacking.startswith("not whole: ")
    assert report.figures_of(section.study, values) == {}
