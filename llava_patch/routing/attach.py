"""How routing and pruning attach to a host model."""

from __future__ import annotations

from llava_patch.core.undo import UndoStack
from llava_patch.hosts import compat
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing import side_branch
from llava_patch.routing.forward import RoutedForward
from llava_patch.routing.schedule import Program, Work
from llava_patch.settings.methods import Routing


def attach(anatomy: Anatomy, program: Program, undo: UndoStack) -> None:
    """Route and prune image tokens of a host model; a program that does nothing changes nothing.

    Modifications: the decoder's instance attribute `forward`; with a side branch a ModuleList `side_branch` on the
    decoder; where masks are needed that flash attention does not know (the KV variant, a sliding window), the instance
    attribute `config` of the deep layers' attention modules.

    Args:
        anatomy: the host model.
        program: what its layers are to do; replaces the program of an earlier call.
        undo: takes everything back.
    """
    if not program.does_something:
        return
    decoder = anatomy.decoder
    if program.side_layers and not hasattr(decoder, side_branch.SIDE_BRANCH):
        layers = [anatomy.layers[program.split + i] for i in range(program.side_layers)]
        undo.add_module(decoder, side_branch.SIDE_BRANCH, side_branch.copy_layers(layers))
    _allow_masks(anatomy, program, undo)
    if isinstance(decoder.forward, RoutedForward):
        undo.set_attribute(decoder.forward, "program", program)
    else:
        undo.set_attribute(decoder, "forward", RoutedForward(anatomy, program))


def _allow_masks(anatomy: Anatomy, program: Program, undo: UndoStack) -> None:
    windowed = compat.sliding_window(anatomy.decoder.config) is not None
    first = program.split if program.prune_at is None else min(program.split, program.prune_at)
    layers = [anatomy.layers[i] for i in range(first, program.n_layers) if windowed or program.work[i] is Work.KEYS]
    if windowed and program.side_layers:
        layers += getattr(anatomy.decoder, side_branch.SIDE_BRANCH)
    for layer in layers:
        compat.allow_any_mask(layer.self_attn, undo)


def freeze(anatomy: Anatomy, routing: Routing, program: Program) -> None:
    """Set requires_grad as `Routing.freeze` says."""
    branch = side_branch.parameters(anatomy)
    if not branch:
        return
    if routing.freeze != "none":
        anatomy.model.requires_grad_(False)
    if routing.freeze == "side_and_fusion":
        for layer in program.fusion:
            anatomy.layers[layer].requires_grad_(True)
    for parameter in branch:
        parameter.requires_grad_(True)
