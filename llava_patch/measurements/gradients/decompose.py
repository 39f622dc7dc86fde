"""The gradient of one block of the vision tower, or of all of it, with and without what comes through the skip taps.

Source: "Detached Skip-Links and R-Probe", appendix C.1. Nothing of the run changes: gradients come from
`torch.autograd.grad` over stand-ins of the block's parameters, which share their values, so that neither `.grad` nor
the hooks of DDP, DeepSpeed or a warm-up see anything.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.core.undo import UndoStack, holding
from llava_patch.fusion.features import detaching
from llava_patch.fusion.training import lift_no_grad
from llava_patch.hosts import zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.gradients.measurement import ATTACHED, RUN, TOWER, name_of
from llava_patch.patching.handle import get_handle

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name on every module that can checkpoint


def measured_block(model: nn.Module, block: int | None = None, full: str = RUN) -> int:
    """The number of the block that is measured, checked against the fusion of a model whose tower may not be loaded.

    `block` None is the shallowest tapped one, 0 the whole tower; for `full`, see `Gradients`.

    Raises:
        SettingError: no fusion, no tap through which a gradient reaches the block, or a block above the main feature.
    """
    handle = get_handle(model)
    if handle is None or handle.taps is None or not handle.taps.groups:
        raise SettingError(
            "gradient statistics compare the gradient through skip taps with the main path's, but this model has no "
            "skip taps: bind a fusion, as in SkipLinks.stride = 2 (llava-patch gradients: --gin-param)"
        )
    taps, name = handle.taps, type(handle.fusion).__name__
    tapped = [b for b in taps.blocks if b >= 1]
    if block is None:
        if not tapped:
            raise SettingError(f"{name} taps the embedding alone, which has no block: name one in Gradients.block")
        block = tapped[0]
    if block > taps.main:
        raise SettingError(
            f"Gradients.block = {block}: the main path ends at block {taps.main}, so no main gradient reaches it; "
            f"choose one of 1..{taps.main}"
        )
    attached = [b for g in taps.groups if full == ATTACHED or not g.detached for b in g.blocks]
    if not any(b >= block for b in attached):
        if full == RUN and any(b >= block for b in taps.blocks):
            raise SettingError(
                f"{name} detaches every tap{f' from block {block} on' if block else ''}, so the skip gradient there "
                f'is zero: set Gradients.full = "{ATTACHED}" to measure what detaching keeps away'
                + (", or choose another Gradients.block" if block else "")
            )
        raise SettingError(
            f"Gradients.block = {block}: {name} taps blocks {', '.join(map(str, taps.blocks))}, and none of them is "
            "reached through this one: choose a lower block"
        )
    return block


def region(anatomy: Anatomy, block: int) -> nn.Module:
    """The module whose parameters are meant: a block of the loaded vision tower, or (0) the tower's model."""
    parts = anatomy.vision_parts()
    if block != TOWER:
        return parts.blocks[block - 1]
    whole = anatomy.vision_model
    assert whole is not None
    return whole


def block_parameters(model: nn.Module, block: int) -> dict[str, nn.Parameter]:
    """The parameters of a vision block whose gradient is taken, by name: all that are floating-point numbers.

    Of the whole tower (0), also those that the main path does not pass: their gradients are zero.

    Raises:
        HostError: the tower is not loaded, or the block has only quantised weights.
        SettingError: DeepSpeed ZeRO-3 has partitioned the weights.
    """
    handle = get_handle(model)
    assert handle is not None
    module = region(handle.anatomy, block)
    found = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    if zero.is_partitioned(found.values()):
        raise SettingError(
            "gradient statistics need whole weights, but DeepSpeed ZeRO-3 has partitioned them: use stage 2 (LLaVA's "
            "scripts/zero2.json)"
        )
    if not found:
        raise HostError(f"{_of_the_tower(block)} has no floating-point weights (quantised): load it in 16 bit")
    return found


def decompose(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    block: int,
    full: str = RUN,
    scale: float = 1.0,
    images: bool = True,
) -> tuple[Tensor, Tensor]:
    """Main and full gradient of one batch; their difference is the skip gradient.

    Two forward passes from the same state of the random number generators (CPU and the model's devices): with every
    skip tap detached, and with the taps as `full` says. Afterwards parameters, `.grad`, flags, generators, the model's
    own attributes and the auxiliary loss's running means are as before. Autocast, if any, is up to `loss_of`.

    Modifications, taken back at the end: the block's parameters replaced in their modules by leaves that share their
    values and require a gradient; `llava`'s tower without its `no_grad`; non-reentrant gradient checkpointing wherever
    checkpointing is on, as `torch.autograd.grad` cannot pass a reentrant one.

    Args:
        model: a patched host model with a loaded tower, possibly wrapped.
        loss_of: runs a forward pass on the batch and returns its loss, a scalar; called twice. It should call the bare
            model, not DDP's wrapper, which would wait for gradients.
        block: number of the vision block, 0 for the whole tower, see `measured_block`.
        full: see `Gradients.full`.
        scale: the loss is multiplied by it before the backward pass and the gradients are divided by it, as a loss
            scaler does for float16.
        images: whether the batch must have images; else a batch that gives the block no gradient gives zeros.

    Returns:
        (main, full), float32 vectors over `block_parameters(model, block)` in their order, on the model's device.

    Raises:
        SettingError: see `measured_block`; weights partitioned by ZeRO-3.
        HostError: a tower that is not loaded.
        InputError: the loss is no scalar, or no gradient reaches the block from it (a batch without images).
    """
    measured_block(model, block, full)
    main, whole = _taken(model, loss_of, block, (True, False if full == ATTACHED else None), scale, images)
    return main, whole


def slope(model: nn.Module, loss_of: Callable[[], Tensor], block: int) -> Tensor:
    """The gradient of the loss itself, no tap detached; arguments, effects and errors as of `decompose`."""
    return _taken(model, loss_of, block, (False,), 1.0, True)[0]


def _taken(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    block: int,
    states: tuple[bool | None, ...],
    scale: float,
    images: bool,
) -> list[Tensor]:
    """The gradient under each state of `detaching`, from the same random numbers."""
    block_parameters(model, block)  # refuses before anything changes
    handle = get_handle(model)
    assert handle is not None
    devices = sorted({p.device.index for p in handle.model.parameters() if p.device.type == "cuda"})
    # The auxiliary loss counts the run's own forward passes alone.
    quiet = contextlib.nullcontext() if handle.auxiliary is None else handle.auxiliary.unobserved()
    with UndoStack() as undo, torch.enable_grad(), quiet:
        leaves = stand_in(region(handle.anatomy, block), undo)
        if handle.anatomy.tower_apart:
            lift_no_grad(handle.anatomy, undo)
        for module in handle.model.modules():
            if _CHECKPOINT in vars(module):
                undo.set_attribute(module, _CHECKPOINT, functools.partial(checkpoint, use_reentrant=False))
        found = []
        for detached in states:
            with holding(detaching, detached), torch.random.fork_rng(devices):
                found.append(_gradient(loss_of, leaves, block if images else None, scale))
    return found


def _gradient(loss_of: Callable[[], Tensor], leaves: list[nn.Parameter], block: int | None, scale: float) -> Tensor:
    loss = loss_of()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"the loss must be one number, not {loss!r:.100}: return the model's loss (give it labels)")
    parts: Any = [None] * len(leaves)
    if loss.requires_grad:
        parts = torch.autograd.grad(loss.reshape(()) * scale, leaves, allow_unused=True)
    if block is not None and all(part is None for part in parts):
        raise InputError(
            f"no gradient of the loss reaches {_of_the_tower(block)}: the batch has no image, or the model "
            "runs its images under no_grad"
        )
    flat = [
        (torch.zeros_like(leaf) if part is None else part.detach()).float().flatten()
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    joined = torch.cat([part.to(flat[0].device) for part in flat])
    return joined if scale == 1 else joined / scale


def _of_the_tower(block: int) -> str:
    return name_of(block) if block == TOWER else f"{name_of(block)} of the vision tower"


def stand_in(
    module: nn.Module, undo: UndoStack, value: Callable[[Tensor], Tensor] = lambda parameter: parameter
) -> list[nn.Parameter]:
    """Leaves in the parameters' places: no hook of the run hangs on them, and they need a gradient whatever trains.

    Each takes the `value` of its parameter, in the order of `block_parameters`; by default they share memory.
    """
    leaves: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in leaves:
                leaves[id(parameter)] = nn.Parameter(value(parameter.detach()), requires_grad=True)
            part._parameters[name] = leaves[id(parameter)]
            undo.push(functools.partial(part._parameters.__setitem__, name, parameter))
    return list(leaves.values())
