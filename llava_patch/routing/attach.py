"""How routing and pruning attach to a host model."""

from __future__ import annotations

from llava_patch.core.undo import UndoStack
from llava_patch.hosts import compat
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing import side_branch
from llava_patch.routing.forward import RoutedForward
from llava_patch.routing.schedule import LayerMode, LayerSchedule
from llava_patch.settings.methods import Routing


def attach(anatomy: Anatomy, schedule: LayerSchedule, undo: UndoStack) -> None:
    """Route and prune image tokens of a host model; a schedule that does nothing changes nothing.

    Modifications: the decoder's instance attribute `forward`; with a side branch a ModuleList `side_branch` on the
    decoder; where masks are needed that flash attention does not know (the KV variant, a sliding window), the instance
    attribute `config` of the deep layers' attention modules.

    Args:
        anatomy: the host model.
        schedule: what its layers are to do; replaces the schedule of an earlier call.
        undo: takes everything back.
    """
    if not schedule.does_something:
        return
    decoder = anatomy.decoder
    if schedule.side_layers and not hasattr(decoder, side_branch.SIDE_BRANCH):
        layers = [anatomy.layers[schedule.split + i] for i in range(schedule.side_layers)]
        undo.add_module(decoder, side_branch.SIDE_BRANCH, side_branch.copy_layers(layers))
    _allow_masks(anatomy, schedule, undo)
    if isinstance(decoder.forward, RoutedForward):
        undo.set_attribute(decoder.forward, "schedule", schedule)
    else:
        undo.set_attribute(decoder, "forward", RoutedForward(anatomy, schedule))


def _allow_masks(anatomy: Anatomy, schedule: LayerSchedule, undo: UndoStack) -> None:
    windowed = compat.sliding_window(anatomy.decoder.config) is not None
    first = schedule.split if schedule.prune_at is None else min(schedule.split, schedule.prune_at)
    layers = [
        anatomy.layers[i] for i in range(first, schedule.n_layers) if windowed or schedule.modes[i] is LayerMode.KEYS
    ]
    if windowed and schedule.side_layers:
        layers += getattr(anatomy.decoder, side_branch.SIDE_BRANCH)
    for layer in layers:
        compat.allow_any_mask(layer.self_attn, undo)


def freeze(anatomy: Anatomy, routing: Routing, schedule: LayerSchedule) -> None:
    """Set requires_grad as `Routing.freeze` says."""
    branch = side_branch.parameters(anatomy)
    if not branch:
        return
    if routing.freeze != "none":
        anatomy.model.requires_grad_(False)
    if routing.freeze == "side_and_fusion":
        for layer in schedule.fusion:
            anatomy.layers[layer].requires_grad_(True)
    for parameter in branch:
        parameter.requires_grad_(True)
