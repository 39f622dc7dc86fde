"""R-Probe, steps 3 and 6 of 8: where visual tokens lie on the image (`Layout`), and their sequence (`build_sequence`).

Pure mathematics on tensors; no host is imported. Source: "Detached Skip-Links and R-Probe", section 5.2, eq. 8: the
input is [context image tokens ; text tokens ; target image tokens], and positions are given before reordering.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.fusion.base import STI_POOL

CHANNELS = 3
NO_CELL = -1  # of a token that has no pixels of its own


@dataclass(frozen=True)
class TokenGrid:
    """How an image's visual tokens tile its pixels in raster order.

    `cell` is the side in pixels of the square under one token (patch size x merge size; 14 on LLaVA-1.5).
    """

    rows: int
    columns: int
    cell: int

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.rows * self.columns

    @property
    def pixels(self) -> int:
        """Values under one token: cell x cell x 3 (588 for cell 14, 2352 for cell 28)."""
        return self.cell * self.cell * CHANNELS

    @property
    def text_start(self) -> int:
        """The first text token sits at (p, p) for this p, the first place past the grid on both axes."""
        return max(self.rows, self.columns)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """(row, column) of every token, int64 [tokens, 2]."""
        index = torch.arange(self.tokens, device=device)
        return torch.stack([index // self.columns, index % self.columns], dim=-1)


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of an image (tile) in the order in which the host gives them.

    `positions` are float32 [tokens, 2], (row, column) in cells of `grid`; `cells` int64 [tokens], the raster number
    of each token's cell, -1: none.
    """

    grid: TokenGrid
    positions: Tensor
    cells: Tensor

    @property
    def text_start(self) -> int:
        """The first text token sits at (p, p) for this p, the first place past all tokens on both axes."""
        return max(self.grid.text_start, int(self.positions.max().floor()) + 1)


@dataclass(frozen=True, eq=False)
class ProbeSequence:
    """The order of a batch. Slot s of sample b holds entry `order[b, s]` of [image tokens ; padded text tokens].

    `order` is int64 [batch, slots], slots = image tokens + widest text; `positions` float32 [batch, slots, 2], (row,
    column) of what lies in each; `valid` bool [batch, slots], False at padding, which always lies at the end; `target`
    bool [batch, slots], where a target image token is read out.
    """

    order: Tensor
    positions: Tensor
    valid: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> "ProbeSequence":
        """The same sequence on another device."""
        return ProbeSequence(*(t.to(device) for t in (self.order, self.positions, self.valid, self.target)))


def merge_size(tokens: int, patch_rows: int, patch_columns: int) -> int:
    """How many patches on a side one of an image's visual tokens covers.

    An InputError where they do not tile the grid (a CLS token was kept, or tokens without a patch were added).
    """
    for merge in range(1, min(patch_rows, patch_columns) + 1):
        if patch_rows % merge == 0 == patch_columns % merge and tokens * merge**2 == patch_rows * patch_columns:
            return merge
    raise InputError(
        f"{tokens} visual tokens do not tile a grid of {patch_rows} x {patch_columns} patches: R-Probe places one "
        "token a patch, or a square group of patches, and the tokens of llava_patch's own fusions"
    )


def square_layout(
    patches: tuple[int, int], patch_size: int, merge: int = 1, pooled: int = 0, prefix: int = 0, dropped: int = 0
) -> Layout:
    """Tokens of one image that the tower sees as a whole; the host drops the first `dropped` of them.

    They are the tower's prefix tokens (CLS, registers), one token for each merge x merge of the (rows, columns)
    patches, then for each of STI's `pooled` taps the means of `STI_POOL` tokens that follow each other in raster order.
    A prefix token sits in the middle of the image, since it stands for all of it; a mean at the mean of the places that
    it covers; neither has a cell. Where merge does not divide the patches, the tokens at the right and below cover
    padding as well and have no cell.
    """
    rows, columns = (-(-n // merge) for n in patches)
    grid = TokenGrid(patches[0] // merge, patches[1] // merge, patch_size * merge)
    places = TokenGrid(rows, columns, grid.cell).positions()
    inside = (places[:, 0] < grid.rows) & (places[:, 1] < grid.columns)
    cells = torch.where(inside, places[:, 0] * grid.columns + places[:, 1], NO_CELL)
    main = places.to(torch.float32)
    count = len(main) // STI_POOL
    means = main[: count * STI_POOL].unflatten(0, (count, STI_POOL)).mean(1).repeat(pooled, 1)
    middle = main.new_tensor([[(rows - 1) / 2, (columns - 1) / 2]]).expand(prefix, 2)
    cells = torch.cat([cells.new_full((prefix,), NO_CELL), cells, cells.new_full((len(means),), NO_CELL)])
    return Layout(grid, torch.cat([middle, main, means])[dropped:], cells[dropped:])


def tiled_layout(tile: Layout, tiles: tuple[int, int], image: tuple[float, float, float, float], side: int) -> Layout:
    """Tokens of an image cut into an overview and tiles of one big grid, (1 + rows * columns) * tokens, tile by tile.

    `tiles` are (rows, columns) of side pixels; `image` is (left, top, width, height) of the image on the tiles' pixels:
    the overview shows just that, stretched, and has no cells. An InputError where a tile's cells do not cover it.
    """
    small = tile.grid
    if (small.rows * small.cell, small.columns * small.cell) != (side, side):
        raise InputError(
            f"merge_padding: cells of {small.cell} pixels do not cover a tile of {side}, so the tiles of anyres do not "
            'form one grid: use RProbe.image_mode = "resize", or a merge_size that divides the tower\'s patches'
        )
    grid = TokenGrid(tiles[0] * small.rows, tiles[1] * small.columns, small.cell)
    corners = (TokenGrid(*tiles, side).positions() * torch.tensor([small.rows, small.columns]))[:, None]
    positions = tile.positions + corners  # of each tile's first row and column
    row, column = tile.cells // small.columns + corners[..., 0], tile.cells % small.columns + corners[..., 1]
    cells = torch.where(tile.cells >= 0, row * grid.columns + column, NO_CELL)
    left, top, width, height = image
    share = (tile.positions + 0.5) / torch.tensor([small.rows, small.columns])
    overview = (share * torch.tensor([height, width]) + torch.tensor([top, left])) / grid.cell - 0.5
    unseen = torch.full_like(tile.cells, NO_CELL)
    return Layout(grid, torch.cat([overview, positions.flatten(0, 1)]), torch.cat([unseen, cells.flatten()]))


def target_mask(boxes: Tensor, grid: TokenGrid) -> Tensor:
    """Tokens whose pixels meet the text box, bool [batch, tokens]; boxes are float [batch, 4] on the processed image.

    Each is (x0, y0, x1, y1) in pixels; one of any positive area inside the image meets at least one token.
    """
    low = grid.positions(boxes.device) * grid.cell
    high = low + grid.cell
    x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
    meets_row = (y0 < high[:, 0]) & (y1 > low[:, 0])
    meets_column = (x0 < high[:, 1]) & (x1 > low[:, 1])
    return meets_row & meets_column


def build_sequence(
    target: Tensor, valid: Tensor, positions: Tensor, text_counts: Tensor, text_start: Tensor, width: int | None = None
) -> ProbeSequence:
    """Order the tokens of a batch as [context ; text ; target ; padding] and give each its position.

    Image tokens keep the (row, column) they have in the whole image; text token j sits at (p + j, p + j) past it.
    Padding comes last, so under a causal mask no valid token ever sees it.

    Args:
        target: bool [batch, image tokens], tokens to be read out.
        valid: bool [batch, image tokens], False at padding of images that have fewer tokens than others.
        positions: float32 [batch, image tokens, 2], (row, column) of each; what stands at padding does not matter.
        text_counts: int64 [batch], text tokens of each sample.
        text_start: int64 [batch], the p of each sample: the first place past its grid on both axes.
        width: to which the text tokens are padded; None: the largest count.
    """
    device = target.device
    width = int(text_counts.max()) if width is None else width
    text_index = torch.arange(width, device=device)
    is_text = text_index < text_counts[:, None]
    # Rank of the group that an entry belongs to; a stable sort keeps raster and reading order inside each group.
    context, text, targets, padding = range(4)
    image = torch.where(target, targets, context).masked_fill(~valid, padding)
    group = torch.cat([image, torch.where(is_text, text, padding)], dim=1)
    order = torch.argsort(group, dim=1, stable=True)
    group = group.gather(1, order)
    text_positions = (text_start[:, None] + text_index)[..., None].expand(-1, -1, 2)
    joined = torch.cat([positions, text_positions.to(positions.dtype)], dim=1)
    positions = joined.gather(1, order[..., None].expand(-1, -1, 2))
    return ProbeSequence(order, positions, group != padding, group == targets)


def arrange(image_tokens: Tensor, text_tokens: Tensor, order: Tensor) -> Tensor:
    """Put embeddings into `ProbeSequence.order`: [batch, slots, hidden].

    They are [batch, image tokens, hidden] and [batch, text width, hidden]; what stands at padding does not matter.
    """
    joined = torch.cat([image_tokens, text_tokens], dim=1)
    return joined.gather(1, order[..., None].expand(-1, -1, joined.shape[-1]))


def patchify(pixel_values: Tensor, grid: TokenGrid) -> Tensor:
    """Cut images [images, 3, height, width] into the pixels under each token: [images, tokens, cell x cell x 3].

    Tokens are in raster order, values in (row, column, channel) order; height = rows x cell, width = columns x cell.
    """
    expected = (CHANNELS, grid.rows * grid.cell, grid.columns * grid.cell)
    if tuple(pixel_values.shape[1:]) != expected:
        raise InputError(f"pixel_values of shape {tuple(pixel_values.shape)}: this tower's images are {expected}")
    cells = pixel_values.reshape(-1, CHANNELS, grid.rows, grid.cell, grid.columns, grid.cell)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(-1, grid.tokens, grid.pixels)


def unpatchify(patches: Tensor, grid: TokenGrid) -> Tensor:
    """Undo `patchify`: [images, tokens, cell x cell x 3] to [images, 3, height, width]."""
    cells = patches.reshape(-1, grid.rows, grid.columns, grid.cell, grid.cell, CHANNELS)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, CHANNELS, grid.rows * grid.cell, grid.columns * grid.cell)


def frequencies(dimension: int, base: float = 10000.0) -> Tensor:
    """RoPE's default frequencies base^(-2i/d) of the d/2 pairs, float32 [d/2]."""
    return base ** -(torch.arange(0, dimension, 2, dtype=torch.float32) / dimension)


def rotary_2d(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) for `apply_rotary_pos_emb`, float32 [..., tokens, d]: even pairs turn by the row, odd by the column.

    `rotate_half` pairs dimension i with i + d/2, so what is shared out between the axes is pairs: each axis gets half
    of them and the whole range of frequencies. Every pair keeps the frequency it has in the model under test, so tokens
    at (p, p), the text, are rotated exactly as the model itself rotates p.

    Positions are float32 (or integer) [..., tokens, 2], (row, column); `inv_freq` is float32 [d/2], the frequency of
    each pair. An InputError where d/2 is odd, so that the axes would not get the same share.
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
    return rotary_2d(torch.arange(count, device=inv_freq.device)[None, :, None].expand(-1, -1, 2), inv_freq)
