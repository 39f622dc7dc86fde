"""How a fusion attaches to a host's tower and projector, and what trains in the tower."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from llava_patch.core.errors import HostError, SettingError
from llava_patch.core.undo import UndoStack
from llava_patch.fusion import stack
from llava_patch.fusion.checkpointing import keep_gradients
from llava_patch.fusion.features import check_grid, fuse, stacked
from llava_patch.fusion.linear import FusedLinear
from llava_patch.fusion.taps import STI_POOL, Join, Taps, choose_taps
from llava_patch.hosts import wrappers, zero
from llava_patch.hosts.anatomy import Anatomy, when_loaded
from llava_patch.settings.methods import Fusion

logger = logging.getLogger("llava_patch")


class _TookPart:
    """Whether the taps were in what the tower gave.

    Attributes:
        last: `fused`: they were in what it gave last in this thread; without it features are the caller's own.
        hooked: the vision model that has them; None while it is not loaded.
    """

    def __init__(self) -> None:
        # A bare one: what torch.compile makes of a subclass's attributes is another matter.
        self.last = threading.local()
        self.hooked: nn.Module | None = None


def resolve(anatomy: Anatomy, settings: Fusion) -> Taps:
    """Resolve a fusion against a host's tower and check that the host can take it; changes nothing.

    Raises:
        SettingError: taps that the tower does not have, patches that cannot be merged, a host whose number of image
            tokens is fixed elsewhere, a projector of another width.
        HostError: a tower or projector that is not known.
    """
    taps = choose_taps(settings, anatomy.n_blocks, anatomy.main_block)
    name = type(settings).__name__
    if hasattr(anatomy.tower, "s2_scales"):
        raise HostError(f"{name} does not know multi-scale (S2) towers: load the model without s2")
    if not taps.keeps_tokens:
        if anatomy.tiles:
            raise SettingError(
                f"{_token_setting(settings, taps)} changes the number of tokens of an image, but this model cuts "
                "images into tiles (anyres) and counts their patches itself: use merge_size = 1 and another kind"
            )
        if anatomy.vision_model is not None:
            _check_tokens(anatomy, settings, taps)
    if taps.join is Join.LAYERS and anatomy.mixes_patches:
        raise HostError(
            f"{name} adds a tap to each patch's own token, but this model makes tokens of several patches "
            "(image_aspect_ratio = anyres_max, mm_patch_merge_type = ...maxpool...): take another fusion"
        )
    linear = anatomy.first_linear()[2]
    width = int(anatomy.vision_width)
    if isinstance(linear, FusedLinear) or zero.shape(linear.weight)[1] != width:
        fused = taps.columns * taps.merge_size**2 * width
        raise SettingError(
            f"the projector takes {zero.shape(linear.weight)[1]} channels, but this tower gives {width} ({fused} with "
            "this fusion): it was made for another tower or another fusion"
        )
    return taps


def _token_setting(settings: Fusion, taps: Taps) -> str:
    """The setting that changes the number of tokens, for messages."""
    name = type(settings).__name__
    return f'{name}.kind = "sti"' if taps.join is Join.TOKENS else f"{name}.merge_size = {taps.merge_size}"


def _check_tokens(anatomy: Anatomy, settings: Fusion, taps: Taps) -> None:
    tower, what = anatomy.vision_parts(), _token_setting(settings, taps)
    if anatomy.drops_patch:
        raise SettingError(
            f"{what} needs every patch, but the host drops the first token of a tower without a CLS token: set "
            'vision_feature_select_strategy = "full"'
        )
    if taps.join is Join.TOKENS and taps.main_tokens(tower.grid) < STI_POOL:
        raise SettingError(
            f"{what} averages {STI_POOL} neighbouring tokens, but an image of this tower has "
            f"{taps.main_tokens(tower.grid)}"
        )
    if taps.merge_size > 1:
        if not anatomy.drops_cls and tower.prefix_tokens:
            raise SettingError(
                f"{what} joins patches, but the host keeps the tower's CLS token: set "
                'vision_feature_select_strategy = "default" (llava: mm_vision_select_feature = "patch")'
            )
        check_grid(tower.grid, taps.merge_size, taps.merge_padding)


def attach(
    anatomy: Anatomy, settings: Fusion, taps: Taps, undo: UndoStack, *, zero_start: bool = True, loading: bool = False
) -> None:
    """Feed other blocks to the projector, or to the decoder.

    Modifications: hooks on the vision model, one of which puts the fused feature in the main feature's place, and one
    on the projector; the projector's first Linear replaced by a `FusedLinear` of the same name where it gets wider;
    with DeepStack what `stack.attach` says; on `llava` the tower's instance attributes `forward` (its `no_grad` lifted
    only while something in it trains) and, while its weights are not loaded yet, `load_model`.

    Args:
        anatomy: the host model.
        settings: the fusion.
        taps: it, resolved against the tower.
        undo: takes every change back.
        zero_start: see `FusedLinear.grow`.
        loading: the model is being loaded from a fused checkpoint, where no stock layer exists: undo then leaves the
            main columns.
    """
    if taps.columns > 1 or taps.merge_size > 1:
        parent, name, linear = anatomy.first_linear()
        fused = FusedLinear.grow(linear, taps.columns, taps.merge_size, zero_start)
        undo.replace_module(parent, name, fused, fused.stock if loading else None)
    if taps.join is Join.LAYERS:
        stack.attach(anatomy, undo)
    if not taps.keeps_tokens and not loading:
        rows, columns = anatomy.grid
        _warn_other_tokens(
            type(settings).__name__, taps.tokens((rows, columns)), rows * columns, anatomy.ids_hold_places
        )
    took_part = _TookPart()
    when_loaded(anatomy, undo, lambda late: _hook_vision_model(anatomy, settings, taps, late, took_part))
    _watch_projector(anatomy, settings, undo, took_part)
    wrappers.refuse_other_features(anatomy, undo)
    let_tower_train(anatomy, settings, undo)


@functools.lru_cache
def _warn_other_tokens(name: str, tokens: int, stock: int, ids_hold_places: bool) -> None:
    hint = "; HF's processor must write as many: handle.fit_processor(processor)" if ids_hold_places else ""
    logger.warning(
        "%s: an image has %d tokens instead of %d, so before it is trained the model's output is not the stock model's"
        "%s", name, tokens, stock, hint,
    )  # fmt: skip


def _watch_projector(anatomy: Anatomy, settings: Fusion, undo: UndoStack, took_part: _TookPart) -> None:
    """Refuse features of a tower whose taps took no part: where nothing gets wider, no shape would tell."""

    def check(module: nn.Module, args: Any) -> None:
        now, hooked = anatomy.vision_model_now, took_part.hooked
        if not (now is hooked or now is None or any(m is hooked for m in now.modules())):
            raise HostError(
                f"the vision tower was replaced after patch(): {type(settings).__name__} has its taps in the old one. "
                "Put it back, or call handle.remove() and patch again"
            )
        if getattr(took_part.last, "fused", True):  # features without any call of the tower are the caller's own
            return
        raise HostError(
            f"the projector was called on features that {type(settings).__name__} had no part in: the vision tower ran "
            "without reporting its hidden states, which this version of the host may take from elsewhere. Call "
            "handle.remove(), or install a supported version"
        )

    undo.push(anatomy.projector.register_forward_pre_hook(check).remove)


def _hook_vision_model(anatomy: Anatomy, settings: Fusion, taps: Taps, undo: UndoStack, took_part: _TookPart) -> None:
    vision = anatomy.vision_model
    assert vision is not None
    tower = anatomy.vision_parts()  # an unknown tower is refused here, at patch time
    if not taps.keeps_tokens:
        _check_tokens(anatomy, settings, taps)
    prefix, grid = tower.prefix_tokens, tower.grid
    needed = {taps.main, *taps.blocks}
    last = took_part.last

    def begin(module: nn.Module, args: Any) -> None:
        last.fused = False

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if output is None:  # it has raised: what the projector gets next is not its
            last.fused = True

    def put_fused_feature(module: nn.Module, args: Any, output: Any) -> Any:
        states = getattr(output, "hidden_states", None)
        if states is None:  # nobody asked for hidden states: the host does not select a feature here
            return output
        if any(states[block] is None for block in needed):
            return output  # this version keeps only those that the host asked for
        if taps.join is Join.LAYERS:
            stack.note(stacked(states, taps, anatomy.dropped_tokens, grid))
        output["hidden_states"] = (
            *states[: taps.main], fuse(states, taps, prefix, grid), *states[taps.main + 1 :],
        )  # fmt: skip
        last.fused = True
        return output

    undo.push(vision.register_forward_pre_hook(begin).remove)
    undo.push(vision.register_forward_hook(put_fused_feature).remove)
    undo.push(vision.register_forward_hook(end, always_call=True).remove)
    took_part.hooked = vision


def let_tower_train(anatomy: Anatomy, settings: Fusion, undo: UndoStack) -> None:
    """Make gradients reach the tower if the settings train something in it; see `attach` and `keep_gradients`."""
    if settings.train_tower == "frozen":
        return
    when_loaded(anatomy, undo, lambda late: keep_gradients(anatomy, late))
    if anatomy.tower_apart:
        lift_no_grad(anatomy, undo)


def lift_no_grad(anatomy: Anatomy, undo: UndoStack) -> None:
    """Run `llava`'s tower with gradients while something in it asks for one.

    Modifications: the tower's instance attribute `forward`.

    Raises:
        HostError: a tower whose forward is not under `no_grad`.
    """
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


def set_tower_flags(anatomy: Anatomy, settings: Fusion, taps: Taps) -> None:
    """Set requires_grad in the vision tower as `train_tower` says.

    Blocks above the deepest feature that carries a gradient never train, nor does the final norm unless that feature is
    read through it: nothing would give them a gradient.

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
        parts: list[nn.Module] = [*tower.before, *used, *tower.final_norm(taps.deepest)]
    else:
        k = int(settings.train_tower)
        if k > len(used):
            raise SettingError(
                f"{type(settings).__name__}.train_tower = {k}: only {len(used)} blocks of this tower are used"
            )
        parts = [*used[len(used) - k :], *tower.final_norm(taps.deepest)]
    for part in parts:
        part.requires_grad_(True)
    if settings.train_tower == "all":
        for parameter in tower.own:
            parameter.requires_grad_(True)
    for parameter in tower.idle:
        parameter.requires_grad_(False)


def parameters(anatomy: Anatomy) -> list[nn.Parameter]:
    """DeepStack's own projector; empty without one."""
    projector = getattr(anatomy.projector_owner, anatomy.stack_name, None)
    return [] if projector is None else list(projector.parameters())


def is_silent(anatomy: Anatomy, trainable: Collection[str]) -> bool:
    """Whether a fusion's new weights are all zero and stay so, because they do not train.

    Args:
        anatomy: a fused host model.
        trainable: names of the parameters that train.
    """
    own = getattr(anatomy.projector_owner, anatomy.stack_name, None)
    layer = anatomy.first_linear()[2]
    if own is not None:
        decisive: list[Any] = list([m for m in own.modules() if isinstance(m, nn.Linear)][-1].parameters())
    elif isinstance(layer, FusedLinear) and layer.in_features > layer.main_features:
        decisive = [layer.weight]
    else:
        return False
    ids = {id(p) for p in decisive}
    if {n for n, p in anatomy.model.named_parameters() if id(p) in ids} & set(trainable):
        return False
    with zero.gathered(decisive):
        if own is not None:
            return not any(bool(p.any()) for p in decisive)
        return not bool(layer.weight[:, layer.main_features :].any())  # type: ignore[union-attr]
