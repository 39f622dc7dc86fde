"""The projector's first layer for a fused feature. Mathematics only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_patch.core.errors import SettingError
from llava_patch.hosts import zero


class FusedLinear(nn.Linear):
    """A projector's first Linear, widened to [main ; taps] and stored as one weight [out, columns * m^2 * d].

    The output is computed as Linear(main) + taps @ W_taps^T: with zero tap columns it then equals the stock layer's
    bit for bit, which one wide product does not (another reduction order).
    """

    def __init__(self, stock_features: int, out_features: int, columns: int, merge_size: int, **options: Any) -> None:
        """`nn.Linear`'s own initialisation and options, over `columns` features of m x m patches of d channels."""
        main_features = merge_size**2 * stock_features
        super().__init__(columns * main_features, out_features, **options)
        self.stock_features = stock_features
        self.main_features = main_features
        self.merge_size = merge_size

    @classmethod
    def grow(cls, linear: nn.Linear, columns: int, merge_size: int, zero_start: bool) -> "FusedLinear":
        """Widen a stock layer, d channels wide, to `columns` features (the main one included) of m x m patches.

        DeepSpeed ZeRO-3 may have partitioned it (then every rank must call this, and the result is whole: the engine
        partitions it when it takes the model over). With `zero_start`, for an existing projector, its weights stay and
        new columns start at zero; where patches are merged, it starts on their mean. Without, it has `nn.Linear`'s
        usual initialisation over the whole width (a projector made from scratch).
        """
        weight = linear.weight
        fused = cls(
            linear.in_features, linear.out_features, columns, merge_size, bias=linear.bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        fused.weight.requires_grad_(weight.requires_grad)
        if linear.bias is not None:
            fused.bias.requires_grad_(linear.bias.requires_grad)
        if zero_start and not weight.is_meta:
            with zero.gathered(linear.parameters()), zero.gathered(fused.parameters(), changed=True), torch.no_grad():
                fused.weight.zero_()
                fused.weight[:, : fused.main_features] = linear.weight.repeat(1, merge_size**2) / merge_size**2
                if linear.bias is not None:
                    fused.bias.copy_(linear.bias)
        fused.train(linear.training)
        return fused

    def stock(self) -> nn.Linear:
        """A layer of the stock width with the main columns; where patches are merged, with their sum."""
        return narrowed(self, self)

    def forward(self, features: Tensor) -> Tensor:
        """[..., columns * m^2 * d] to [..., out]."""
        d = self.main_features
        if features.shape[-1] != self.in_features:
            raise SettingError(
                f"the fused projector takes {self.in_features} channels (main + taps), got {features.shape[-1]}: were "
                "the features taken from a tower without this patch?"
            )
        main = features[..., :d]
        # A contiguous input takes a fused multiply-add, a slice does not, and the two round differently in bfloat16:
        # the main part must keep the layout that the stock layer's input would have had.
        if features.is_contiguous():
            main = main.contiguous()
        main = F.linear(main, self.weight[:, :d].contiguous(), self.bias)
        return main if d == self.in_features else main + F.linear(features[..., d:], self.weight[:, d:])


def narrowed(layer: nn.Linear, fused: FusedLinear) -> nn.Linear:
    """A layer of the stock width: of `layer`, which is as wide as `fused`, the columns that are the main ones there."""
    bias, weight = layer.bias is not None, layer.weight
    linear = nn.Linear(fused.stock_features, layer.out_features, bias, weight.device, weight.dtype)
    linear.weight.requires_grad_(weight.requires_grad)
    with zero.gathered(layer.parameters()), torch.no_grad():
        main = weight[:, : fused.main_features]
        linear.weight.copy_(main.unflatten(1, (-1, fused.stock_features)).sum(1))
        if bias:
            linear.bias.copy_(layer.bias)
            linear.bias.requires_grad_(layer.bias.requires_grad)
    return linear
