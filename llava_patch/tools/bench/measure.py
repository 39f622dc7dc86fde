"""Times, cache bytes and identity differences of every method, interleaved in one process; and their bound.

The bound is what the decoder's matrix products cost: their FLOPs, and their time at the rate of each shape on this
machine. It leaves out everything else (norms, rotary embedding, softmax, copies), so no implementation can reach it.
"""

import contextlib
import functools
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llava_patch.core import files
from llava_patch.hosts.sizes import IMAGE_TOKENS
from llava_patch.measurements.flops import count as decoder
from llava_patch.measurements.flops.shape import DecoderShape
from llava_patch.patching.handle import restore_flags
from llava_patch.routing.cache import RoutedCache, cache_bytes
from llava_patch.routing.schedule import make_schedule
from llava_patch.tools.bench.methods import Method, decode, make_inputs, partner_difference


class Clock:
    """Milliseconds of a piece of work; CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __enter__(self) -> "Clock":
        if self.cuda:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self.start.record()
        else:
            self.began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            self.end.record()
            torch.cuda.synchronize()
            self.ms = self.start.elapsed_time(self.end)
        else:
            self.ms = 1000 * (time.perf_counter() - self.began)


@dataclass
class Row:
    """One method's measurements."""

    method: str
    prefill_ms: list[float] = field(default_factory=list)  # each round's prefill, milliseconds
    decode_ms: list[float] = field(default_factory=list)  # each round's decode, milliseconds a token
    train_ms: list[float] = field(default_factory=list)  # each round's forward and backward pass, if measured
    cache_bytes: int = 0  # bytes that the cache holds after the prompt
    trainable: int | None = None  # parameters that train; None where nothing does
    partner: str = ""  # the identity that `partner_delta` measures
    partner_delta: float = 0.0  # largest difference of a logit to the identity partner
    cached_delta: float = 0.0  # largest difference of a logit between cached decode and recomputation
    prefill_flops: float = 0.0  # of the decoder's matrix products
    bound_ms: float = 0.0  # those products at the rates measured for their shapes
    peak_bytes: int | None = None  # peak memory of prefill on a GPU; None on CPU
    train_peak_bytes: int | None = None  # of the training step; None likewise


def measure(
    model: Any,
    rows: Sequence[Method],
    text: int,
    batch: int,
    *,
    repeats: int = 5,
    decode_tokens: int = 8,
    training: bool = False,
    progress: bool = True,
) -> list[Row]:
    """Measure every method, one after the other in each round, after a warm-up round."""
    batch_inputs = make_inputs(model, text, batch)
    results = [Row(m.name, partner=m.partner.name) for m in rows]
    steps = [(r, i) for r in range(repeats + 1) for i in range(len(rows))]
    for number, i in files.track(steps, f"text {text}, batch {batch}", progress):
        warm_up = number == 0
        with rows[i].applied(model) as handle:
            _time_inference(model, batch_inputs, results[i], decode_tokens, keep=not warm_up)
            if warm_up:
                routing = rows[i].settings.get("routing")
                if handle is None or (routing is not None and routing.freeze != "none"):
                    results[i].trainable = sum(p.numel() for p in _trains(model, rows[i]))
                results[i].cached_delta = _cached_delta(model, handle, batch_inputs)
            if training and number <= 2 and results[i].trainable is not None:  # the step is long, its spread small
                trains = _trains(model, rows[i])
                with training_step(model, batch_inputs, trains) as arguments, Clock(model.device) as step:
                    model(**arguments).loss.backward()
                results[i].train_peak_bytes = peak_bytes(model)
                results[i].train_ms += [] if warm_up else [step.ms]
    for method, result in zip(rows, files.track(results, "identities and bound", progress), strict=True):
        result.partner_delta = partner_difference(model, method, batch_inputs)
        result.prefill_flops = flops(model, method, text, batch)
        result.bound_ms = bound_ms(model, method, text, batch)
    return results


@torch.no_grad()
def _time_inference(model: Any, inputs: dict[str, Any], row: Row, tokens: int, keep: bool) -> None:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Clock(model.device) as prefill:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    row.peak_bytes = peak_bytes(model)
    cache = out.past_key_values
    row.cache_bytes = cache.nbytes() if isinstance(cache, RoutedCache) else cache_bytes(cache)
    with Clock(model.device) as decoding:
        decode(model, inputs, cache, tokens)
    if keep:
        row.prefill_ms.append(prefill.ms)
        row.decode_ms.append(decoding.ms / tokens)


def _trains(model: Any, method: Method) -> list[torch.nn.Parameter]:
    """What a training step of a method updates: the side branch, LoRA, or the decoder (full fine-tuning, baselines)."""
    named = dict(model.named_parameters())
    if method.lora_rank is not None:
        return [p for n, p in named.items() if "lora_" in n]
    branch = [p for n, p in named.items() if "side_branch" in n]
    if branch and method.settings["routing"].freeze != "none":
        return branch
    return [p for n, p in named.items() if "language_model" in n and "side_branch" not in n]


@contextlib.contextmanager
def training_step(
    model: Any, inputs: dict[str, Any], parameters: Iterable[torch.nn.Parameter]
) -> Iterator[dict[str, Any]]:
    """The arguments of a training step of these parameters, for which the model is ready; restored afterwards."""
    restore = restore_flags(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        model.train()
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield {**inputs, "labels": labels, "use_cache": False}
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
        restore()


def peak_bytes(model: Any) -> int | None:
    """Peak memory since it was last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None


@torch.no_grad()
def _cached_delta(model: Any, handle: Any, inputs: dict[str, Any]) -> float:
    """Two decoded tokens against the recomputation of the whole context, with the same pruning."""
    tokens = torch.full_like(inputs["input_ids"][:, :2], 7)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    for i in range(2):
        part = slice(None, mask.shape[1] - 1 + i)
        out = model(input_ids=tokens[:, i : i + 1], attention_mask=mask[:, part], past_key_values=cache, use_cache=True)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], dim=1), "attention_mask": mask}
    pruned = handle is not None and handle.program().prune_at is not None
    with handle.image_positions(kept=cache.kept()) if pruned else contextlib.nullcontext():
        full = model(**whole, use_cache=False).logits
    return float((out.logits[:, -1].float() - full[:, -1].float()).abs().max())


def products(model: Any, method: Method, text: int, batch: int) -> Counter[decoder.Product]:
    """The decoder's matrix products at prefill, how often each, the head left out."""
    shape = DecoderShape.of(model.config.text_config)
    program = make_schedule(method.settings.get("routing"), method.settings.get("pruning"), shape.layers)
    at = decoder.decoder_positions(program, text, IMAGE_TOKENS, decoder.Mode.PREFILL)
    counts = decoder.add(*(c for p in (*at.side, *at.layers) for c in decoder.layer_products(shape, p, batch).values()))
    counts = decoder.add(counts, *(decoder.chooser_products(shape, chooser, batch) for chooser in at.choosers))
    if method.lora_rank is not None:
        counts += decoder.add(*(decoder.lora_products(shape, p, batch, method.lora_rank) for p in at.layers))
    return counts


def flops(model: Any, method: Method, text: int, batch: int) -> float:
    """FLOPs of prefill (two a multiply-add); attention counted in full, as kernels without a causal shortcut do it."""
    return float(decoder.total(products(model, method, text, batch)))


def bound_ms(model: Any, method: Method, text: int, batch: int) -> float:
    """Milliseconds of prefill's matrix products at the rate measured for each shape."""
    heads = model.config.text_config.num_attention_heads * batch
    total = 0.0
    for shape, n in products(model, method, text, batch).items():
        # Attention runs all heads in one call, so its rate is that of a batch of products.
        together = heads if n % heads == 0 and n >= heads else 1
        total += product_ms(shape, together, str(model.device), model.dtype) * n / together
    return total


@functools.cache
def product_ms(shape: decoder.Product, together: int, device: str, dtype: torch.dtype) -> float:
    """Median milliseconds of a batch of matrix products of one shape."""
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    size = (together,) if together > 1 else ()
    a = torch.randn(*size, rows, inner, generator=generator).to(device, dtype)
    b = torch.randn(*size, columns, inner, generator=generator).to(device, dtype).transpose(-1, -2)
    times = []
    for _ in range(8):
        with Clock(a.device) as clock:
            torch.matmul(a, b)
        times.append(clock.ms)
    return statistics.median(times[1:])


def ratio(row: Any, base: Any, what: str) -> tuple[float, float, float] | None:
    """A row's time over the base's: (ratio of medians, lowest and highest ratio in a round); None: not measured."""
    times, base_times = getattr(row, what), getattr(base, what)
    pairs = [a / b for a, b in zip(times, base_times, strict=False)]
    if not pairs:
        return None
    return statistics.median(times) / statistics.median(base_times), min(pairs), max(pairs)
