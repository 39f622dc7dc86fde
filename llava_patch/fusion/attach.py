"""How Detached Skip-Links attach to a host's tower and projector, and what trains in the tower."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from llava_patch.errors import HostError, SettingError
from llava_patch.fusion.checkpointing import keep_gradients
from llava_patch.fusion.taps import FusedLinear, Taps, choose_taps, fuse
from llava_patch.hosts import zero
from llava_patch.hosts.anatomy import LLAVA, Anatomy
from llava_patch.hosts.tower import when_loaded
from llava_patch.settings import Fusion, SkipLinks
from llava_patch.undo import UndoStack


def attach(
    anatomy: Anatomy, settings: SkipLinks, undo: UndoStack, *, zero_start: bool = True, keep_original: bool = True
) -> Taps:
    """Feed shallow blocks to the projector.

    Modifications: a forward hook on the vision model that puts the fused feature in the main feature's place; the
    projector's first Linear replaced by a `FusedLinear` of the same name; on `llava` the tower's instance attributes
    `forward` (its `no_grad` lifted only while something in it trains) and, while its weights are not loaded yet,
    `load_model`.

    Args:
        anatomy: the host model.
        settings: what to tap.
        undo: takes every change back.
        zero_start: see `FusedLinear.grow`.
        keep_original: False when the model is being loaded from a fused checkpoint, where no stock layer exists: undo
            then leaves the main columns.

    Raises:
        SettingError: taps that the tower does not have, a projector of another width.
        HostError: a tower or projector that is not known.
    """
    taps = choose_taps(settings, anatomy.n_blocks, anatomy.main_block)
    if hasattr(anatomy.tower, "s2_scales"):
        raise HostError("SkipLinks does not know multi-scale (S2) towers: load the model without s2")
    _widen_projector(anatomy, taps, undo, zero_start, keep_original)
    when_loaded(anatomy, undo, lambda: _hook_vision_model(anatomy, taps, undo))
    let_tower_train(anatomy, settings, undo)
    return taps


def _widen_projector(anatomy: Anatomy, taps: Taps, undo: UndoStack, zero_start: bool, keep_original: bool) -> None:
    parent, name, linear = anatomy.first_linear()
    width = int(anatomy.vision_config.hidden_size)
    if isinstance(linear, FusedLinear) or linear.in_features != width:
        raise SettingError(
            f"the projector takes {linear.in_features} channels, but this tower gives {width} "
            f"({(1 + len(taps.blocks)) * width} with these taps): it was made for another tower or another fusion"
        )
    fused = FusedLinear.grow(linear, len(taps.blocks), zero_start)
    undo.replace_module(parent, name, fused, None if keep_original else fused.stock)


def _hook_vision_model(anatomy: Anatomy, taps: Taps, undo: UndoStack) -> None:
    vision = anatomy.vision_model
    assert vision is not None
    anatomy.vision_parts()  # an unknown tower is refused here, at patch time

    def put_fused_feature(module: nn.Module, args: Any, output: Any) -> Any:
        states = getattr(output, "hidden_states", None)
        if states is None:  # nobody asked for hidden states: the host does not select a feature here
            return output
        output["hidden_states"] = (*states[: taps.main], fuse(states, taps), *states[taps.main + 1 :])
        return output

    hook = vision.register_forward_hook(put_fused_feature)
    undo.push(hook.remove)


def let_tower_train(anatomy: Anatomy, settings: Fusion, undo: UndoStack) -> None:
    """Make gradients reach the tower if the settings train something in it; see `attach` and `keep_gradients`."""
    if settings.train_tower == "frozen":
        return
    when_loaded(anatomy, undo, lambda: keep_gradients(anatomy, undo))
    if anatomy.host == LLAVA:
        _lift_no_grad(anatomy, undo)


def _lift_no_grad(anatomy: Anatomy, undo: UndoStack) -> None:
    tower = anatomy.tower
    original = tower.forward
    undecorated = getattr(type(tower).forward, "__wrapped__", None)
    if undecorated is None:
        raise HostError(f"{type(tower).__name__}.forward is not under torch.no_grad() as LLaVA's is: cannot lift it")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters()):
            return undecorated(tower, *args, **kwargs)
        return original(*args, **kwargs)

    undo.set_attribute(tower, "forward", forward)


def set_tower_flags(anatomy: Anatomy, settings: SkipLinks, taps: Taps) -> None:
    """Set requires_grad in the vision tower as `train_tower` says.

    Blocks above the deepest used feature, and the final norm, never train: nothing reads them.

    Raises:
        SettingError: more blocks asked for than are used.
    """
    vision = anatomy.vision_model
    if vision is None:
        return
    tower = anatomy.vision_parts()
    vision.requires_grad_(False)
    if settings.train_tower == "frozen":
        return
    used = list(tower.blocks[: taps.deepest])
    if settings.train_tower == "all":
        parts: list[nn.Module] = [*tower.before, *used]
    else:
        k = int(settings.train_tower)
        if k > len(used):
            raise SettingError(f"SkipLinks.train_tower = {k}: only {len(used)} blocks of this tower are used")
        parts = used[len(used) - k :]
    for part in parts:
        part.requires_grad_(True)
    if settings.train_tower == "all":
        for parameter in tower.own:
            parameter.requires_grad_(True)


def is_silent(anatomy: Anatomy, trainable: Collection[str]) -> bool:
    """Whether a fusion's new columns are all zero and stay so, because the projector does not train.

    Args:
        anatomy: a fused host model.
        trainable: names of the parameters that train.
    """
    layer = anatomy.first_linear()[2]
    names = {n for n, p in anatomy.model.named_parameters() if p is layer.weight}
    if not isinstance(layer, FusedLinear) or names & set(trainable):
        return False
    with zero.gathered([layer.weight]):
        return not bool(layer.weight[:, layer.main_features :].any())
