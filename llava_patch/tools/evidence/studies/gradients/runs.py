"""Gradients whose statistics are known: planted moments, a planted loss, and planted taps in a real model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import llava_patch
from llava_patch import SkipLinks
from llava_patch.measurements.gradients.decompose import decompose
from llava_patch.measurements.gradients.moments import Moments
from llava_patch.measurements.gradients.statistics import Window
from llava_patch.tools.evidence.small.model import Text, Vision, build
from llava_patch.tools.evidence.statistics import short
from llava_patch.tools.evidence.study import Context, Run

SIZE, STEPS, WINDOWS = 400, 64, 12
NOISE = 4.0  # trace of the main noise's covariance; the main mean's square is 1
STEP = 0.4


@dataclass(frozen=True)
class Planted:
    """Means and covariances of a main and a skip gradient, and a loss whose Hessian is diagonal.

    Attributes:
        c: variance dominance, tr Sigma_s / tr Sigma_m.
        cosine: of both means.
        rho: length of the skip mean over the main mean's, which is 1.
        correlation: of both paths' noise, so that delta is 2 |correlation| / sqrt(c).
        even: whether the loss curves as much in every direction; else only where the main path's noise is, so that the
            one L of condition (7), which is taken along the full gradient, is not the main path's.
    """

    c: float
    cosine: float
    rho: float
    correlation: float
    even: bool = True

    def known(self) -> dict[str, float]:
        """What the instrument must find; the SNR with its floor, as a window of K steps has it."""
        main, skip = 1 + NOISE, self.rho**2 + self.c * NOISE
        joint = self.correlation * math.sqrt(self.c) * NOISE
        full_mean = 1 + self.rho**2 + 2 * self.cosine * self.rho
        full_noise = NOISE * (1 + self.c) + 2 * joint
        return {
            "c": self.c,
            "delta": 2 * abs(self.correlation) / math.sqrt(self.c),
            "cosine": (self.cosine * self.rho + joint) / math.sqrt(main * skip),
            "snr_main": (1 + NOISE / STEPS) / main,
            "snr_skip": (self.rho**2 + self.c * NOISE / STEPS) / skip,
            "snr_full": (full_mean + full_noise / STEPS) / (full_mean + full_noise),
        }

    def hessian(self) -> Tensor:
        """Diagonal [SIZE]: 1 everywhere, or 1 in the first half and 0.05 in the second, where skip noise alone is."""
        found = torch.ones(SIZE)
        if not self.even:
            found[SIZE // 2 :] = 0.05
        return found

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Main and skip gradients of some batches, [count, SIZE] each."""
        half = SIZE // 2
        scale = math.sqrt(NOISE / half)
        main = torch.zeros(count, SIZE)
        main[:, :half] = scale * torch.randn(count, half, generator=generator)
        own = torch.zeros(count, SIZE)
        own[:, half:] = scale * torch.randn(count, half, generator=generator)
        skip = math.sqrt(self.c) * (self.correlation * main + math.sqrt(1 - self.correlation**2) * own)
        main[:, 0] += 1
        skip[:, 0] += self.rho * self.cosine
        skip[:, 1] += self.rho * math.sqrt(1 - self.cosine**2)
        return main, skip


CASES = (
    Planted(9.0, 0.0, 0.3, 0.1),  # the paper's picture
    Planted(9.0, -0.5, 0.5, 0.0),
    Planted(0.1, 0.6, 0.4, 0.5),  # what a projector trained with its taps shows
    Planted(0.25, 0.9, 1.5, 0.2),
    Planted(4.0, 0.3, 1.0, 0.3, even=False),
)


def analytic(context: Context) -> dict[str, Any]:
    """What the windows find of each case, with pairs mixed up beside, and steps on a loss that is known."""
    generator = torch.Generator().manual_seed(1000 + context.seed)
    return {"seed": context.seed, "cases": [_case(one, generator) for one in CASES]}


def _case(planted: Planted, generator: torch.Generator) -> dict[str, Any]:
    windows = list(_windows(planted, generator))
    names = ("c", "delta")
    found: dict[str, list[float]] = {name: [getattr(w, name) for w in windows] for name in names}
    found["cosine"] = [w.inner / math.sqrt(w.main_square * w.skip_square) for w in windows]
    found |= {f"snr_{path}": [w.snr(path) for w in windows] for path in ("main", "skip", "full")}
    mixed = [w.delta for w in _windows(planted, generator, mixed=True)]
    return {
        "planted": {**vars(planted), "known": {k: short(v) for k, v in planted.known().items()}},
        "found": {name: [short(v) for v in values] for name, values in found.items()},
        "delta_of_mixed_pairs": [short(v) for v in mixed],
        "gain": _steps(planted, windows, generator),
    }


def _windows(planted: Planted, generator: torch.Generator, mixed: bool = False) -> Iterator[Moments]:
    """Complete windows; `mixed` gives each main gradient the skip gradient of another step."""
    window, hessian = Window(STEPS), planted.hessian()
    for _ in range(WINDOWS):
        main, skip = planted.draw(STEPS, generator)
        for number, (m, s) in enumerate(zip(main, skip.roll(1, 0) if mixed else skip, strict=True), 1):
            f = m + s
            bends = float((f * hessian) @ f), float((m * hessian) @ m)
            moments = window.add(number, m, f, bends=bends)[1]
        assert moments is not None
        yield moments


def _steps(planted: Planted, windows: list[Moments], generator: torch.Generator) -> dict[str, Any]:
    """What detaching gains in steps on other batches, and what the windows predict of it."""
    main, skip = planted.draw(2000, generator)
    slope, hessian = torch.zeros(SIZE), planted.hessian()
    slope[0], slope[1] = 1 + planted.rho * planted.cosine, planted.rho * math.sqrt(1 - planted.cosine**2)

    def change(step: Tensor) -> Tensor:  # of the loss, [batches]
        return -STEP * step @ slope + STEP**2 / 2 * (step.square() @ hessian)

    gains = change(main + skip) - change(main)
    return {
        "measured": short(float(gains.mean())),
        "error": short(float(gains.std() / math.sqrt(len(gains)))),
        "by_condition": [short(w.detach_gain(STEP)) for w in windows],
        "by_own_curvatures": [short(w.detach_gain_own(STEP)) for w in windows],
    }


def paths(context: Context, scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)) -> dict[str, Any]:
    """A real model and a loss that is linear in what the projector's first layer gives: the skip gradient is known.

    It is as many times longer as the columns of the taps are larger, and the main one stays. The decomposition goes
    through the tower's own blocks and taps, as it does in training.
    """
    model = build(Vision(image=56, patch=14, layers=8), Text(16, layers=1), 3, context.seed).to(context.device)
    taps = SkipLinks(layers=(2, 4, 6), detach=0)
    with llava_patch.patch(model, fusion=taps, zero_start=False) as handle:
        first = handle.anatomy.first_linear()[2]
        generator = torch.Generator().manual_seed(context.seed)
        own = first.in_features // 4
        weight = torch.randn(first.weight.shape, generator=generator).to(first.weight)
        wanted = torch.randn(first.out_features, generator=generator).to(first.weight)
        pixels = torch.randn(4, 3, 56, 56, generator=generator).to(first.weight)
        seen: list[Tensor] = []
        hook = first.register_forward_hook(lambda module, args, output: seen.append(output))

        def loss() -> Tensor:
            seen.clear()
            ids = torch.tensor([[1, *[3] * 16, 5]], device=context.device).expand(4, -1)
            model(input_ids=ids, pixel_values=pixels, use_cache=False)
            return (seen[0] @ wanted).mean()

        rows = []
        for scale in scales:
            with torch.no_grad():
                first.weight.copy_(weight)
                first.weight[:, own:] *= scale
            main, full = decompose(model, loss, 2)
            lengths = {"main": short(float(main.norm())), "skip": short(float((full - main).norm()))}
            rows.append({"scale": scale, **lengths})
        hook.remove()
    return {"seed": context.seed, "rows": rows}


RUNS = (
    Run("analytic", analytic, quick=True, seconds=5),
    Run("paths", paths, quick=True, seconds=2),
)
