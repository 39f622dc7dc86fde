"""R-Probe, step 3 of 8: where the visual tokens sit on the image's grid, and which cell of pixels each covers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.fusion.base import STI_POOL
from llava_patch.probe.sequence import TokenGrid

NO_CELL = -1  # of a token that has no pixels of its own


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
