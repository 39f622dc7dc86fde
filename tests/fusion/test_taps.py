"""Which blocks are tapped, and the widened layer's arithmetic."""

import pytest
import torch
from torch import nn

from llava_patch.errors import SettingError
from llava_patch.fusion.taps import FusedLinear, choose_taps, fuse
from llava_patch.settings import SkipLinks


@pytest.mark.parametrize(
    ("stride", "main", "blocks", "detached"),
    [
        (6, 24, (6, 12, 18, 23), 2),  # the paper's setting: 6, 12 detached, 18, 23 not
        (6, 23, (6, 12, 18), 2),  # LLaVA-1.5
        (12, 23, (12,), 1),
        (4, 23, (4, 8, 12, 16, 20), 3),
        (3, 24, (3, 6, 9, 12, 15, 18, 21, 23), 4),
        (24, 22, (23,), 0),
    ],
)
def test_taps_by_stride(stride, main, blocks, detached):
    taps = choose_taps(SkipLinks(stride=stride), 24, main)
    assert (taps.blocks, taps.detached) == (blocks, detached)


def test_taps_by_list():
    taps = choose_taps(SkipLinks(layers=(9, 3), detach=1), 24, 23)
    assert (taps.blocks, taps.detached, taps.deepest) == ((3, 9), 1, 23)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SkipLinks(layers=(3, 25)), r"block 25 is outside this tower's 1..24"),
        (SkipLinks(stride=30), "no tap left"),
        (SkipLinks(layers=(23,)), "no tap left"),
        (SkipLinks(stride=6, detach=4), "only 3 taps"),
    ],
)
def test_impossible_taps(settings, message):
    with pytest.raises(SettingError, match=message):
        choose_taps(settings, 24, 23)


@pytest.mark.parametrize(
    "arguments",
    [{"stride": 0}, {"detach": -1}, {"layers": ()}, {"layers": (0,)}, {"layers": (3, 3)}, {"merge_size": 3},
     {"train_tower": "some"}, {"train_tower": 0}, {"stride": True}],
)  # fmt: skip
def test_values_that_no_tower_can_take(arguments):
    with pytest.raises(SettingError, match=f"SkipLinks.{next(iter(arguments))}"):
        SkipLinks(**arguments)


def test_deepest_tap_comes_first_and_columns_do_not_move_with_detach():
    states = [torch.full((1, 2, 1), float(i)) for i in range(9)]
    fused = [fuse(states, choose_taps(SkipLinks(layers=(2, 4, 6), detach=d), 8, 7)) for d in range(4)]
    assert fused[0][0, 0].tolist() == [7, 6, 4, 2]
    assert all(torch.equal(f, fused[0]) for f in fused)


def test_shallow_taps_have_no_gradient():
    states = [torch.full((1, 2, 1), float(i), requires_grad=True) for i in range(9)]
    fuse(states, choose_taps(SkipLinks(layers=(2, 4, 6), detach=2), 8, 7)).sum().backward()
    assert [i for i, s in enumerate(states) if s.grad is not None] == [6, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 17), (1, 577), (2, 7)])
@pytest.mark.parametrize("drops_cls", [True, False])
def test_zero_columns_leave_the_output_bit_for_bit(dtype, shape, drops_cls):
    """Also when the host hands over a slice (its CLS token dropped), which rounds differently in half precision."""
    torch.manual_seed(0)
    stock = nn.Linear(96, 112).to(dtype)
    states = [torch.randn(*shape, 96).to(dtype) for _ in range(4)]
    main, features = states[0], torch.cat(states, -1)
    if drops_cls:
        main, features = main[:, 1:], features[:, 1:]
    fused = FusedLinear.grow(stock, 3, zero_start=True)
    assert fused.weight.shape == (112, 4 * 96)
    assert torch.equal(fused(features), stock(main))
    assert torch.equal(fused.stock().weight, stock.weight)


def test_a_fresh_layer_uses_every_column():
    fused = FusedLinear.grow(nn.Linear(8, 4), 2, zero_start=False)
    assert (fused.weight != 0).all()
    assert fused.weight.abs().max() <= 24**-0.5  # nn.Linear's bound at the full width


def test_one_stored_weight_does_the_work_of_a_wide_linear():
    torch.manual_seed(0)
    fused = FusedLinear.grow(nn.Linear(8, 4), 2, zero_start=False)
    x = torch.randn(5, 24)
    assert torch.allclose(fused(x), nn.functional.linear(x, fused.weight, fused.bias), atol=1e-6)
    assert [n for n, _ in fused.named_parameters()] == ["weight", "bias"]


def test_features_of_an_unpatched_tower_are_refused():
    with pytest.raises(SettingError, match="takes 24 channels"):
        FusedLinear.grow(nn.Linear(8, 4), 2, True)(torch.randn(2, 8))
