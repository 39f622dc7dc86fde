"""The gradient of one block of the vision tower, with and without what comes through the skip taps.

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
from llava_patch.measurements.gradients.measurement import ATTACHED, RUN
from llava_patch.patching.handle import get_handle

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name on every module that can checkpoint


def measured_block(model: nn.Module, block: int | None = None, full: str = RUN) -> int:
    """The number of the block that is measured, checked against the fusion of a model whose tower may not be loaded.

    `block` None is the shallowest tapped one; for `full`, see `Gradients`.

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
                f"{name} detaches every tap from block {block} on, so the skip gradient there is zero: set "
                f'Gradients.full = "{ATTACHED}" to measure what detaching keeps away, or choose another Gradients.block'
            )
        raise SettingError(
            f"Gradients.block = {block}: {name} taps blocks {', '.join(map(str, taps.blocks))}, and none of them is "
            "reached through this one: choose a lower block"
        )
    return block


def block_parameters(model: nn.Module, block: int) -> dict[str, nn.Parameter]:
    """The parameters of a vision block whose gradient is taken, by name: all that are floating-point numbers.

    Raises:
        HostError: the tower is not loaded, or the block has only quantised weights.
        SettingError: DeepSpeed ZeRO-3 has partitioned the weights.
    """
    handle = get_handle(model)
    assert handle is not None
    module = handle.anatomy.vision_parts().blocks[block - 1]
    found = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    if zero.is_partitioned(found.values()):
        raise SettingError(
            "gradient statistics need whole weights, but DeepSpeed ZeRO-3 has partitioned them: use stage 2 (LLaVA's "
            "scripts/zero2.json)"
        )
    if not found:
        raise HostError(
            f"block {block} of the vision tower has no floating-point weights (quantised): load it in 16 bit"
        )
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
        block: number of the vision block, see `measured_block`.
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
    block_parameters(model, block)  # refuses before anything changes
    handle = get_handle(model)
    assert handle is not None
    devices = sorted({p.device.index for p in handle.model.parameters() if p.device.type == "cuda"})
    # The auxiliary loss counts the run's own forward passes alone.
    quiet = contextlib.nullcontext() if handle.auxiliary is None else handle.auxiliary.unobserved()
    with UndoStack() as undo, torch.enable_grad(), quiet:
        leaves = _stand_in(handle.anatomy.vision_parts().blocks[block - 1], undo)
        if handle.anatomy.tower_apart:
            lift_no_grad(handle.anatomy, undo)
        for module in handle.model.modules():
            if _CHECKPOINT in vars(module):
                undo.set_attribute(module, _CHECKPOINT, functools.partial(checkpoint, use_reentrant=False))
        found = []
        for detached in (True, False if full == ATTACHED else None):
            with holding(detaching, detached), torch.random.fork_rng(devices):
                found.append(_gradient(loss_of, leaves, block if images else None, scale))
    return found[0], found[1]


def _gradient(loss_of: Callable[[], Tensor], leaves: list[nn.Parameter], block: int | None, scale: float) -> Tensor:
    loss = loss_of()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"the loss must be one number, not {loss!r:.100}: return the model's loss (give it labels)")
    parts: Any = [None] * len(leaves)
    if loss.requires_grad:
        parts = torch.autograd.grad(loss.reshape(()) * scale, leaves, allow_unused=True)
    if block is not None and all(part is None for part in parts):
        raise InputError(
            f"no gradient of the loss reaches block {block} of the vision tower: the batch has no image, or the model "
            "runs its images under no_grad"
        )
    flat = [
        (torch.zeros_like(leaf) if part is None else part.detach()).float().flatten()
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    joined = torch.cat([part.to(flat[0].device) for part in flat])
    return joined if scale == 1 else joined / scale


def _stand_in(block: nn.Module, undo: UndoStack) -> list[nn.Parameter]:
    """Leaves in the parameters' places: no hook of the run hangs on them, and they need a gradient whatever trains."""
    leaves: dict[int, nn.Parameter] = {}
    for module in block.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_floating_point():
                continue
            leaf = leaves.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=True))
            module._parameters[name] = leaf
            undo.push(functools.partial(module._parameters.__setitem__, name, parameter))
    return list(leaves.values())
