"""Detached Skip-Links: which blocks are tapped, and the projector's widened first layer. Mathematics only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_patch.errors import SettingError
from llava_patch.hosts import zero
from llava_patch.settings import SkipLinks


@dataclass(frozen=True)
class Taps:
    """Tapped blocks of one tower.

    Attributes:
        main: block of the main feature, 1..N.
        blocks: tapped blocks, shallowest first.
        detached: how many of the shallowest are under stop-gradient.
    """

    main: int
    blocks: tuple[int, ...]
    detached: int

    @property
    def deepest(self) -> int:
        """The deepest block whose output is used."""
        return max(self.main, *self.blocks)


def choose_taps(settings: SkipLinks, n_blocks: int, main: int) -> Taps:
    """Resolve stride and detach for a tower.

    Taps by stride S are the blocks S, 2S, 3S, ...; one that reaches N is clipped to N-1; one equal to the main block
    is dropped (paper section 6.2: S in {3, 4, 6, 12}).

    Args:
        settings: the Skip-Links settings.
        n_blocks: number N of blocks.
        main: block of the main feature.

    Raises:
        SettingError: a tap outside 1..N, no tap left, or more detached taps than taps.
    """
    if settings.layers is not None:
        outside = [b for b in settings.layers if b > n_blocks]
        if outside:
            raise SettingError(
                f"SkipLinks.layers = {settings.layers}: block {outside[0]} is outside this tower's 1..{n_blocks}"
            )
        asked = f"SkipLinks.layers = {settings.layers}"
        candidates: Sequence[int] = settings.layers
    else:
        asked = f"SkipLinks.stride = {settings.stride}"
        strided = range(settings.stride, n_blocks + settings.stride, settings.stride)
        candidates = sorted({min(b, n_blocks - 1) for b in strided if b <= n_blocks})
    blocks = tuple(b for b in candidates if b != main and b >= 1)
    if not blocks:
        raise SettingError(f"{asked}: no tap left on a tower of {n_blocks} blocks whose main feature is block {main}")
    detached = sum(b <= n_blocks / 2 for b in blocks) if settings.detach is None else settings.detach
    if detached > len(blocks):
        raise SettingError(f"SkipLinks.detach = {detached}: there are only {len(blocks)} taps: blocks {blocks}")
    return Taps(main, blocks, detached)


def fuse(hidden_states: Sequence[Tensor], taps: Taps) -> Tensor:
    """Concatenate main feature and taps on channels, deepest tap first, shallow ones under stop-gradient (eq. 1).

    Deepest first puts deep before shallow for every D, so columns never move when D changes.

    Args:
        hidden_states: h[0] (embedding) to h[N], each [images, tokens, channels].
        taps: what to take.

    Returns:
        [images, tokens, (1 + K) * channels].
    """
    parts = [hidden_states[taps.main]]
    for place in reversed(range(len(taps.blocks))):
        tap = hidden_states[taps.blocks[place]]
        parts.append(tap.detach() if place < taps.detached else tap)
    return torch.cat(parts, dim=-1)


class FusedLinear(nn.Linear):
    """A projector's first Linear, widened to [main ; taps] and stored as one weight [out, (1 + K) * d].

    The output is computed as Linear(main) + taps @ W_taps^T: with zero tap columns it then equals the stock layer's
    bit for bit, which one wide product does not (another reduction order).
    """

    def __init__(
        self,
        main_features: int,
        n_taps: int,
        out_features: int,
        bias: bool,
        device: object = None,
        dtype: object = None,
    ) -> None:
        """Make a layer with `nn.Linear`'s usual initialisation over its full width."""
        super().__init__((1 + n_taps) * main_features, out_features, bias=bias, device=device, dtype=dtype)  # type: ignore[arg-type]
        self.main_features = main_features

    @classmethod
    def grow(cls, linear: nn.Linear, n_taps: int, zero_start: bool) -> "FusedLinear":
        """Widen a stock layer.

        Args:
            linear: the projector's first Linear, main channels wide.
            n_taps: number K of taps.
            zero_start: True: keep the stock weights and start the new columns at zero (an existing projector). False:
                `nn.Linear`'s usual initialisation over the whole width (a projector made from scratch).
        """
        weight = linear.weight
        fused = cls(
            linear.in_features, n_taps, linear.out_features, linear.bias is not None, weight.device, weight.dtype
        )
        fused.weight.requires_grad_(weight.requires_grad)
        if linear.bias is not None:
            fused.bias.requires_grad_(linear.bias.requires_grad)
        if zero_start and not weight.is_meta:
            with zero.gathered(linear.parameters()), zero.gathered(fused.parameters(), changed=True), torch.no_grad():
                fused.weight.zero_()
                fused.weight[:, : linear.in_features] = weight
                if linear.bias is not None:
                    fused.bias.copy_(linear.bias)
        fused.train(linear.training)
        return fused

    def stock(self) -> nn.Linear:
        """The stock layer that holds the main columns."""
        linear = nn.Linear(
            self.main_features, self.out_features, self.bias is not None, self.weight.device, self.weight.dtype
        )
        with zero.gathered(self.parameters()), torch.no_grad():
            linear.weight.copy_(self.weight[:, : self.main_features])
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def forward(self, features: Tensor) -> Tensor:
        """[..., (1 + K) * d] to [..., out]."""
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
        return main + F.linear(features[..., d:], self.weight[:, d:])
