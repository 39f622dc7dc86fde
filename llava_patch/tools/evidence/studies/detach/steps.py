"""One plain gradient step of the whole tower, taken: what detaching gains in it, and what was predicted."""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava_patch import SkipLinks
from llava_patch.measurements.gradients.curvature import bends, moved
from llava_patch.measurements.gradients.decompose import block_parameters, decompose
from llava_patch.measurements.gradients.moments import Moments, Step
from llava_patch.measurements.gradients.statistics import Window
from llava_patch.tools.evidence.small import digits
from llava_patch.tools.evidence.statistics import short
from llava_patch.tools.evidence.studies.detach.starts import IMAGES, TAPS, Start, begin
from llava_patch.tools.evidence.study import Context

WHOLE, FIRST = 0, TAPS[0]  # the tower, and its first tapped block, which the paper looks at
GAMMAS = (0.01, 0.1, 0.3)
AFTER = (0, 20, 60)  # steps of joint training
POPULATION = 64  # images; they are all that the loss is a mean of
PREDICTED, MEASURED = 8, 6  # batches
DISTANCE = 0.001
RATE = 1e-3

Batch = dict[str, Any]


def one_step(
    context: Context, start: Start, moments: Sequence[int] = AFTER, gammas: Sequence[float] = GAMMAS
) -> dict[str, Any]:
    """Condition (7) at a start, and after some steps of joint training from there.

    The loss is the mean over a fixed population, of which the batches are drawn, so that it is exactly what their
    gradients estimate. Predictions come from other batches than the steps.
    """
    model, handle = begin(context, start, SkipLinks(layers=TAPS, detach=0, train_tower="all"))
    generator = torch.Generator().manual_seed(700 + context.seed)
    drawn = digits.draw(IMAGES, 60 + context.seed, held_out=False)
    everyone = drawn.batch(torch.arange(POPULATION), wrong=start.wrong, generator=generator, device=context.device)
    windows, done = [], 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for after in (round(step * min(1.0, context.size.scale)) for step in moments):
        model.requires_grad_(True)
        for step in range(done, after):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 10)
            index = torch.randint(len(drawn), (start.batch,), generator=generator)
            optimizer.zero_grad(set_to_none=True)
            model(**drawn.batch(index, wrong=start.wrong, generator=generator, device=context.device)).loss.backward()
            optimizer.step()
        done = after
        windows.append({"after": after, **_window(model, everyone, start.batch, gammas, generator)})
    handle.remove()
    return {"seed": context.seed, "start": vars(start), "windows": windows}


def _window(
    model: Any, everyone: Batch, size: int, gammas: Sequence[float], generator: torch.Generator
) -> dict[str, Any]:
    model.requires_grad_(False)
    population = len(everyone["input_ids"])

    def batch() -> Batch:
        index = torch.randint(population, (size,), generator=generator).to(everyone["input_ids"].device)
        return {name: value[index] if isinstance(value, Tensor) else value for name, value in everyone.items()}

    predicted = [batch() for _ in range(PREDICTED)]
    tower, block, cosines = _statistics(model, predicted)
    pairs = [decompose(model, partial(_tensor, model, batch()), WHOLE) for _ in range(MEASURED)]
    at = _loss(model, everyone)
    return {
        "loss": short(at),
        "tower": {**_figures(tower), "cosine": short(statistics.median(s.cosine for s in cosines[0]))},
        "block": {**_figures(block), "cosine": short(statistics.median(s.cosine for s in cosines[1]))},
        "cells": [_cell(model, everyone, tower, pairs, gamma) for gamma in gammas],
    }


def _statistics(model: Any, batches: list[Batch]) -> tuple[Moments, Moments, tuple[list[Step], list[Step]]]:
    """Of the whole tower, with the curvature along each batch's gradients on the batch after it, and of one block."""
    whole, one = Window(len(batches)), Window(len(batches))
    place = _block_in_tower(model)
    steps: tuple[list[Step], list[Step]] = ([], [])
    for number, batch in enumerate(batches, 1):
        other = batches[number % len(batches)]
        main, full = decompose(model, partial(_tensor, model, batch), WHOLE)
        along, across = bends(model, partial(_tensor, model, other), WHOLE, (full, main), DISTANCE)
        step, tower = whole.add(number, main, full, bends=(along, across))
        steps[0].append(step)
        step, block = one.add(number, main[place], full[place])
        steps[1].append(step)
    assert tower is not None and block is not None
    return tower, block, steps


def _block_in_tower(model: Any) -> Tensor:
    """Where the first tapped block's values are in a vector over the tower, bool."""
    inside = {id(p) for p in block_parameters(model, FIRST).values()}
    parts = [torch.full((p.numel(),), id(p) in inside) for p in block_parameters(model, WHOLE).values()]
    return torch.cat(parts).to(next(model.parameters()).device)


def _cell(
    model: Any, everyone: Batch, moments: Moments, pairs: list[tuple[Tensor, Tensor]], gamma: float
) -> dict[str, float]:
    """Steps of one size: gains over the full step with their standard errors, and predictions."""
    gains: dict[str, list[float]] = {"gain": [], "same": []}
    for main, full in pairs:
        with moved(model, WHOLE, -gamma * full):
            fused = _loss(model, everyone)
        for name, step in (("gain", main), ("same", moments.stretch * main)):
            with moved(model, WHOLE, -gamma * step):
                gains[name].append(fused - _loss(model, everyone))
    found = {"gamma": gamma}
    for name, values in gains.items():
        found[name] = short(statistics.fmean(values))
        found[f"{name}_error"] = short(statistics.stdev(values) / math.sqrt(len(values)))
    return {
        **found,
        "predicted": short(moments.detach_gain(gamma)),
        "predicted_own": short(moments.detach_gain_own(gamma)),
        "predicted_same": short(moments.same_length_gain(gamma)),
    }


def _figures(moments: Moments) -> dict[str, float]:
    names = ("c", "rho", "delta", "gain", "penalty", "curvature", "main_curvature", "stretch")
    found = {name: short(getattr(moments, name)) for name in names if not math.isnan(getattr(moments, name))}
    return {**found, **{f"snr_{path}": short(moments.snr(path)) for path in ("main", "skip", "full")}}


def _tensor(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@torch.no_grad()
def _loss(model: Any, batch: Batch) -> float:
    return float(_tensor(model, batch))
