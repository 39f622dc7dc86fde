"""Measures where a training step's gradient goes, on one model or under several variants of routing."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from torch import nn

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.files import track
from llava_patch.core.terminal import how_many, say_cost
from llava_patch.hosts import zero
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements.reach import gradients
from llava_patch.measurements.reach import measurement as groups
from llava_patch.measurements.reach.measurement import Part, PartReach, Reach, ReachComparison, ReachResult, SideReach
from llava_patch.patching.handle import get_handle
from llava_patch.patching.patch import patch
from llava_patch.routing.schedule import LayerMode, LayerSchedule
from llava_patch.routing.side_branch import SIDE_BRANCH
from llava_patch.settings.methods import VARIANTS, Routing

_ROLES = {
    LayerMode.STOCK: "below split",
    LayerMode.TEXT: "text only",
    LayerMode.FUSE: "fusion",
    LayerMode.RESET: "image reset",
    LayerMode.KEYS: "image keys",
}
"""What a layer of a routed model does with the image."""


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
    arrivals, side, losses = gradients.Arrivals(), gradients.SideOutput(), []
    say_cost(
        "gradient reach", how_many(samples, settings.samples), "a forward and a backward pass each", shown=progress
    )
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
    schedule = _routing(anatomy)
    return ReachResult(
        _name(anatomy),
        _parts(anatomy, asking, arrivals, len(losses)),
        _side(side, len(losses)),
        len(anatomy.layers),
        None if schedule is None else schedule.split,
        len(losses),
        sum(losses) / len(losses),
        str(next(anatomy.layers[0].parameters()).dtype).removeprefix("torch."),
        settings,
    )


def _routing(anatomy: Anatomy) -> LayerSchedule | None:
    """What the layers do where a routing is applied, else None."""
    handle = get_handle(anatomy.model)
    schedule = None if handle is None else handle.program()
    return None if schedule is None or schedule.split >= schedule.n_layers else schedule


def _name(anatomy: Anatomy) -> str:
    """The patch in a few words: "stock", "lf", "SkipLinks + lf + FastV"."""
    handle = get_handle(anatomy.model)
    if handle is None:
        return "stock"
    words = [] if handle.fusion is None else [type(handle.fusion).__name__]
    words += [] if handle.routing is None else [handle.routing.variant]
    words += [] if handle.pruning is None else [type(handle.pruning).__name__]
    return " + ".join(words) or "stock"


def _parts(anatomy: Anatomy, asking: set[str], arrivals: gradients.Arrivals, samples: int) -> tuple[PartReach, ...]:
    sizes = {name: parameter.numel() for name, parameter in anatomy.model.named_parameters()}
    members: dict[Part, list[str]] = {}
    for name, part in parts_of(anatomy).items():
        members.setdefault(part, []).append(name)
    found = []
    for part, names in members.items():
        ask = [n for n in names if n in asking]
        reached = [n for n in ask if n in arrivals.squares]
        state = groups.FROZEN if not ask else groups.NONE if not reached else groups.ZERO
        if any(n in arrivals.nonzero for n in reached):
            state = groups.NONZERO
        norm = (sum(arrivals.squares[n] for n in reached) / samples) ** 0.5
        count, asked = (sum(sizes[n] for n in some) for some in (names, ask))
        found.append(PartReach(part, count, asked, len(ask), len(reached), state, norm))
    return tuple(found)


def _side(side: gradients.SideOutput, samples: int) -> SideReach | None:
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
            place(module.parameters(), Part(groups.EMBEDDING))
        place(tower.own, Part(groups.EMBEDDING))
        for number, block in enumerate(tower.blocks, 1):
            place(block.parameters(), Part(groups.BLOCK, number))
        for module in tower.after:
            place(module.parameters(), Part(groups.AFTER))
    place(anatomy.projector.parameters(), Part(groups.PROJECTOR))
    stack = getattr(anatomy.projector_owner, anatomy.stack_name, None)
    if stack is not None:
        place(stack.parameters(), Part(groups.STACK))
    place(anatomy.embed_tokens.parameters(), Part(groups.TOKENS))
    schedule = _routing(anatomy)
    for number, layer in enumerate(anatomy.layers):
        role = "" if schedule is None else _ROLES[schedule.modes[number]]
        place(layer.parameters(), Part(groups.LAYER, number, role))
    for number, layer in enumerate(getattr(anatomy.decoder, SIDE_BRANCH, [])):
        place(layer.parameters(), Part(groups.SIDE, number))
    place(anatomy.norm.parameters(), Part(groups.NORM))
    place(anatomy.lm_head.parameters(), Part(groups.HEAD))
    order = {part: place for place, part in enumerate(dict.fromkeys(places.values()))}
    found = {n: places.get(id(p), Part(groups.OTHER)) for n, p in anatomy.model.named_parameters()}
    named = {
        name: Part(part.kind + groups.LORA, part.number, part.role) if "lora_" in name else part
        for name, part in found.items()
    }
    names = sorted(named, key=lambda n: (order.get(found[n], len(order)), named[n].kind))  # stable within a part
    return {name: named[name] for name in names}


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
        own = {k: v for k, v in routing.items() if name == groups.LF or (name != "vtw" and k != "fusion_layers")}
        with patch(model, routing=Routing(variant=name, split=split, **own)):
            results.append(measure_reach(model, samples(), settings, progress))
    return ReachComparison(tuple(results))
