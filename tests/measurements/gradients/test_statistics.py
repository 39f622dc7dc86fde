"""Moments against stored vectors in float64, and against a linear model whose moments are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_patch.core.errors import CheckpointError
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.moments import Moments, Step
from llava_patch.measurements.gradients.result import GradientsResult
from llava_patch.measurements.gradients.statistics import Window, transition_step


def vectors(count, size=300, seed=0, mean=(0.3, -0.1)):
    generator = torch.Generator().manual_seed(seed)
    main = mean[0] + torch.randn(count, size, generator=generator)
    skip = mean[1] + 2 * torch.randn(count, size, generator=generator) - 0.3 * main
    return main, skip


def feed(window, main, skip, rates=None, first=1):
    added = [
        window.add(first + i, m, m + s, None if rates is None else rates[i])
        for i, (m, s) in enumerate(zip(main, skip, strict=True))
    ]
    return [step for step, _ in added], [moments for _, moments in added if moments is not None]


def test_running_sums_are_the_moments_of_the_stored_vectors():
    main, skip = vectors(24)
    steps, windows = feed(Window(8), main, skip, rates=[i / 100 for i in range(24)])
    assert [(w.first, w.last, w.count) for w in windows] == [(1, 8, 8), (9, 16, 8), (17, 24, 8)]
    for number, window in enumerate(windows):
        here = slice(8 * number, 8 * number + 8)
        m, f = main[here].double().numpy(), (main[here] + skip[here]).double().numpy()
        s = f - m
        close = lambda value: pytest.approx(value, rel=2e-6)  # noqa: E731  float32 vectors, sums of eight
        traces = [float(np.trace(np.cov(g, rowvar=False, bias=True))) for g in (m, s, f)]
        assert [window.main_trace, window.skip_trace, window.full_trace] == [close(t) for t in traces]
        assert window.skip_trace * window.bessel == close(float(np.trace(np.cov(s, rowvar=False))))
        assert window.main_mean == close(np.sum(m.mean(0) ** 2))
        assert window.full_mean == close(np.sum(f.mean(0) ** 2))
        mixed = np.trace((m - m.mean(0)).T @ (s - s.mean(0))) / 8
        assert window.cross == close(2 * abs(mixed))
        assert window.delta == close(2 * abs(mixed) / (traces[1] + 1e-12))
        assert window.correlation == close(abs(mixed) / math.sqrt(traces[0] * traces[1]))
        assert window.c == close(traces[1] / traces[0])
        assert window.rho == close(np.linalg.norm(s.mean(0)) / np.linalg.norm(m.mean(0)))
        assert window.alignment == np.sign(m.mean(0) @ s.mean(0))
        for path, g in (("main", m), ("skip", s), ("full", f)):
            assert window.snr(path) == close(np.sum(g.mean(0) ** 2) / np.mean(np.sum(g**2, 1)))
        pairs = [f[i] @ s[j] for i in range(8) for j in range(8) if i != j]
        assert window.gain == pytest.approx(np.mean(pairs), rel=1e-4)
        assert window.penalty == pytest.approx(np.mean(np.sum(f**2, 1) - np.sum(m**2, 1)), rel=1e-5)
        assert window.learning_rate == pytest.approx((8 * number + 3.5) / 100)
    for i, step in enumerate(steps):
        m, s = main[i].double(), (main[i] + skip[i]).double() - main[i].double()
        assert step.main == pytest.approx(float(m @ m)) and step.skip == pytest.approx(float(s @ s))
        assert step.cosine == pytest.approx(float(m @ s / m.norm() / s.norm()), abs=1e-6)
        assert step.ratio == pytest.approx(float(s.norm() / m.norm()))


class Linear(torch.nn.Module):
    """Loss <theta, a> + <theta, b>: the gradient is a over the main path and b over the skip path."""

    def __init__(self, size):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(size))

    def gradients(self, a, b):
        def grad(tap):
            return torch.autograd.grad(self.theta @ a + tap @ b, self.theta)[0]

        return grad(self.theta.detach()), grad(self.theta)


def test_the_epsilon_of_delta_is_the_papers():
    """Eq. 15: 1e-12, which is felt where the skip path hardly varies and keeps a path that does not from a division."""

    def delta(cross, trace):
        means = {"main_mean": 1.0, "skip_mean": 1.0, "mean_inner": 0.0}
        return Moments(1, 4, 4, 2.0, 1.0 + trace, 3.0, cross / 2, **means).delta

    assert delta(3e-12, 0.0) == 3e-12 / 1e-12
    assert delta(0.0, 0.0) == 0
    trace = (1.0 + 2.0**-40) - 1.0  # 9.1e-13
    assert delta(1e-12, 2.0**-40) == pytest.approx(1e-12 / (trace + 1e-12), rel=1e-9)


@pytest.mark.parametrize("linked", [False, True])
def test_a_linear_model_whose_moments_are_known(linked):
    """Main path e1 with noise +-2 on e2, skip path -e1 / 2 with noise +-3 on e3 or, linked, on e2 with main's sign."""
    model, window = Linear(3), Window(4)
    for number, (first, second) in enumerate(itertools.product((-1.0, 1.0), repeat=2), 1):
        noise = [0.0, 3 * first, 0.0] if linked else [0.0, 0.0, 3 * second]
        main = torch.tensor([1.0, 2 * first, 0.0])
        skip = torch.tensor([-0.5, 0.0, 0.0]) + torch.tensor(noise)
        _, moments = window.add(number, *model.gradients(main, skip))
    assert moments.main_trace == 4 and moments.skip_trace == 9
    assert moments.c == 9 / 4 and moments.rho == 0.5 and moments.alignment == -1
    assert moments.snr("main") == 1 / 5 and moments.snr("skip") == pytest.approx(0.25 / 9.25)
    assert moments.cross == (12 if linked else 0) and moments.delta == pytest.approx(12 / 9 if linked else 0)
    assert moments.correlation == (1 if linked else 0) and moments.delta_bound == pytest.approx(4 / 3)
    assert moments.full_trace == (25 if linked else 13)  # eq. 4
    assert moments.snr("full") == 0.25 / (0.25 + moments.full_trace)
    assert moments.penalty == (20.25 if linked else 8.25)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), size=st.integers(1, 40), count=st.integers(2, 12), scale=st.floats(-4.0, 1.0),
    mix=st.floats(-1.0, 1.0),
)  # fmt: skip
def test_delta_is_the_correlation_times_what_c_allows(seed, size, count, scale, mix):
    """However long the skip gradient is and however it goes with the main one."""
    generator, window = torch.Generator().manual_seed(seed), Window(count)
    for number in range(1, count + 1):
        main, other = torch.randn(2, size, generator=generator, dtype=torch.float64)
        _, moments = window.add(number, main, main + 10**scale * (mix * main + (1 - abs(mix)) * other))
    assert 0 <= moments.correlation <= 1 + 1e-3  # float32 sums
    assert moments.delta_bound == pytest.approx(2 / math.sqrt(moments.c))
    assert moments.delta == pytest.approx(moments.correlation * moments.delta_bound, rel=1e-3)
    if mix in (-1, 1):
        assert moments.correlation == pytest.approx(1, rel=1e-2)


def moments_of(gain, penalty):
    """Two steps with this left side of condition (7), and with what L * gamma / 2 multiplies."""
    return Moments(1, 2, 2, main_square=9.0, skip_square=0.0, full_square=9.0 + penalty, inner=0.0, main_mean=1.0,
                   skip_mean=0.0, mean_inner=gain / 2)  # fmt: skip


@pytest.mark.parametrize(
    "gain, penalty, least, most, said",
    [
        (1.0, 4.0, 0.5, math.inf, "holds where L * gamma is at least 0.5 ("),
        (-1.0, 4.0, 0.0, math.inf, "holds at every L * gamma ("),
        (-1.0, 0.0, 0.0, math.inf, "holds at every L * gamma ("),
        (-1.0, -4.0, 0.0, 0.5, "holds where L * gamma is at most 0.5 ("),
        (1.0, -4.0, math.inf, math.nan, "holds at no L * gamma ("),
        (1.0, 0.0, math.inf, math.nan, "holds at no L * gamma ("),
    ],
)
def test_where_condition_7_holds(gain, penalty, least, most, said):
    moments = moments_of(gain, penalty)
    assert moments.gain == gain and moments.penalty == penalty
    for product in (0.0, 1e-3, 0.49, 0.51, 3.0, 1e6):
        assert moments.holds(product) is (least <= product <= most)
    assert moments.product_needed == least and moments.product_limit == pytest.approx(most, nan_ok=True)
    result = GradientsResult([Step(1, 9.0, 1.0, 10.0, 0.0)], [moments], Gradients(window=2), facts={})
    assert f"The detaching condition {said}smoothness times step size; median)." in result.summary()


@pytest.mark.parametrize("along, noise, better", [(-0.5, 0.5, True), (0.8, 0.1, False), (0.2, 3.0, True)])
def test_condition_7_says_which_step_is_better_on_a_quadratic(along, noise, better):
    """On L / 2 ||theta||^2 the bound (6) is exact, so (7) holds just where leaving the skip gradient out is better."""
    smoothness, gamma, size = 2.0, 0.3, 3
    m, s = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([along, 0.0, 0.0])
    theta = (m + s) / smoothness
    generator = torch.Generator().manual_seed(0)
    window = Window(4000)
    for number in range(1, 4001):
        main = m + 0.2 * torch.randn(size, generator=generator)
        _, moments = window.add(number, main, main + s + noise * torch.randn(size, generator=generator))

    def expected(mean, variance):  # of L / 2 ||theta - gamma g||^2
        return smoothness / 2 * float((theta - gamma * mean) @ (theta - gamma * mean) + gamma**2 * size * variance)

    assert (expected(m, 0.04) <= expected(m + s, 0.04 + noise**2)) is better
    assert moments.holds(smoothness * gamma) is better
    assert moments.gain == pytest.approx(float((m + s) @ s), abs=0.15)
    assert moments.to_dict(smoothness, gamma)["condition"] is better
    assert moments.to_dict(smoothness, None)["condition"] is None and moments.to_dict(None, gamma)["condition"] is None
    needed = moments.product_needed
    assert (needed <= smoothness * gamma) is better
    if 0 < needed < math.inf:
        assert moments.holds(needed * 1.001) and not moments.holds(needed * 0.999)


def test_the_inner_product_of_condition_7_is_not_biased_by_the_noise():
    """Pure noise in the skip path: no gain, though <m + s, s> of a window's means is its variance over K."""
    generator = torch.Generator().manual_seed(0)
    window, gains, naive = Window(4), [], []
    for number in range(1, 801):
        main = torch.ones(50)
        _, moments = window.add(number, main, main + torch.randn(50, generator=generator))
        if moments is not None:
            gains.append(moments.gain)
            naive.append(moments.mean_inner + moments.skip_mean)
    assert np.mean(naive) == pytest.approx(50 / 4, rel=0.1)
    assert abs(np.mean(gains)) < 4 * np.std(gains) / len(gains) ** 0.5 < 3


def test_one_step_says_nothing_about_the_condition():
    moments = Moments(1, 1, 1, 1.0, 1.0, 2.0, 0.0, 1.0, 1.0, 0.0)
    assert moments.holds(1.0) is None and math.isnan(moments.product_needed) and math.isnan(moments.bessel)


def test_steps_that_are_not_finite_enter_no_window():
    main, skip = vectors(5)
    plain = feed(Window(4), main[[0, 1, 3, 4]], skip[[0, 1, 3, 4]])[1][0]
    main[2, 7] = math.inf
    steps, (window,) = feed(Window(4), main, skip)
    assert [s.finite for s in steps] == [True, True, False, True, True]
    assert math.isnan(steps[2].ratio) and math.isnan(steps[2].cosine)
    assert (window.first, window.last, window.count) == (1, 5, 4)
    assert window.skip_trace == plain.skip_trace and window.gain == plain.gain


def test_a_path_without_gradient():
    steps, (window,) = feed(Window(2), *(torch.ones(2, 3), torch.zeros(2, 3)))
    assert steps[0].ratio == 0 and math.isnan(steps[0].cosine)
    assert window.delta == 0 and window.rho == 0 and math.isnan(window.c) and math.isnan(window.snr("skip"))
    assert window.holds(1.0) is True and window.product_needed == 0  # nothing lost, nothing gained
    assert Step(1, 0.0, 4.0, 4.0, 0.0).ratio == math.inf


@pytest.mark.parametrize("cut", [3, 5, 10])
def test_a_window_goes_on_from_a_file(cut, tmp_path):
    main, skip = vectors(12)
    whole = feed(Window(5), main, skip, rates=[0.1] * 12)
    window = Window(5)
    before = feed(window, main[:cut], skip[:cut], rates=[0.1] * cut)
    again = Window.load(window.save(tmp_path / "window.safetensors"), 5)
    assert again.last == cut
    after = feed(again, main[cut:], skip[cut:], rates=[0.1] * (12 - cut), first=cut + 1)
    assert before[0] + after[0] == whole[0] and before[1] + after[1] == whole[1]
    with pytest.raises(CheckpointError, match=r"5 steps, but Gradients\.window = 6"):
        Window.load(tmp_path / "window.safetensors", 6)
    (tmp_path / "window.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"window\.safetensors: cannot be read as a whole"):
        Window.load(tmp_path / "window.safetensors", 5)


def run(ratios):
    return [Step(i, 1.0, r**2, 1 + r**2, 0.0) for i, r in enumerate(ratios, 1)]


def test_the_transition_is_found_where_it_was_planted():
    ratios = [2.0] * 20 + [0.5] * 40
    # A median of 5 is below 1 from the third low step on.
    assert transition_step(run(ratios), 5, 3) == 23
    assert transition_step(run(ratios), 1, 3) == 21
    assert transition_step(run([0.5] * 15), 5, 3) == 5  # below from the beginning: known once a window is full
    assert transition_step(run([2.0] * 60), 5, 3) is None
    assert transition_step([], 5, 3) is None


def test_a_transition_must_last():
    dip = [2.0] * 10 + [0.5] * 10 + [2.0] * 10 + [0.5] * 30
    assert transition_step(run(dip), 5, 1) == 13
    assert transition_step(run(dip), 5, 2) == 13  # six medians below 1 in a row, the dip has ten
    assert transition_step(run(dip), 5, 3) == 33  # eleven
    assert transition_step(run([2.0] * 10 + [0.5] * 12), 5, 3) is None  # cut short: not known yet
    assert transition_step(run([2.0] * 10 + [0.5] * 13), 5, 3) == 13


def test_steps_without_a_ratio_count_nowhere():
    ratios = [2.0] * 10 + [0.5] * 30
    steps = run(ratios)
    steps.insert(25, Step(99, math.nan, math.nan, math.nan, math.nan))
    steps.insert(0, Step(0, 0.0, 0.0, 0.0, 0.0))
    assert transition_step(steps, 5, 3) == 13
