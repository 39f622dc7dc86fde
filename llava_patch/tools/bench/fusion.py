"""What a fusion costs: prefill and full training step beside the stock model, and its identity before training."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llava_patch.core import files
from llava_patch.fusion.base import Fusion
from llava_patch.settings.methods import DeepStack, DenseConnector, DirectFusion, SkipLinks
from llava_patch.tools.bench.measure import Clock, peak_bytes, training_step
from llava_patch.tools.bench.methods import make_inputs, patched


@dataclass
class Row:
    """One fusion's measurements."""

    method: str
    prefill_ms: list[float] = field(default_factory=list)  # each round's prefill, tower included, milliseconds
    train_ms: list[float] = field(default_factory=list)  # each round's forward and backward pass, all of it trainable
    image_tokens: int = 0  # of one image
    added: int = 0  # parameters that the fusion adds
    kept_bytes: int = 0  # what autograd keeps for the backward pass, weights apart
    start_delta: float | None = None  # largest difference of a logit to stock before training; None: other tokens
    peak_bytes: int | None = None  # peak memory of the training step on a GPU; None on CPU


def fusions() -> dict[str, Fusion | None]:
    """The rows, the stock model first; settings as on LLaVA-1.5's tower of 24 blocks."""
    return {
        "stock": None,
        "SkipLinks, S = 6, D = 2": SkipLinks(stride=6, detach=2),
        "SkipLinks, S = 6, D = 0": SkipLinks(stride=6, detach=0),
        "SkipLinks, S = 3": SkipLinks(stride=3),
        "Dense Connector, SCI": DenseConnector(kind="sci"),
        "Dense Connector, DCI": DenseConnector(kind="dci"),
        "Dense Connector, STI": DenseConnector(kind="sti"),
        "direct fusion, 3-18": DirectFusion(layers="3-18", detach=(1,)),
        "direct fusion, all": DirectFusion(layers="all"),
        "DeepStack": DeepStack(),
        "SkipLinks, S = 6, merged 2 x 2": SkipLinks(stride=6, merge_size=2),
    }


def measure(
    model: Any, rows: dict[str, Fusion | None], text: int, batch: int, *, repeats: int = 3, progress: bool = True
) -> list[Row]:
    """Measure every fusion, one after the other in each round, after a warm-up round."""
    results = {name: Row(name) for name in rows}
    steps = [(number, name) for number in range(repeats + 1) for name in rows]
    stock_logits: torch.Tensor | None = None
    for number, name in files.track(steps, "fusions", progress):
        row, settings = results[name], rows[name]
        before = sum(p.numel() for p in model.parameters())
        # Every parameter trains in a stock Hugging Face model, so the tower does here too.
        with patched(model, {"fusion": settings} if settings else None) as handle:
            row.image_tokens = handle.tokens_per_image if handle is not None else 576
            batch_inputs = make_inputs(model, text, batch, row.image_tokens)
            if number == 0:
                row.added = sum(p.numel() for p in model.parameters()) - before
                with torch.no_grad():
                    logits = model(**batch_inputs, use_cache=False, logits_to_keep=1).logits.float()
                stock_logits = logits if stock_logits is None else stock_logits
                if handle is None or (handle.taps is not None and handle.taps.keeps_tokens):
                    row.start_delta = float((logits - stock_logits).abs().max())
            with torch.no_grad(), Clock(model.device) as prefill:
                model(**batch_inputs, use_cache=True, logits_to_keep=1)
            with training_step(model, batch_inputs, model.parameters()) as arguments:
                if number == 0:  # the warm-up counts, which takes time
                    row.kept_bytes = _kept(model, arguments)
                    continue
                with Clock(model.device) as step:
                    model(**arguments).loss.backward()
            row.prefill_ms.append(prefill.ms)
            row.train_ms.append(step.ms)
            row.peak_bytes = peak_bytes(model)
    return list(results.values())


def _kept(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes that a step's forward pass saves for the backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, or an address would come again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in storages.values())
