"""What the decoder's matrix products cost: their FLOPs, and their time at the rate of each shape on this machine.

The bound leaves out everything else (norms, rotary embedding, softmax, copies), so no implementation can reach it.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch

from llava_patch.core.clock import Clock, median
from llava_patch.hosts.sizes import IMAGE_TOKENS
from llava_patch.measurements.flops import products as decoder
from llava_patch.measurements.flops.products import Mode, Product
from llava_patch.measurements.flops.shape import DecoderShape
from llava_patch.routing.schedule import make_schedule
from llava_patch.tools.bench.methods import Method


def products(config: Any, method: Method, text: int, batch: int) -> Counter[Product]:
    """The decoder's matrix products at prefill, how often each, the head left out."""
    shape = DecoderShape.of(config)
    program = make_schedule(method.settings.get("routing"), method.settings.get("pruning"), shape.layers)
    at = decoder.decoder_positions(program, text, IMAGE_TOKENS, Mode.PREFILL)
    counts = decoder.add(*(decoder.layer_products(shape, p, batch).all() for p in (*at.side, *at.layers)))
    if at.chooser is not None:
        counts += decoder.chooser_products(shape, at.chooser, batch)
    if method.lora_rank is not None:
        counts += decoder.add(*(decoder.lora_products(shape, p, batch, method.lora_rank) for p in at.layers))
    return counts


def flops(model: Any, method: Method, text: int, batch: int) -> float:
    """FLOPs of prefill (two a multiply-add); attention counted in full, as kernels without a causal shortcut do it."""
    config = model.config.text_config
    return float(decoder.total(products(config, method, text, batch)))


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
