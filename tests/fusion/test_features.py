"""Fused features against each method's published definition, written down plainly; stop-gradient; merged patches."""

import pytest
import torch

from llava_patch.core.errors import SettingError
from llava_patch.fusion.base import choose_taps
from llava_patch.fusion.features import fuse, merge_patches, stacked
from llava_patch.settings.methods import DeepStack, DenseConnector, DirectFusion, SkipLinks

N, GRID, D = 24, (4, 8), 5


def _states(dtype=torch.float32, prefix=1, grad=False):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, prefix + GRID[0] * GRID[1], D, generator=generator).to(dtype).requires_grad_(grad)
        for _ in range(N + 1)
    ]


def _fuse(settings, states, prefix=1):
    return fuse(states, choose_taps(settings, N, 23), prefix, GRID)


def _mean(states, blocks):
    total = torch.zeros_like(states[0])
    for b in blocks:
        total = total + states[b]
    return total / len(blocks)


@pytest.mark.parametrize("prefix", [0, 1])
def test_channels_as_published(prefix):
    h = _states(prefix=prefix)
    skip = torch.cat([h[23], h[18], h[12], h[6]], -1)
    assert torch.equal(_fuse(SkipLinks(stride=6), h, prefix), skip)
    assert torch.equal(_fuse(DenseConnector(kind="sci"), h, prefix), torch.cat([h[23], h[7], h[15]], -1))
    dci = torch.cat([h[23], _mean(h, range(12)), _mean(h, range(12, 24))], -1)
    assert torch.allclose(_fuse(DenseConnector(), h, prefix), dci, atol=1e-6)  # sums in another order
    paper = DenseConnector(groups=(tuple(range(1, 13)), tuple(range(12, 24))))
    expected = torch.cat([h[23], _mean(h, range(1, 13)), _mean(h, range(12, 24))], -1)
    assert torch.allclose(_fuse(paper, h, prefix), expected, atol=1e-6)
    assert torch.equal(_fuse(DirectFusion(), h, prefix), torch.cat([h[23], h[3], h[18]], -1))
    both = torch.cat([h[23], _mean(h, range(1, 13)), _mean(h, range(13, 25))], -1)
    assert torch.allclose(_fuse(DirectFusion(layers="all"), h, prefix), both, atol=1e-6)
    assert _fuse(DeepStack(), h, prefix) is h[23]  # the main feature alone


@pytest.mark.parametrize("prefix", [0, 1])
def test_tokens_as_published(prefix):
    h = _states(prefix=prefix)
    fused = _fuse(DenseConnector(kind="sti"), h, prefix)
    for image in range(2):
        expected = [h[23][image, i] for i in range(prefix + 32)]
        for block in (7, 15):
            for window in range(32 // 8):
                tokens = [h[block][image, prefix + 8 * window + i] for i in range(8)]
                expected.append(sum(tokens) / 8)
        assert torch.allclose(fused[image], torch.stack(expected), atol=1e-6)
        assert torch.equal(fused[image, : prefix + 32], h[23][image])


def test_a_rest_of_tokens_is_not_pooled():
    h = [torch.randn(1, 1 + 15, D) for _ in range(N + 1)]
    taps = choose_taps(DenseConnector(kind="sti"), N, 23)
    assert fuse(h, taps, 1, (3, 5)).shape[1] == 1 + 15 + 2
    assert taps.tokens((3, 5)) == 15 + 2


def test_deep_stack_takes_patches_in_order_of_depth():
    h = _states()
    found = stacked(h, choose_taps(DeepStack(), N, 23), 1, GRID)
    assert all(torch.equal(t, h[b][:, 1:]) for t, b in zip(found, (6, 12, 18, 23), strict=True))


EVERY = [
    SkipLinks(stride=6, detach=2), DenseConnector(), DenseConnector(kind="sci", detach=(1,)),
    DenseConnector(kind="sti"), DirectFusion(detach=(1,)), DirectFusion(layers="all", detach=1),
    SkipLinks(stride=6, detach=3, merge_size=2), DenseConnector(kind="sti", merge_size=2),
]  # fmt: skip


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_only_taps_that_are_not_detached_have_a_gradient(settings):
    states = _states(grad=True)
    taps = choose_taps(settings, N, 23)
    fuse(states, taps, 1, GRID).square().sum().backward()
    expected = {23} | {b for g in taps.groups if not g.detached for b in g.blocks}
    assert {i for i, s in enumerate(states) if s.grad is not None} == expected
    assert any(g.detached for g in taps.groups)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_the_output_does_not_depend_on_detach(settings):
    import dataclasses

    states = _states()
    all_of_them = len(choose_taps(settings, N, 23).groups)
    outputs = [_fuse(dataclasses.replace(settings, detach=d), states) for d in range(all_of_them + 1)]
    assert all(torch.equal(o, outputs[0]) for o in outputs)


def test_merged_patches_are_squares_row_by_row():
    rows, columns = 4, 6
    patches = torch.arange(rows * columns, dtype=torch.float32).view(1, -1, 1)
    merged = merge_patches(patches, (rows, columns), 2, padding=False)
    assert merged.shape == (1, 6, 4)
    for token in range(6):
        top, left = 2 * (token // 3), 2 * (token % 3)
        square = [(top + i) * columns + left + j for i in (0, 1) for j in (0, 1)]
        assert merged[0, token].tolist() == square
    assert merge_patches(patches, (rows, columns), 1, padding=False) is patches


def test_padding_only_where_asked_for():
    patches = torch.arange(1, 10, dtype=torch.float32).view(1, 9, 1)
    with pytest.raises(
        SettingError, match=r"merge_size = 2 does not divide this tower's grid of 3 x 3 .*merge_padding"
    ):
        merge_patches(patches, (3, 3), 2, padding=False)
    merged = merge_patches(patches, (3, 3), 2, padding=True)
    assert merged.tolist() == [[[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]]
    taps = choose_taps(SkipLinks(merge_size=2, merge_padding=True), N, 23)
    assert taps.tokens((27, 27)) == 14 * 14
    with pytest.raises(SettingError, match="8 patches do not form the tower's grid"):
        merge_patches(patches[:, :8], (3, 3), 2, padding=True)


def test_merging_comes_before_joining():
    h = _states()
    fused = _fuse(SkipLinks(stride=6, merge_size=2), h)
    parts = [merge_patches(h[b][:, 1:], GRID, 2, False) for b in (23, 18, 12, 6)]
    assert torch.equal(fused[:, 1:], torch.cat(parts, -1))
    assert fused[:, 0].abs().max() == 0  # the host drops it


def test_bfloat16_means_are_rounded_once():
    h = _states(torch.bfloat16)
    fused = _fuse(DenseConnector(), h)
    exact = _mean([s.double() for s in h], range(12)).float()
    # The published code sums in the tower's precision (float32 inside the kernel) and divides: two roundings.
    assert torch.allclose(fused[..., D : 2 * D].float(), exact, rtol=2**-7, atol=2**-8)
