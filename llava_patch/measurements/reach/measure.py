"""Measures where a training step's gradient goes, on one model or under several variants of routing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from torch import nn

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.files import track
from llava_patch.hosts import zero
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements.reach import gradients
from llava_patch.measurements.reach.gradients import Arrivals, SideOutput
from llava_patch.measurements.reach.result import (
    AFTER,
    BLOCK,
    EMBEDDING,
    FROZEN,
    HEAD,
    LAYER,
    LF,
    LORA,
    NONE,
    NONZERO,
    NORM,
    OTHER,
    PROJECTOR,
    SIDE,
    STACK,
    TOKENS,
    ZERO,
    Part,
    PartReach,
    Reach,
    ReachComparison,
    ReachResult,
    SideReach,
)  # fmt: skip
from llava_patch.patching.handle import get_handle
from llava_patch.patching.patch import patch
from llava_patch.routing.schedule import Work
from llava_patch.routing.side_branch import SIDE_BRANCH
from llava_patch.settings.methods import VARIANTS, Routing

_ROLES = {
    Work.TEXT: "text only", Work.FUSE: "fusion", Work.RESET: "image reset", Work.KEYS: "image keys", Work.STOCK: "",
}  # fmt: skip


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
        _parts(parts_of(anatomy), parameters, asking, arrivals, len(losses)),
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
    return " + ".join(words + ([] if handle.pruning is None else ["FastV"])) or "stock"


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


def parts_of(anatomy: Anatomy) -> dict[str, Part]:
    """The part of every parameter, by name, in the model's order from the image to the head."""
    places: dict[int, Part] = {}

    def place(parameters: Iterable[nn.Parameter], part: Part) -> None:
        for parameter in parameters:
            places.setdefault(id(parameter), part)

    if anatomy.vision_model is not None:
        tower = anatomy.vision_parts()
        for module in tower.before:
            place(module.parameters(), Part(EMBEDDING))
        place(tower.own, Part(EMBEDDING))
        for number, block in enumerate(tower.blocks, 1):
            place(block.parameters(), Part(BLOCK, number))
        for module in tower.after:
            place(module.parameters(), Part(AFTER))
    place(anatomy.projector.parameters(), Part(PROJECTOR))
    stack = getattr(anatomy.projector_owner, anatomy.stack_name, None)
    if stack is not None:
        place(stack.parameters(), Part(STACK))
    place(anatomy.embed_tokens.parameters(), Part(TOKENS))
    roles = roles_of(anatomy)
    for number, layer in enumerate(anatomy.layers):
        place(layer.parameters(), Part(LAYER, number, roles[number]))
    for number, layer in enumerate(getattr(anatomy.decoder, SIDE_BRANCH, [])):
        place(layer.parameters(), Part(SIDE, number))
    place(anatomy.norm.parameters(), Part(NORM))
    place(anatomy.lm_head.parameters(), Part(HEAD))
    order = {part: place for place, part in enumerate(dict.fromkeys(places.values()))}
    found = {n: places.get(id(p), Part(OTHER)) for n, p in anatomy.model.named_parameters()}
    named = {
        name: Part(part.kind + LORA, part.number, part.role) if "lora_" in name else part
        for name, part in found.items()
    }
    names = sorted(named, key=lambda n: (order.get(found[n], len(order)), named[n].kind))  # stable within a part
    return {name: named[name] for name in names}


def roles_of(anatomy: Anatomy) -> list[str]:
    """What each decoder layer does with the image; see `Part.role`."""
    handle = get_handle(anatomy.model)
    layers = len(anatomy.layers)
    if handle is None or handle.program().split >= layers:
        return [""] * layers
    program = handle.program()
    return ["below split" if i < program.split else _ROLES[program.work[i]] for i in range(layers)]


def compare_reach(
    model: Any,
    samples: Callable[[], Iterable[dict[str, Any]]],
    variants: Sequence[str],
    split: int,
    settings: Reach | None = None,
    progress: bool = True,
    **routing: Any,
) -> ReachComparison:
    """Route a model in one way after the other and measure each; the model is afterwards as it was.

    The side branch starts as a copy of the layers from the split on, so this compares the variants at the beginning of
    training.

    Args:
        model: a host model that is not routed.
        samples: makes the same samples for every variant.
        variants: names, as `Routing.variant` takes them.
        split: first routed layer.
        settings: as `measure_reach` takes them.
        progress: show progress bars.
        routing: other settings of `Routing`, for the variants that take them.

    Raises:
        SettingError: the model is routed already, a variant is not known, or the split does not fit.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants or len(set(variants)) != len(variants):
        raise SettingError(f"variants = {', '.join(variants)}: expected different ones of {', '.join(VARIANTS)}")
    handle = get_handle(find(model).model)
    if handle is not None and handle.routing is not None:
        raise SettingError(
            f"the model is routed already ({handle.routing}), and the variants are to be compared on one that is not: "
            "leave --variants out, or measure the checkpoint that it was trained from"
        )
    results = []
    for name in variants:
        own = {k: v for k, v in routing.items() if name == LF or k != "fusion_layers"}
        own = {} if name == "vtw" else own
        with patch(model, routing=Routing(variant=name, split=split, **own)):
            results.append(measure_reach(model, samples(), settings, progress))
    return ReachComparison(tuple(results))
