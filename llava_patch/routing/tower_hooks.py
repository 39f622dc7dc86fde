"""How a pruning before layer 0 (`tower_pruning`) sees the tower's states, and how its choice reaches the decoder."""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.compiled import aside
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.core.undo import UndoStack, holding
from llava_patch.fusion import deep_stack_decoder
from llava_patch.hosts import call_context, compat
from llava_patch.hosts.anatomy import Anatomy, when_loaded
from llava_patch.hosts.hf import VIDEOS
from llava_patch.hosts.towers.attention import can_compare, compared, has_cls
from llava_patch.hosts.towers.layout import Tower
from llava_patch.routing.tower_pruning import TowerPruning, TowerView

# What a tower chose in the host's encoder: bool [images, tokens], a call each; None outside of a call of the model.
_choices: ContextVar[list[Tensor] | None] = ContextVar("llava_patch_choices", default=None)


def check_together(pruning: TowerPruning, others: Mapping[str, Any]) -> None:
    """Refuse fusions whose tokens are not the tower's: SettingError."""
    fusion, name = others.get("fusion"), type(pruning).__name__
    if fusion is None:
        return
    why = {
        f"joins {fusion.merge_size} x {fusion.merge_size} patches": fusion.merge_size > 1,
        "adds tokens of other blocks": getattr(fusion, "kind", "") == "sti",
        "adds its taps to every patch in the decoder": bool(fusion.decoder_layers(1)),
    }
    for what, holds in why.items():
        if holds:
            raise SettingError(
                f"{name} chooses among the vision tower's patches, but {type(fusion).__name__} {what}: take a fusion "
                "on channels with merge_size = 1, or a pruning inside the decoder (FastV)"
            )


def check_model(anatomy: Anatomy, pruning: TowerPruning) -> None:
    """Refuse a tower that cannot be asked (HostError), or has too few patches to leave any out (SettingError)."""
    name = type(pruning).__name__
    anatomy.check_one_scale(name)
    patches = anatomy.grid[0] * anatomy.grid[1] - int(anatomy.drops_patch)
    if patches < pruning.least_patches:
        raise SettingError(
            f"{pruning} takes images of {pruning.least_patches} patches or more: this model's have {patches}"
        )
    if pruning.NEEDS_CLS and not anatomy.prefix_tokens:
        raise HostError(f"{name} goes by the CLS token's attention, but this model's vision tower has none")
    if anatomy.main_block + pruning.BEHIND > anatomy.n_blocks:
        raise SettingError(
            f"{name} goes by the block behind the main feature, but this model takes the output of the last one, "
            f"{anatomy.n_blocks}"
        )
    if anatomy.vision_model is not None:
        _tower(anatomy, pruning)


def _tower(anatomy: Anatomy, pruning: TowerPruning) -> Tower:
    tower, name = anatomy.vision_parts(), type(pruning).__name__
    can_compare(tower, anatomy.main_block + pruning.BEHIND)
    if tower.prefix_tokens > 1 or (tower.prefix_tokens and not has_cls(anatomy.vision_model, tower)):
        raise HostError(f"{name} knows vision towers with a CLS token or with patches alone, not with registers")
    return tower


def attach(anatomy: Anatomy, pruning: TowerPruning, undo: UndoStack) -> None:
    """Reduce what the tower gives the host, and tell the decoder what stays.

    Modifications: hooks on the vision model, one of which puts the reduced feature in the main feature's place; the
    methods that turn pixels into projected tokens, and those that `deep_stack_decoder.report_packing` names.
    """
    when_loaded(anatomy, undo, lambda late: _hook_vision_model(anatomy, pruning, late))

    def encode_and_offer(argument: str, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = call_context.current(anatomy)
        if call is None or (anatomy.decoder.training and not pruning.training):
            return encode(*args, **kwargs)
        if call.instead is not None:
            return call.instead
        if argument == VIDEOS:
            raise InputError(
                f"{type(pruning).__name__} knows still images, but this call brings videos, whose frames the host "
                "pools: call handle.remove() first, or take a pruning inside the decoder (FastV)"
            )
        choices: list[Tensor] = []
        with holding(_choices, choices):
            features = encode(*args, **kwargs)
        if not choices:
            raise HostError(
                f"images were encoded, but {type(pruning).__name__} saw no hidden states of the vision tower, which "
                "may have been replaced after patch(): call handle.remove() and patch again"
            )
        call.offer_choice(torch.cat(choices), argument)
        return features

    for encoder, argument in zip(anatomy.encoders, anatomy.visual_tokens, strict=True):
        undo.wrap(*encoder, aside(functools.partial(encode_and_offer, argument)))
    deep_stack_decoder.report_packing(anatomy, undo)


def _hook_vision_model(anatomy: Anatomy, pruning: TowerPruning, undo: UndoStack) -> None:
    vision, main = anatomy.vision_model, anatomy.main_block
    assert vision is not None
    check_model(anatomy, pruning)
    tower, before = _tower(anatomy, pruning), main + pruning.BEHIND - 1

    @aside
    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if _choices.get() is not None:
            compat.ask_all_states(kwargs)

    @aside
    def reduce(module: nn.Module, args: Any, output: Any) -> Any:
        choices, states = _choices.get(), getattr(output, "hidden_states", None)
        if choices is None or states is None or states[main] is None or states[before] is None:
            return output
        feature, stays = _reduced(anatomy, tower, pruning, states[before], states[main])
        choices.append(stays)
        output["hidden_states"] = (*states[:main], feature, *states[main + 1 :])
        return output

    undo.push(vision.register_forward_pre_hook(begin, with_kwargs=True).remove)
    undo.push(vision.register_forward_hook(reduce).remove)


def _reduced(
    anatomy: Anatomy, tower: Tower, pruning: TowerPruning, entered: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """The main feature with what the pruning made of it, and which of the tokens that the projector gets stay.

    `entered` is the input of the block that is asked, `states` the main feature (with a fusion's taps beside it, so
    wider), both [images, tokens, channels]; the choice is bool [images, tokens of the projector].
    """
    dropped, cls = anatomy.dropped_tokens, tower.prefix_tokens > 0
    first = max(dropped, tower.prefix_tokens)
    entered = entered[..., : anatomy.vision_width]  # which may be the main feature itself
    block = anatomy.main_block + pruning.BEHIND
    seen = compared(tower, block, entered, slice(0, 1) if cls else slice(None))
    assert seen.q is not None and seen.k is not None
    view = TowerView(
        states[:, first:], states[:, 0] if cls and dropped else None, seen.q, seen.k, seen.scaling, cls, first
    )
    features, stays = pruning.reduce(view)
    before = stays.new_ones(len(stays), first - dropped)  # a CLS token that the host keeps
    return torch.cat([states[:, :first], features], 1), torch.cat([before, stays], 1)
