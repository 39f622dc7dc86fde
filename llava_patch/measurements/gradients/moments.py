"""One step's numbers, and what one window of steps is made of: mathematics only.

Source: "Detached Skip-Links and R-Probe", sections 4.2 and 4.3, appendix C.2.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

PATHS = ("main", "skip", "full")
EPSILON = 1e-12
"""Added to the denominator of delta (eq. 15)."""


@dataclass(frozen=True)
class Step:
    """One measured step."""

    step: int  # number of the training step, from 1
    main: float  # squared norm of the main gradient
    skip: float  # of the skip gradient
    full: float  # of their sum
    inner: float  # inner product of main and skip gradient
    learning_rate: float | None = None  # of the measured block in this step
    full_bend: float | None = None  # <g_full, H g_full>, H the Hessian of another batch's loss; None: not measured
    main_bend: float | None = None  # <g_main, H g_main>, alike

    @property
    def finite(self) -> bool:
        """Whether the gradients were finite; steps that were not (float16) count nowhere."""
        return math.isfinite(self.main) and math.isfinite(self.skip)

    @property
    def cosine(self) -> float:
        """Cosine of main and skip gradient; NaN where one of them is zero."""
        product = math.sqrt(self.main) * math.sqrt(self.skip) if self.finite else 0.0
        return self.inner / product if product else math.nan

    @property
    def ratio(self) -> float:
        """Norm of the skip gradient over the main one's; NaN where both are zero."""
        if not self.finite or (self.main == 0 and self.skip == 0):
            return math.nan
        return math.sqrt(self.skip / self.main) if self.main else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values, cosine and ratio included."""
        return {**_known(self), "cosine": self.cosine, "ratio": self.ratio}


@dataclass(frozen=True)
class Moments:
    """What one window of K steps is made of; everything else follows. m and s are the means of g_main and g_skip."""

    first: int  # number of its first training step
    last: int  # of its last
    count: int  # measured steps K in it
    main_square: float  # mean of ||g_main||^2
    skip_square: float  # mean of ||g_skip||^2
    full_square: float  # mean of ||g_full||^2
    inner: float  # mean of <g_main, g_skip>, each within its own step
    main_mean: float  # ||m||^2
    skip_mean: float  # ||s||^2
    mean_inner: float  # <m, s>
    learning_rate: float | None = None  # mean of the steps'
    full_bend: float | None = None  # mean of <g_full, H g_full>; None: not measured in every step
    main_bend: float | None = None  # mean of <g_main, H g_main>

    @property
    def full_mean(self) -> float:
        """||m + s||^2."""
        return self.main_mean + self.skip_mean + 2 * self.mean_inner

    @property
    def main_trace(self) -> float:
        """Tr Sigma_m as published (eq. 12): mean of squares less square of the mean."""
        return self.main_square - self.main_mean

    @property
    def skip_trace(self) -> float:
        """Tr Sigma_s as published (eq. 14)."""
        return self.skip_square - self.skip_mean

    @property
    def full_trace(self) -> float:
        """Tr Sigma of the full gradient, alike."""
        return self.full_square - self.full_mean

    @property
    def bessel(self) -> float:
        """K / (K - 1): what a trace is multiplied with to be unbiased for independent steps."""
        return self.count / (self.count - 1) if self.count > 1 else math.nan

    @property
    def cross(self) -> float:
        """|tr(Sigma_ms + Sigma_ms')| (eq. 13)."""
        return 2 * abs(self.inner - self.mean_inner)

    @property
    def delta(self) -> float:
        """The cross term's share of the skip path's variance (eq. 15)."""
        return self.cross / (self.skip_trace + EPSILON)

    @property
    def c(self) -> float:
        """Variance dominance of the skip path, tr Sigma_s / tr Sigma_m (Assumption 4.2)."""
        return _over(self.skip_trace, self.main_trace)

    @property
    def correlation(self) -> float:
        """Size of the correlation of both paths' noise, |tr Sigma_ms| / sqrt(tr Sigma_m tr Sigma_s), 0 to 1.

        The cross term without the lengths: delta = 2 / sqrt(c) times this. NaN where a path has no variance.
        """
        product = math.sqrt(max(self.main_trace, 0.0)) * math.sqrt(max(self.skip_trace, 0.0))
        return self.cross / (2 * product) if product > 0 else math.nan

    @property
    def delta_bound(self) -> float:
        """The largest delta that c allows, 2 / sqrt(c), from |tr Sigma_ms|^2 <= tr Sigma_m tr Sigma_s; NaN as c is."""
        return 2 / math.sqrt(self.c) if self.c > 0 else math.nan if math.isnan(self.c) else math.inf

    @property
    def rho(self) -> float:
        """||s|| / ||m|| (Assumption 4.2)."""
        return math.sqrt(_over(max(self.skip_mean, 0.0), self.main_mean))

    @property
    def alignment(self) -> int:
        """Sign of <m, s>: -1, 0 or 1."""
        return (self.mean_inner > 0) - (self.mean_inner < 0)

    def snr(self, path: str) -> float:
        """Signal-to-noise ratio ||mean||^2 / mean ||.||^2 (eq. 5) of a path; noise gives its floor, about 1 / K."""
        return _over(getattr(self, f"{path}_mean"), getattr(self, f"{path}_square"))

    @property
    def gain(self) -> float:
        """Left side of condition (7), <m + s, s>, over pairs of different steps; NaN with one step.

        A step's own noise is in its gradient and in its skip part, so the product of the window's means is biased by
        the variance over K. Without the pairs of a step with itself it is not.
        """
        k = self.count
        if k < 2:
            return math.nan
        same = self.inner + self.skip_square  # mean of <g_full, g_skip> within a step
        return (k * (self.mean_inner + self.skip_mean) - same) / (k - 1)

    @property
    def penalty(self) -> float:
        """What L gamma / 2 multiplies in condition (7): E ||g_full||^2 - E ||g_main||^2."""
        return self.full_square - self.main_square

    def holds(self, product: float) -> bool | None:
        """Whether condition (7) holds: then a step without the skip gradient is no worse in expectation.

        `product` is L * gamma, smoothness times step size; with one step, nothing is known (None).
        """
        return None if math.isnan(self.gain) else self.gain <= product / 2 * self.penalty

    @property
    def product_needed(self) -> float:
        """The smallest L * gamma >= 0 at which condition (7) holds; infinity: none; NaN with one step."""
        if math.isnan(self.gain) or self.gain <= 0:
            return self.gain if math.isnan(self.gain) else 0.0
        return 2 * self.gain / self.penalty if self.penalty > 0 else math.inf

    @property
    def product_limit(self) -> float:
        """The largest L * gamma at which condition (7) holds; infinity: no limit; NaN: none, or one step."""
        if math.isnan(self.product_needed) or math.isinf(self.product_needed):
            return math.nan
        return math.inf if self.penalty >= 0 else 2 * self.gain / self.penalty

    @property
    def curvature(self) -> float:
        """Of the loss along the full gradient, E <g, H g> / E ||g||^2: the L of condition (7); NaN: not measured."""
        return math.nan if self.full_bend is None else _over_signed(self.full_bend, self.full_square)

    @property
    def main_curvature(self) -> float:
        """Of the loss along the main gradient, alike. Condition (7) takes one L for both."""
        return math.nan if self.main_bend is None else _over_signed(self.main_bend, self.main_square)

    @property
    def main_gain(self) -> float:
        """<m + s, m>, what a step along the main gradient gains to first order, as `gain` over different steps."""
        k = self.count
        if k < 2:
            return math.nan
        return (k * (self.mean_inner + self.main_mean) - (self.inner + self.main_square)) / (k - 1)

    @property
    def stretch(self) -> float:
        """How many times longer the full gradient is than the main one: root of E ||g_full||^2 / E ||g_main||^2."""
        return math.sqrt(_over(max(self.full_square, 0.0), self.main_square))

    def detach_gain(self, step_size: float, smoothness: float | None = None) -> float:
        """What condition (7) says that detaching gains in one plain step, E L(full step) - E L(detached step).

        gamma * (gamma * L / 2 * penalty - gain): (7) holds where it is not negative. `smoothness` is L; None: the
        curvature along the full gradient.
        """
        bound = self.curvature if smoothness is None else smoothness
        return step_size * (step_size * bound / 2 * self.penalty - self.gain)

    def detach_gain_own(self, step_size: float) -> float:
        """The same with each path's own curvature in the place of one L: the loss to second order."""
        if self.full_bend is None or self.main_bend is None:
            return math.nan
        return step_size * (step_size / 2 * (self.full_bend - self.main_bend) - self.gain)

    def same_length_gain(self, step_size: float) -> float:
        """Control: what a main gradient of the full one's length gains over the full one, with own curvatures.

        What is left of `detach_gain_own` when the detached step is no shorter.
        """
        if self.full_bend is None or self.main_bend is None:
            return math.nan
        first = self.stretch * self.main_gain - (self.main_gain + self.gain)
        return step_size * (first + step_size / 2 * (self.full_bend - self.stretch**2 * self.main_bend))

    def to_dict(self, smoothness: float | None = None, step_size: float | None = None) -> dict[str, Any]:
        """Plain values: what is stored, then what follows; `step_size` None is the window's learning rate.

        `smoothness` None is the curvature, where it was measured.
        """
        gamma = self.learning_rate if step_size is None else step_size
        bound = self.curvature if smoothness is None else smoothness
        known = gamma is not None and not math.isnan(bound)
        derived = (
            "full_mean", "main_trace", "skip_trace", "full_trace", "cross", "correlation", "delta", "delta_bound", "c",
            "rho", "alignment",
        )  # fmt: skip
        return {
            **_known(self),
            **{name: getattr(self, name) for name in derived},
            **{f"{path}_trace_debiased": getattr(self, f"{path}_trace") * self.bessel for path in PATHS},
            **{f"{path}_snr": self.snr(path) for path in PATHS},
            "snr_floor": 1 / self.count,
            **{name: getattr(self, name) for name in ("gain", "penalty", "product_needed", "product_limit")},
            "step_size": gamma,
            "condition": self.holds(bound * gamma) if known and gamma is not None else None,
            **({} if self.full_bend is None else self._curved(gamma, smoothness)),
        }

    def _curved(self, gamma: float | None, smoothness: float | None) -> dict[str, Any]:
        """What follows from the measured curvature."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("curvature", "main_curvature", "stretch")}
        if gamma is None:
            return found
        gains = {"detach_gain": self.detach_gain(gamma, smoothness), "detach_gain_own": self.detach_gain_own(gamma)}
        return {**found, **gains, "same_length_gain": self.same_length_gain(gamma)}


def _known(values: Step | Moments) -> dict[str, Any]:
    """The fields; those of the curvature only where it was measured, so that files without it are as they were."""
    return {name: value for name, value in asdict(values).items() if value is not None or not name.endswith("_bend")}


def _over_signed(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def _over(above: float, below: float) -> float:
    if below > 0:
        return above / below
    return math.nan if above <= 0 else math.inf
