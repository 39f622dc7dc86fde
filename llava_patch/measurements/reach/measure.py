"""Measures where a training step's gradient goes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import nn

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.files import track
from llava_patch.hosts import zero
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements.reach import gradients, groups
from llava_patch.measurements.reach.gradients import Arrivals, SideOutput
from llava_patch.measurements.reach.groups import Part
from llava_patch.measurements.reach.result import FROZEN, NONE, NONZERO, ZERO, PartReach, ReachResult, SideReach
from llava_patch.measurements.reach.settings import Reach
from llava_patch.patching.handle import get_handle


def measure_reach(
    model: Any, samples: Iterable[dict[str, Any]], settings: Reach | None = None, progress: bool = True
) -> ReachResult:
    """Which parameters get a gradient, and through which layers the side branch's output does.

    One forward and one backward pass a sample, in training mode (FastV prunes only where `FastV.training` says so) and
    without gradient checkpointing. A gradient is dropped as soon as its norm is known, so that memory holds the
    activations and one gradient. The model is afterwards as it was: flags, gradients, training mode, random state.

    Args:
        model: a host model, stock or patched.
        samples: keyword arguments of its forward, with labels: of `Inputs.training_inputs` or a data loader.
        settings: how many samples, and whether every parameter is asked.
        progress: show a progress bar.

    Raises:
        InputError: no samples, one without labels, or a loss or gradient that is not finite.
        SettingError: DeepSpeed ZeRO-3 has partitioned the weights.
    """
    settings = settings or Reach()
    anatomy = find(model)
    if zero.is_partitioned(anatomy.model.parameters()):
        raise SettingError(
            "the model's weights are partitioned by DeepSpeed ZeRO-3, where gradients are not seen whole: measure a "
            "checkpoint outside DeepSpeed"
        )
    arrivals, side, losses = Arrivals(), SideOutput(), []
    with gradients.training_step(anatomy, settings.everything):
        parameters = dict(anatomy.model.named_parameters())
        asking = {name for name, parameter in parameters.items() if parameter.requires_grad}
        for sample in track(islice(samples, settings.samples), "gradient reach", progress):
            with gradients.listening(parameters, arrivals):
                losses.append(gradients.backward(anatomy.model, sample, side))
            arrivals.collect()
            side.arrivals.collect()
    if not losses:
        raise InputError("gradient reach: no samples to measure on")
    handle = get_handle(anatomy.model)
    split = None if handle is None else handle.program().split
    return ReachResult(
        name_of(anatomy),
        _parts(groups.parts_of(anatomy), parameters, asking, arrivals, len(losses)),
        _side(side, len(losses)),
        len(anatomy.layers),
        split if split is not None and split < len(anatomy.layers) else None,
        len(losses),
        sum(losses) / len(losses),
        str(next(anatomy.layers[0].parameters()).dtype).removeprefix("torch."),
        settings,
    )


def name_of(anatomy: Anatomy) -> str:
    """The patch in a few words: "stock", "lf", "SkipLinks + lf + FastV"."""
    handle = get_handle(anatomy.model)
    if handle is None:
        return "stock"
    words = [] if handle.fusion is None else [type(handle.fusion).__name__]
    if handle.routing is not None:
        words.append(handle.routing.variant)
    return " + ".join(words + ([] if handle.pruning is None else [type(handle.pruning).__name__])) or "stock"


def _parts(
    named: dict[str, Part], parameters: dict[str, nn.Parameter], asking: set[str], arrivals: Arrivals, samples: int
) -> tuple[PartReach, ...]:
    members: dict[Part, list[str]] = {}
    for name, part in named.items():
        members.setdefault(part, []).append(name)
    found = []
    for part, names in members.items():
        ask = [n for n in names if n in asking]
        reached = [n for n in ask if n in arrivals.squares]
        state = FROZEN if not ask else NONE if not reached else ZERO
        if any(n in arrivals.nonzero for n in reached):
            state = NONZERO
        norm = (sum(arrivals.squares[n] for n in reached) / samples) ** 0.5
        count = sum(parameters[n].numel() for n in names)
        asked = sum(parameters[n].numel() for n in ask)
        found.append(PartReach(part, count, asked, len(ask), len(reached), state, norm))
    return tuple(found)


def _side(side: SideOutput, samples: int) -> SideReach | None:
    if not side.seen:
        return None
    squares, nonzero = side.arrivals.squares, side.arrivals.nonzero
    layers = sorted(key for key in squares if isinstance(key, int))
    norms = {layer: (squares[layer] / samples) ** 0.5 for layer in layers}
    whole = (squares[side.WHOLE] / samples) ** 0.5 if side.WHOLE in squares else None
    return SideReach(whole, norms, tuple(layer for layer in layers if layer in nonzero))
