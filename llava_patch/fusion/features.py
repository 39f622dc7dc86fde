"""Fused features from a tower's hidden states, and where a tap is detached (`detached_or_not`). Mathematics only."""

from collections.abc import Sequence
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_patch.core.errors import SettingError
from llava_patch.fusion.base import STI_POOL, Group, Join, Taps

detaching: ContextVar[bool | None] = ContextVar("llava_patch_detaching", default=None)
"""What a measurement asks of every tap: True detaches all, False none; None: as each group says."""


def detached_or_not(states: Tensor, group: Group) -> Tensor:
    """A block's output [images, tokens, channels], under stop-gradient where its tap is: the one place where a tap is.

    Source: "Detached Skip-Links and R-Probe", section 3, eq. 1, sg(.). `detaching` says otherwise while gradients are
    measured.
    """
    asked = detaching.get()
    return states.detach() if (group.detached if asked is None else asked) else states


def tap(hidden_states: Sequence[Tensor], group: Group) -> Tensor:
    """One tap: a block's output or the mean of several, detached where the group says so.

    `hidden_states` are h[0] (embedding) to h[N], each [images, tokens, channels]; so is the tap, of the same dtype.
    """
    states = [detached_or_not(hidden_states[block], group) for block in group.blocks]
    return states[0] if len(states) == 1 else torch.stack(states).sum(0) / len(states)


def merge_patches(patches: Tensor, grid: tuple[int, int], size: int, padding: bool) -> Tensor:
    """Join size x size neighbouring patches on channels, each square row by row; size 1 leaves them as they are.

    [images, rows * columns, channels] to [images, ceil(rows / size) * ceil(columns / size), size * size * channels];
    `padding` pads a `grid` (rows, columns) that `size` does not divide with zeros, at the right and below.
    SettingError: another number of patches than the grid has, or a grid that `size` does not divide.
    """
    if size == 1:
        return patches
    images, tokens, channels = patches.shape
    rows, columns = grid
    if tokens != rows * columns:
        raise SettingError(f"merge_size = {size}: {tokens} patches do not form the tower's grid of {rows} x {columns}")
    check_grid(grid, size, padding)
    square = patches.view(images, rows, columns, channels)
    down, right = -rows % size, -columns % size
    if down or right:
        square = F.pad(square, (0, 0, 0, right, 0, down))
    square = square.view(images, (rows + down) // size, size, (columns + right) // size, size, channels)
    return square.transpose(2, 3).reshape(images, -1, size * size * channels)


def check_grid(grid: tuple[int, int], size: int, padding: bool) -> None:
    """Refuse a grid that `size` does not divide unless padding is asked for (SettingError)."""
    if (grid[0] % size or grid[1] % size) and not padding:
        raise SettingError(
            f"merge_size = {size} does not divide this tower's grid of {grid[0]} x {grid[1]} patches: set "
            "merge_padding = True to pad it with zeros, or merge_size = 1"
        )


def fuse(hidden_states: Sequence[Tensor], taps: Taps, prefix: int, grid: tuple[int, int]) -> Tensor:
    """The main feature with its taps, tokens before the patches included.

    On channels (eq. 1 of the Skip-Links paper; SCI, DCI and direct fusion): [main ; taps] in the order of the taps. As
    tokens (STI): the taps' patches, averaged over `STI_POOL` neighbours, behind the main feature's. With merge_size,
    patches of every feature are joined first. In decoder layers (DeepStack): the main feature alone.

    `hidden_states` are h[0] (embedding) to h[N], each [images, prefix + patches, channels], the patches of a `grid`
    (rows, columns); the result is [images, prefix + tokens, columns * merge_size^2 * channels]. The `prefix` tokens (1
    for a CLS token) pass with the channels; where patches are merged they have no meaning any more and become zeros.
    """
    main = hidden_states[taps.main]
    groups = () if taps.join is Join.LAYERS else taps.groups
    features = [main, *(tap(hidden_states, group) for group in groups)]
    if taps.keeps_tokens:
        return torch.cat(features, dim=-1) if groups else main
    parts = [_patches(states, taps, prefix, grid) for states in features]
    if taps.join is Join.TOKENS:  # means of neighbours; a rest is left out
        pooled = (F.avg_pool1d(part.transpose(1, 2), STI_POOL, STI_POOL).transpose(1, 2) for part in parts[1:])
        fused = torch.cat([parts[0], *pooled], dim=1)
    else:
        fused = torch.cat(parts, dim=-1)
    if not prefix:
        return fused
    first = main[:, :prefix] if taps.merge_size == 1 else fused.new_zeros(len(fused), prefix, fused.shape[-1])
    return torch.cat([first, fused], dim=1)


def stacked(hidden_states: Sequence[Tensor], taps: Taps, dropped: int, grid: tuple[int, int]) -> list[Tensor]:
    """DeepStack's taps: each [images, tokens, merge_size^2 * channels], of the tokens that the projector gets.

    Arguments as in `fuse`; `dropped`: how many tokens the host drops at the front; where patches are merged, those
    before the patches.
    """
    return [_patches(tap(hidden_states, group), taps, dropped, grid) for group in taps.groups]


def _patches(states: Tensor, taps: Taps, prefix: int, grid: tuple[int, int]) -> Tensor:
    return merge_patches(states[:, prefix:], grid, taps.merge_size, taps.merge_padding)
