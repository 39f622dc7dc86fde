"""Compiled decode: a static cache and a step that is one graph, stock and every routing method side by side."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llava_patch.core import files
from llava_patch.core.compiled import frame
from llava_patch.core.errors import HostError
from llava_patch.hosts.compat import static_cache
from llava_patch.routing.cache import cache_bytes
from llava_patch.tools.bench.measure import Clock
from llava_patch.tools.bench.methods import Method, make_inputs, patched


@dataclass
class Row:
    """One method's measurements."""

    method: str
    dynamic_ms: list[float] = field(default_factory=list)  # each round's decode, milliseconds a token, nothing compiled
    compiled_ms: list[float] = field(default_factory=list)  # the same behind a static cache, compiled
    cache_bytes: int = 0  # of the static cache, whole
    delta: float = 0.0  # largest difference of a logit between the two


@torch.no_grad()
def measure(
    model: Any,
    rows: Sequence[Method],
    text: int,
    batch: int,
    *,
    repeats: int = 5,
    decode_tokens: int = 16,
    backend: str = "inductor",
    progress: bool = True,
) -> list[Row]:
    """Measure every method, one after the other in each round, after a round that compiles.

    Each has a model of its own that shares the weights: a patch drops what was compiled before it. A step whose graph
    breaks raises (`fullgraph`); on a GPU steps are CUDA graphs, as `generate` makes them.

    Args:
        model: of `methods.build`.
        rows: the stock model first; none with LoRA.
        text: text tokens beside the image's.
        batch: samples.
        repeats: rounds.
        decode_tokens: steps in a round.
        backend: of torch.compile.
        progress: show a progress bar on stderr.

    Raises:
        HostError: transformers has no static caches with layers of their own lengths (before 4.56).
    """
    if not static_cache.has_static_layers():
        raise HostError("static caches are routed from transformers 4.56 on: install 4.57")
    results = [Row(method.name) for method in rows]
    steps = _Steps(make_inputs(model, text, batch), decode_tokens)
    options = {"mode": "reduce-overhead"} if model.device.type == "cuda" and backend == "inductor" else {}
    with contextlib.ExitStack() as stack:
        models = [_twin(model) for _ in rows]
        for twin, method in zip(models, rows, strict=True):
            stack.enter_context(patched(twin, method.settings))
        forwards = [torch.compile(frame(m.name), backend=backend, fullgraph=True, **options) for m in rows]  # type: ignore[call-overload]
        caches = [static_cache.StaticCache(config=model.config.text_config, max_cache_len=steps.longest) for _ in rows]
        rounds = [(number, i) for number in range(repeats + 1) for i in range(len(rows))]
        for number, i in files.track(rounds, f"compiled decode, text {text}, batch {batch}", progress):
            dynamic_ms, dynamic = steps.run(models[i])
            if number:
                caches[i].reset()
            compiled_ms, found = steps.run(models[i], forwards[i], caches[i])
            if not number:
                results[i].cache_bytes = cache_bytes(caches[i])
                results[i].delta = float((found.float() - dynamic.float()).abs().max())
                continue
            results[i].dynamic_ms.append(dynamic_ms)
            results[i].compiled_ms.append(compiled_ms)
    return results


def _twin(model: Any) -> Any:
    """A model of its own with the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class _Steps:
    """A prompt and the steps behind it, the same for every method."""

    def __init__(self, inputs: dict[str, Any], tokens: int) -> None:
        self.inputs, self.tokens = inputs, tokens
        batch, self.prompt = inputs["input_ids"].shape
        self.longest = self.prompt + tokens
        device = inputs["input_ids"].device
        self.token = torch.full((batch, 1), 7, device=device)
        self.places = [torch.tensor([self.prompt + i], device=device) for i in range(tokens)]

    def run(self, model: Any, compiled: Any = None, cache: Any = None) -> tuple[float, torch.Tensor]:
        """Milliseconds a token of all steps but the first, and the last one's logits [batch, 1, vocabulary].

        `compiled` is of `frame`, for a static cache; masks are made before, as `generate` makes them outside of what it
        compiles. None: the model itself, with a dynamic one.
        """
        slots = torch.arange(self.longest, device=self.token.device)
        seen = [(slots <= place)[None, None, None].expand(len(self.token), 1, 1, -1).clone() for place in self.places]
        held = model(**self.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

        def step(i: int) -> torch.Tensor:
            call = {"input_ids": self.token, "past_key_values": held, "use_cache": True, "logits_to_keep": 1}
            place = self.places[i]
            call |= {"position_ids": place.expand(len(self.token), 1), "cache_position": place}
            if cache is not None:
                call["attention_mask"] = seen[i]
            output = model(**call) if compiled is None else compiled(model, (), call)
            logits: torch.Tensor = output.logits
            return logits

        step(0)
        with Clock(self.token.device) as clock:
            for i in range(1, self.tokens):
                logits = step(i)
        return clock.ms / (self.tokens - 1), logits.clone()
