"""Numbers that are not finite: whether a model's weights are to blame, or the precision that it runs in."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Named = Iterable[tuple[str, Tensor]]
DIVERGED = "the training diverged or the file is damaged: take an earlier checkpoint, or download it again"


def first_not_finite(tensors: Named) -> str | None:
    """The name of the first tensor that holds NaN or infinity; each is summed, which takes no memory of its size."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()
        # A finite sum has finite terms. That of large ones may overflow: then every value is looked at.
        if not math.isfinite(values.sum(dtype=torch.float32)) and not bool(values.isfinite().all()):
            return name
    return None


def why_not_finite(what: str, dtype: torch.dtype, weights: Named) -> str:
    """The message for numbers ("the hidden states of layer 3") that came out as NaN or infinity, and what to do.

    Args:
        what: the numbers, in the plural.
        dtype: what they were computed in.
        weights: the model's weights by name, which are looked at first.
    """
    said = f"{what} are not finite in {str(dtype).removeprefix('torch.')}"
    if (broken := first_not_finite(weights)) is not None:
        return f"{said}: the weights are not either ({broken} holds NaN or infinity): {DIVERGED}"
    if dtype == torch.float16:
        return f"{said}, whose range ends at 65,504: load the model with --dtype bfloat16 or float32"
    if dtype == torch.bfloat16:
        return f"{said}: load the model with --dtype float32"
    return f"{said}, although the weights are: they have grown too large for any precision: take an earlier checkpoint"
