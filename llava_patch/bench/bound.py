"""What the decoder's matrix products cost: their FLOPs, and their time at the rate of each shape on this machine.

The bound leaves out everything else (norms, rotary embedding, softmax, copies), so no implementation can reach it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

import torch

from llava_patch.bench.clock import Clock, median
from llava_patch.bench.methods import Method
from llava_patch.bench.shapes import IMAGE_TOKENS
from llava_patch.routing.program import Work, make_program
from llava_patch.routing.prune import keep_counts

Product = tuple[int, int, int]
"""(rows, inner, columns) of one matrix product."""


def products(config: Any, method: Method, text: int, batch: int) -> Counter[Product]:
    """The decoder's matrix products at prefill, how often each; the last layer answers at the last position only.

    The stock model's last layer answers at every position: that is how it is run.
    """
    n_layers = config.num_hidden_layers
    program = make_program(method.settings.get("routing"), method.settings.get("pruning"), n_layers)
    counts: Counter[Product] = Counter()
    images = IMAGE_TOKENS
    for layer, work in enumerate(program.work):
        if program.prune_at == layer:
            images = keep_counts((images,), program.ratio, (0,))[0]
        if layer == program.split:
            for _ in range(program.side_layers):
                counts += _layer(config, images, images, batch)
        keys = text + (0 if work is Work.TEXT else images)
        asking = text if work in (Work.TEXT, Work.KEYS) else keys
        if layer == n_layers - 1 and program.does_something:
            asking = 1
        counts += _layer(config, asking, keys, batch)
        if method.lora_rank is not None:
            counts += _lora(config, keys * batch, method.lora_rank)
    return counts


def _layer(config: Any, asking: int, keys: int, batch: int) -> Counter[Product]:
    hidden, wide = config.hidden_size, config.intermediate_size
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = hidden // heads
    if not asking or not keys:
        return Counter()
    # Added one by one: two of these shapes may be the same.
    return _sum(
        ((asking * batch, hidden, hidden), 2),  # q_proj, o_proj
        ((keys * batch, hidden, groups * size), 2),  # k_proj, v_proj
        ((asking * batch, hidden, wide), 2),  # gate_proj, up_proj
        ((asking * batch, wide, hidden), 1),  # down_proj
        ((asking, size, keys), heads * batch),
        ((asking, keys, size), heads * batch),
    )


def _lora(config: Any, rows: int, rank: int) -> Counter[Product]:
    hidden, wide = config.hidden_size, config.intermediate_size
    return _sum(
        ((rows, hidden, rank), 6),  # A of q, k, v, o, gate, up
        ((rows, rank, hidden), 5),  # B of q, k, v, o, down
        ((rows, rank, wide), 2),  # B of gate, up
        ((rows, wide, rank), 1),  # A of down
    )


def _sum(*counted: tuple[Product, int]) -> Counter[Product]:
    total: Counter[Product] = Counter()
    for product, times in counted:
        total[product] += times
    return total


def flops(model: Any, method: Method, text: int, batch: int) -> float:
    """FLOPs of prefill (two a multiply-add); attention counted in full, as kernels without a causal shortcut do it."""
    config = model.config.text_config
    return float(sum(2 * math.prod(shape) * n for shape, n in products(config, method, text, batch).items()))


def bound_ms(model: Any, method: Method, text: int, batch: int) -> float:
    """Milliseconds of prefill's matrix products at the rate measured for each shape."""
    config = model.config.text_config
    heads = config.num_attention_heads * batch
    total = 0.0
    for shape, n in products(config, method, text, batch).items():
        # Attention runs all heads in one call, so its rate is that of a batch of products.
        together = heads if n % heads == 0 and n >= heads else 1
        total += product_ms(shape, together, str(model.device), model.dtype) * n / together
    return total


@functools.cache
def product_ms(shape: Product, together: int, device: str, dtype: torch.dtype) -> float:
    """Median milliseconds of a batch of matrix products of one shape."""
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    size = (together,) if together > 1 else ()
    a = torch.randn(*size, rows, inner, generator=generator).to(device, dtype)
    b = torch.randn(*size, columns, inner, generator=generator).to(device, dtype).transpose(-1, -2)
    times = []
    for i in range(8):
        with Clock(a.device) as clock:
            torch.matmul(a, b)
        if i:
            times.append(clock.ms)
    result = median(times)
    assert result is not None
    return result
