"""Whether weights or precision are to blame for numbers that are not finite."""

import pytest
import torch

from llava_patch.core.finite import first_not_finite, why_not_finite

SOUND = [("a", torch.ones(3)), ("ids", torch.arange(3)), ("away", torch.empty(2, device="meta"))]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_first_tensor_that_is_not_finite_is_named(value, dtype):
    broken = torch.ones(4, 4, dtype=dtype)
    broken[2, 1] = value
    assert first_not_finite([*SOUND, ("b", broken), ("c", broken)]) == "b"
    assert first_not_finite(SOUND) is None


def test_large_numbers_whose_sum_overflows_are_finite():
    assert first_not_finite([("large", torch.full((8,), 3e38)), ("half", torch.full((8,), 6e4).half())]) is None


def test_broken_weights_are_named_and_no_precision_is_advised():
    said = why_not_finite("the states", torch.float32, [("w", torch.tensor([float("nan")]))])
    assert "w holds NaN" in said and "earlier checkpoint" in said and "--dtype" not in said


@pytest.mark.parametrize("dtype, advice", [("float16", "bfloat16 or float32"), ("bfloat16", "--dtype float32")])
def test_a_precision_that_overflows_is_told_which_one_holds_more(dtype, advice):
    assert advice in why_not_finite("the states", getattr(torch, dtype), SOUND)


def test_float32_is_not_advised_to_a_model_that_is_in_it():
    said = why_not_finite("the states", torch.float32, SOUND)
    assert "--dtype" not in said and "in float32, although" in said
