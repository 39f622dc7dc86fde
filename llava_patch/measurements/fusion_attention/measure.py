"""Fusion attention: has the fusion layer learned to look at the image, and which of its heads?"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from llava_patch.core.errors import InputError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements import passes
from llava_patch.measurements.fusion_attention.heads import (
    WHAT,
    HeadMass,
    check_layers,
    fusion_layers,
    head_mass,
    measure_sample,
)
from llava_patch.measurements.fusion_attention.result import DEFAULTS, FusionAttention, FusionAttentionResult
from llava_patch.measurements.passes import evaluating

Opened = Callable[[], "tuple[nn.Module, Iterable[dict[str, Any]]]"]


def measure_fusion_attention(
    model: nn.Module,
    base: nn.Module,
    samples: Iterable[dict[str, Any]],
    settings: FusionAttention = DEFAULTS,
    progress: bool = True,
    base_samples: Iterable[dict[str, Any]] | None = None,
) -> FusionAttentionResult:
    """Compare two models that are both in memory, sample by sample.

    Args:
        model: the trained checkpoint, of either host; its fusion layers are looked at.
        base: the stock model (or another one).
        samples: keyword arguments of both models' forward, each a batch of one without padding.
        settings: see `FusionAttention`.
        progress: show a progress bar on stderr.
        base_samples: those of the base, where they are not the same (another host, precision or device).

    Raises:
        InputError: no usable sample, or samples that the two models read in different ways.
        SettingError: layers that a model does not have.
    """
    own, other = find(model), find(base)
    layers = settings.layers or fusion_layers(own)
    for anatomy in (own, other):
        check_layers(layers, anatomy)
    trained, stock = HeadMass(layers, len(own.layers)), HeadMass(layers, len(other.layers))
    with evaluating(model), evaluating(base):
        for sample, base_sample in passes.paired(samples, base_samples, WHAT, progress):
            if settings.max_samples is not None and trained.samples >= settings.max_samples:
                break
            trained.add(*measure_sample(own, sample, layers, settings.chunk))
            stock.add(*measure_sample(other, base_sample, layers, settings.chunk))
    return compare(trained, stock, settings)


def measure_fusion_attention_apart(
    open_model: Opened, open_base: Opened, settings: FusionAttention = DEFAULTS, progress: bool = True
) -> FusionAttentionResult:
    """Compare two models that are never in memory together; only sums are kept of the first.

    Args:
        open_model: loads the checkpoint: (model, samples for it).
        open_base: the same of the base; its samples are of the same examples in the same order.
        settings: see `FusionAttention`.
        progress: show progress bars on stderr.

    Raises:
        InputError: as `measure_fusion_attention`.
        SettingError: likewise.
    """
    trained = _one(open_model, settings.layers, settings, progress, f"{WHAT}: checkpoint")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stock = _one(open_base, trained.layers, settings, progress, f"{WHAT}: base")
    return compare(trained, stock, settings)


def _one(
    opened: Opened, layers: tuple[int, ...] | None, settings: FusionAttention, progress: bool, name: str
) -> HeadMass:
    """Measure one model, which is out of memory when this returns."""
    model, samples = opened()
    layers = layers or fusion_layers(find(model))
    return head_mass(model, samples, layers, settings.chunk, settings.max_samples, progress, name)


def compare(trained: HeadMass, stock: HeadMass, settings: FusionAttention) -> FusionAttentionResult:
    """The result of two measured models.

    Raises:
        InputError: they did not read the same, or are of another depth or number of heads.
    """
    masses = trained.mean(), stock.mean()
    shapes = [(one.n_layers, len(mass[0])) for one, mass in zip((trained, stock), masses, strict=True)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{WHAT}: the checkpoint has {shapes[0][0]} layers of {shapes[0][1]} heads, the base {shapes[1][0]} of "
            f"{shapes[1][1]}: is it this checkpoint's base?"
        )
    if trained.inputs != stock.inputs:
        pairs = zip(trained.inputs, stock.inputs, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(trained.inputs), len(stock.inputs)))
        raise InputError(
            f"{WHAT}: sample {at} has other text tokens or image positions in the checkpoint than in the base, so that "
            "the two cannot be compared: their tokenizers, chat templates or numbers of image tokens differ"
        )
    return FusionAttentionResult(
        list(trained.layers), *masses, trained.n_layers, trained.samples, len(trained.inputs) - trained.samples,
        settings=settings,
    )  # fmt: skip
