"""The curvature of the loss along a gradient: what the constant L of condition (7) is on this model and these data.

A difference of gradients a little way up and down: unlike a product with the Hessian it works with whatever attention
the model runs. On a batch other than the gradient's own, whose noise would else be in both (Proposition 4.3 takes the
Hessian of the expected loss), and with every tap attached, as a detached one hides a part of the loss's slope.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from llava_patch.core.errors import HostError, SettingError
from llava_patch.core.undo import UndoStack
from llava_patch.measurements.gradients.decompose import block_parameters, region, slope, stand_in
from llava_patch.patching.handle import get_handle


def bends(
    model: nn.Module, loss_of: Callable[[], Tensor], block: int, directions: Sequence[Tensor], share: float
) -> list[float]:
    """<g, H g> of some directions g, H being the Hessian of a loss in the weights of a block.

    <grad L(theta + d u) - grad L(theta - d u), u> / (2 d) * ||g||^2 with u = g / ||g||: exact for a quadratic loss, off
    by the fourth derivative times d^2 / 6 otherwise, and by a rounding of the gradient over d. A direction of zeros
    gives 0. Afterwards all is as after `decompose`.

    Args:
        model: a patched host model with a loaded tower.
        loss_of: runs a forward pass and returns its loss, as for `decompose`; called twice a direction.
        block: number of the vision block, 0 for the whole tower, see `measured_block`.
        directions: float32 vectors over `block_parameters(model, block)` in their order.
        share: d as a share of the norm of these weights.

    Raises:
        SettingError: weights in fewer than 32 bits, whose rounding is larger than the difference.
        HostError: weights that are all zero.
    """
    weights = block_parameters(model, block).values()
    if any(torch.finfo(p.dtype).bits < 32 for p in weights):
        raise SettingError(
            "Gradients.curvature is a small difference of gradients, which weights of 16 bits round away: load the "
            "model in float32 (--dtype float32), or leave it out"
        )
    distance = share * float(torch.stack([p.detach().double().square().sum() for p in weights]).sum().sqrt())
    if not distance:
        raise HostError("the weights along whose gradient curvature is asked for are all zero")
    found = []
    for direction in directions:
        length = float(direction.double().norm())
        if not length:
            found.append(0.0)
            continue
        ends = []
        for sign in (1, -1):
            with moved(model, block, direction * (sign * distance / length)):
                ends.append(slope(model, loss_of, block).double() @ direction.double())
        found.append(float(ends[0] - ends[1]) / (2 * distance) * length)
    return found


@contextlib.contextmanager
def moved(model: nn.Module, block: int, by: Tensor) -> Iterator[None]:
    """The weights of a block, 0 for the whole tower, plus a vector over `block_parameters`; the same ones afterwards.

    Other parameters stand in their places meanwhile, so that not a bit of them changes.
    """
    handle = get_handle(model)
    assert handle is not None
    parts = iter(by.split([p.numel() for p in block_parameters(model, block).values()]))
    with UndoStack() as undo:
        stand_in(region(handle.anatomy, block), undo, lambda p: p + next(parts).view_as(p).to(p))
        yield
