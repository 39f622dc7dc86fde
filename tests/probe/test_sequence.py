import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_patch.core.errors import InputError
from llava_patch.probe.sequence import (
    TokenGrid,
    arrange,
    merge_size,
    patchify,
    target_mask,
    unpatchify,
)
from tests.support.probes import grid_sequence

GRIDS = [TokenGrid(4, 4, 14), TokenGrid(2, 2, 28), TokenGrid(2, 3, 14)]


def unique_pixels(grid: TokenGrid) -> torch.Tensor:
    shape = (2, 3, grid.rows * grid.cell, grid.columns * grid.cell)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_tokens_pixels_are_the_patch_under_it(grid):
    pixels = unique_pixels(grid)
    patches = patchify(pixels, grid)
    assert patches.shape == (2, grid.tokens, grid.cell**2 * 3)
    for token, (row, column) in enumerate(grid.positions().tolist()):
        y, x = row * grid.cell, column * grid.cell
        under = pixels[:, :, y : y + grid.cell, x : x + grid.cell]
        assert torch.equal(patches[:, token], under.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, grid), pixels)


def test_patchify_refuses_another_size():
    with pytest.raises(InputError, match="56"):
        patchify(torch.zeros(1, 3, 70, 70), TokenGrid(4, 4, 14))


@settings(deadline=None, max_examples=60)
@given(
    grid=st.sampled_from(GRIDS),
    corners=st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
    shape=st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)),
)
def test_targets_are_the_tokens_that_meet_the_box(grid, corners, shape):
    width, height = grid.columns * grid.cell, grid.rows * grid.cell
    x0, y0 = corners[0] * width, corners[1] * height
    box = [x0, y0, min(width, x0 + shape[0] * width), min(height, y0 + shape[1] * height)]
    box = torch.tensor([box], dtype=torch.float32)
    if not (box[0, 0] < box[0, 2] and box[0, 1] < box[0, 3]):
        return
    x0, y0, x1, y1 = box[0].tolist()
    expected = []
    for row, column in grid.positions().tolist():
        left, top = column * grid.cell, row * grid.cell
        across = min(x1, left + grid.cell) - max(x0, left)
        down = min(y1, top + grid.cell) - max(y0, top)
        expected.append(across > 0 and down > 0)
    assert target_mask(box, grid)[0].tolist() == expected
    assert any(expected)


def test_edges_of_a_box_do_not_reach_into_the_next_token():
    mask = target_mask(torch.tensor([[14.0, 28.0, 28.0, 42.0], [20.0, 20.0, 20.5, 20.5]]), TokenGrid(4, 4, 14))
    assert mask.nonzero().tolist() == [[0, 9], [1, 5]]


def test_order_is_context_text_target_padding():
    grid = TokenGrid(2, 3, 14)
    target = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    sequence = grid_sequence(target, torch.tensor([1, 3]), grid)
    # Image tokens are 0..5, text tokens 6..8.
    assert sequence.order.tolist() == [[0, 2, 3, 5, 6, 1, 4, 7, 8], [6, 7, 8, 0, 1, 2, 3, 4, 5]]
    assert sequence.valid.tolist() == [[True] * 7 + [False] * 2, [True] * 9]
    assert sequence.target.nonzero().tolist() == [[0, 5], [0, 6], *([1, s] for s in range(3, 9))]
    # (row, column) of the whole image, whatever the order; text goes on at (p, p) past the grid.
    assert sequence.positions[0].tolist()[:7] == [[0, 0], [0, 2], [1, 0], [1, 2], [3, 3], [0, 1], [1, 1]]
    assert sequence.positions[1].tolist()[:4] == [[3, 3], [4, 4], [5, 5], [0, 0]]


def test_arrange_takes_each_entry_to_its_slot():
    grid = TokenGrid(2, 2, 14)
    target = torch.tensor([[True, False, False, True]])
    sequence = grid_sequence(target, torch.tensor([2]), grid)
    image = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    text = torch.tensor([[[10.0], [11.0]]])
    assert arrange(image, text, sequence.order)[0, :, 0].tolist() == [1, 2, 10, 11, 0, 3]


def test_merge_size_is_read_off_the_token_count():
    assert merge_size(576, 24, 24) == 1
    assert merge_size(144, 24, 24) == 2
    for tokens in (577, 1152, 100):  # a CLS token, tokens without a patch, no square group
        with pytest.raises(InputError, match=str(tokens)):
            merge_size(tokens, 24, 24)
