"""The widened layer's arithmetic."""

import pytest
import torch
from torch import nn

from llava_patch.core.errors import SettingError
from llava_patch.fusion.linear import FusedLinear
from tests.support.models import needs_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 17), (1, 577), (2, 7)])
@pytest.mark.parametrize("drops_cls", [True, False])
def test_zero_columns_leave_the_output_bit_for_bit(dtype, shape, drops_cls):
    """Also when the host hands over a slice (its CLS token dropped), which rounds differently in half precision."""
    needs_cpu(dtype)
    torch.manual_seed(0)
    stock = nn.Linear(96, 112).to(dtype)
    states = [torch.randn(*shape, 96).to(dtype) for _ in range(4)]
    main, features = states[0], torch.cat(states, -1)
    if drops_cls:
        main, features = main[:, 1:], features[:, 1:]
    fused = FusedLinear.grow(stock, 4, 1, zero_start=True)
    assert fused.weight.shape == (112, 4 * 96)
    assert torch.equal(fused(features), stock(main))
    assert torch.equal(fused.stock().weight, stock.weight)


def test_a_fresh_layer_uses_every_column():
    fused = FusedLinear.grow(nn.Linear(8, 4), 3, 1, zero_start=False)
    assert (fused.weight != 0).all()
    assert fused.weight.abs().max() <= 24**-0.5  # nn.Linear's bound at the full width


def test_one_stored_weight_does_the_work_of_a_wide_linear():
    torch.manual_seed(0)
    fused = FusedLinear.grow(nn.Linear(8, 4), 3, 1, zero_start=False)
    x = torch.randn(5, 24)
    assert torch.allclose(fused(x), nn.functional.linear(x, fused.weight, fused.bias), atol=1e-6)
    assert [n for n, _ in fused.named_parameters()] == ["weight", "bias"]


def test_merged_patches_start_on_their_mean():
    torch.manual_seed(0)
    stock = nn.Linear(8, 4)
    fused = FusedLinear.grow(stock, 3, 2, zero_start=True)
    assert fused.weight.shape == (4, 3 * 4 * 8)
    patches = torch.randn(5, 4, 8)
    features = torch.cat([patches.flatten(1), torch.randn(5, 2 * 4 * 8)], -1)
    assert torch.allclose(fused(features), stock(patches.mean(1)), atol=1e-6)
    assert torch.allclose(fused.stock().weight, stock.weight, atol=1e-7)
    alone = FusedLinear.grow(stock, 1, 2, zero_start=True)
    assert torch.allclose(alone(patches.flatten(1)), stock(patches.mean(1)), atol=1e-6)


def test_features_of_an_unpatched_tower_are_refused():
    with pytest.raises(SettingError, match="takes 24 channels"):
        FusedLinear.grow(nn.Linear(8, 4), 3, 1, True)(torch.randn(2, 8))
