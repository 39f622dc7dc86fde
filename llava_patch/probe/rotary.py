"""Two-dimensional rotary positions in the form that transformers' decoder layers take.

Pure mathematics on tensors. `rotate_half` pairs dimension i with i + d/2, so what is shared out between the axes is
pairs, not dimensions: even pairs turn with the row, odd pairs with the column. Each axis gets half of the head
dimension and the whole range of frequencies; and because every pair keeps the frequency it has in the model under
test, tokens at (p, p), the text, are rotated exactly as the model itself rotates position p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_patch.core.errors import InputError


def frequencies(dimension: int, base: float = 10000.0) -> Tensor:
    """RoPE's default frequencies base^(-2i/d) of the d/2 pairs, float32 [d/2]."""
    return base ** -(torch.arange(0, dimension, 2, dtype=torch.float32) / dimension)


def rotary_2d(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `apply_rotary_pos_emb`, turning even pairs by the row and odd pairs by the column.

    Args:
        positions: float32 (or integer) [..., tokens, 2], (row, column).
        inv_freq: float32 [d/2], frequency of each pair; d/2 must be even so that both axes get the same share.

    Returns:
        (cos, sin), each float32 [..., tokens, d].

    Raises:
        InputError: the dimension cannot be halved into pairs for each axis.
    """
    pairs = inv_freq.shape[0]
    if pairs % 2:
        raise InputError(f"2-D rotary needs a dimension that is a multiple of 4, got {2 * pairs}")
    axis = torch.arange(pairs, device=positions.device) % 2
    angles = positions[..., axis].to(torch.float32) * inv_freq.to(device=positions.device, dtype=torch.float32)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotary_1d(count: int, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own rotary for consecutive places 0..count-1: (cos, sin), each float32 [1, count, d]."""
    index = torch.arange(count, device=inv_freq.device)
    return rotary_2d(torch.stack([index, index], dim=-1)[None], inv_freq)
