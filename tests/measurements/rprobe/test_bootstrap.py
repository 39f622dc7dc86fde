import itertools

import numpy as np
import pytest

from llava_patch.core.errors import InputError
from llava_patch.measurements.rprobe.bootstrap import interval, paired, unlike


def record(document, mse, tokens, number=0, **more):
    return {"id": f"{document}-{number}", "document": document, "mse": mse, "tokens": tokens, "text": "t", **more}


def test_interval_is_the_percentile_of_every_possible_draw():
    # Three documents have 27 equally likely draws: the interval can be counted out by hand.
    documents = [record("a", 1.0, 1), record("a", 4.0, 2, 1), record("b", 2.0, 5), record("c", 7.0, 2)]
    sums, tokens = {"a": 9.0, "b": 10.0, "c": 14.0}, {"a": 3, "b": 5, "c": 2}
    draws = [
        sum(sums[d] for d in chosen) / sum(tokens[d] for d in chosen) for chosen in itertools.product("abc", repeat=3)
    ]
    low, high = interval(documents, 20000, seed=0)
    # 2.5 % of 27 draws falls on the extremes, (b, b, b) and (c, c, c), each of probability 1/27.
    assert (low, high) == pytest.approx((min(draws), max(draws)))
    assert (low, high) == pytest.approx((2.0, 7.0))


def test_documents_are_drawn_not_regions():
    rng = np.random.default_rng(0)
    level = rng.normal(1.0, 0.3, 20)
    # Ten regions of a document say the same: an interval over regions would be sqrt(10) narrower.
    documents = [record(str(d), level[d], 4, i) for d in range(20) for i in range(10)]
    low, high = interval(documents, 4000, seed=0)
    expected = 2 * 1.96 * level.std() / np.sqrt(20)
    assert high - low == pytest.approx(expected, rel=0.08)
    single = interval([record(str(d), level[d], 4) for d in range(20)], 4000, seed=0)
    assert (low, high) == pytest.approx(single)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        tokens = rng.integers(5, 50, 60)
        mse = rng.gamma(4.0, 0.25, 60)  # of mean 1, independent of the tokens: the ratio's truth is 1
        found = interval([record(str(i), m, t) for i, (m, t) in enumerate(zip(mse, tokens))], 400, seed=trial)
        covered += found[0] < 1 < found[1]
    assert 0.90 <= covered / 300 <= 0.98


def test_fvu_interval_draws_error_and_variance_together():
    rng = np.random.default_rng(2)
    hard = rng.gamma(2.0, 1.0, 40)
    documents = [record(str(i), 0.5 * h, 10, variance=h) for i, h in enumerate(hard)]
    assert interval(documents, 500, 0, relative_to="variance") == pytest.approx((0.5, 0.5))
    low, high = interval(documents, 500, 0)
    assert high - low > 0.2


def test_paired_difference_and_its_interval():
    rng = np.random.default_rng(3)
    hard = rng.gamma(2.0, 1.0, 200)
    tokens = rng.integers(1, 9, 200)
    a = [record(str(i), hard[i] + 0.01, int(tokens[i])) for i in range(200)]
    b = [record(str(i), hard[i], int(tokens[i])) for i in range(200)][::-1]
    value, low, high = paired(a, b, 500, 0)
    assert (value, low, high) == pytest.approx((0.01, 0.01, 0.01))  # hardness cancels, which it would not unpaired
    assert paired(b, a, 500, 0)[0] == pytest.approx(-0.01)
    c = [{**s, "mse": s["mse"] + rng.normal(0.0, 0.2)} for s in b]
    value, low, high = paired(a, c, 2000, 0)
    by_id = {s["id"]: s for s in c}
    gaps = np.array([s["mse"] - by_id[s["id"]]["mse"] for s in a])
    assert value == pytest.approx((gaps * tokens).sum() / tokens.sum())
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 * np.sqrt((tokens**2).sum()) / tokens.sum(), rel=0.2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s[:-1], "1 of 3 held-out samples are only in the first result .*'2-0'"),
        (lambda s: [*s, record("new", 1.0, 1)], "only in the second result .*'new-0'"),
        (lambda s: [*s[:-1], {**s[-1], "tokens": 9}], "'2-0' has target tokens 4 in one and 9 in the other"),
        (lambda s: [*s[:-1], {**s[-1], "text": "u"}], "'2-0' has text 't' in one and 'u'"),
        (lambda s: [*s, s[0]], "'0-0' is there twice"),
    ],
)
def test_other_samples_are_refused_by_name(change, message):
    samples = [record(str(i), 1.0, 4) for i in range(3)]
    assert unlike(samples, samples[::-1]) is None
    with pytest.raises(InputError, match=message):
        paired(samples, change(samples), 100, 0)


def test_one_document_has_no_interval():
    one = [record("a", 1.0, 2), record("a", 4.0, 1, 1)]
    assert interval(one, 100, 0) is None
    assert paired(one, [{**s, "mse": 1.0} for s in one], 100, 0) == (pytest.approx(1.0), None, None)
    with pytest.raises(InputError, match="no held-out sample"):
        interval([], 100, 0)
    with pytest.raises(InputError, match="no number 'variance'"):
        interval(one, 100, 0, relative_to="variance")


def test_same_seed_same_interval_and_thousands_of_documents_are_quick():
    import time

    rng = np.random.default_rng(4)
    many = [record(str(i), m, 5) for i, m in enumerate(rng.gamma(2.0, 1.0, 5000))]
    began = time.process_time()
    first = interval(many, 2000, 7)
    assert time.process_time() - began < 5
    assert first == interval(many, 2000, 7)
    assert first != interval(many, 2000, 8)
