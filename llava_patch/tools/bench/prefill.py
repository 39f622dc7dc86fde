"""Prefill time of a routed model over the stock model: both in one process, interleaved, medians."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from llava_patch.core.clock import Clock
from llava_patch.patching.patch import patch
from llava_patch.settings.methods import Routing


@dataclass(frozen=True)
class PrefillRatio:
    """Medians over the repeats, in milliseconds.

    Attributes:
        stock_ms: stock prefill.
        routed_ms: routed prefill.
        ratio: routed over stock; below 1 is faster.
        spread: lowest and highest ratio of single neighbouring pairs.
        tokens: positions of the prompt, image positions included.
    """

    stock_ms: float
    routed_ms: float
    ratio: float
    spread: tuple[float, float]
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def measure_prefill(model: nn.Module, inputs: dict[str, Any], routing: Routing, repeats: int = 7) -> PrefillRatio:
    """Time one prompt's prefill with and without routing.

    Args:
        model: a stock Hugging Face model in eval mode; it is patched and restored for every pair of measurements.
        inputs: keyword arguments of model.forward, with images.
        routing: what to compare with the stock model.
        repeats: pairs of measurements, after one warm-up pair.

    Returns:
        The medians and their ratio. A single forward with a KV cache is timed as generation makes it (logits of the
        last position only), the vision tower included.
    """
    stock: list[float] = []
    routed: list[float] = []
    tokens = 0
    for i in range(repeats + 1):
        stock_ms, tokens = _time(model, inputs)
        with patch(model, routing=routing):
            routed_ms, _ = _time(model, inputs)
        if i:
            stock.append(stock_ms)
            routed.append(routed_ms)
    pairs = [r / s for r, s in zip(routed, stock, strict=True)]
    a, b = statistics.median(stock), statistics.median(routed)
    return PrefillRatio(a, b, b / a, (min(pairs), max(pairs)), tokens)


def _time(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, int]:
    with Clock(next(model.parameters()).device) as clock:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    return clock.ms, int(out.past_key_values.get_seq_length())
