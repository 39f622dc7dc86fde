"""Fusion attention: has the fusion layer learned to look at the image, and which of its heads?

Text-to-image attention mass of single heads in chosen layers, from the q and k that the layers really see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core import files
from llava_patch.core.errors import InputError, SettingError
from llava_patch.data.target import Opener
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements import passes
from llava_patch.measurements.fusion_attention.result import DEFAULTS, FusionAttention, FusionAttentionResult
from llava_patch.measurements.passes import check_finite, evaluating
from llava_patch.measurements.trace import run, text_after_image, traced
from llava_patch.patching.handle import get_handle
from llava_patch.routing.schedule import Work

WHAT = "fusion attention"


@dataclass
class HeadMass:
    """Mean over samples of one model.

    Attributes:
        layers: numbers.
        n_layers: L.
        total: float64 [layers, heads], sum over samples.
        inputs: a digest of each sample's text tokens and image positions; None for one that was left out.
    """

    layers: tuple[int, ...]
    n_layers: int
    total: Tensor | None = None
    inputs: list[str | None] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """How many samples were measured."""
        return sum(one is not None for one in self.inputs)

    def mean(self) -> list[list[float]]:
        """[layers][heads].

        Raises:
            InputError: no sample.
        """
        if self.total is None:
            raise InputError(
                f"no usable sample for {WHAT}: {len(self.inputs)} without an image, or without text after it"
            )
        return (self.total / self.samples).tolist()

    def add(self, mass: Tensor | None, digest: str | None) -> None:
        """Add one sample; (None, None): left out."""
        if mass is not None:
            self.total = mass.double() if self.total is None else self.total + mass.double()
        self.inputs.append(digest)


def fusion_layers(anatomy: Anatomy) -> tuple[int, ...]:
    """The layers in which a model's text reads what the deep layers have of the image.

    LF: the fusion layers; PC and KV: all deep layers; a model that routes nothing: the last layer.

    Raises:
        InputError: ideal and VTW have none.
    """
    n_layers = len(anatomy.layers)
    handle = get_handle(anatomy.model)
    program = None if handle is None else handle.program()
    if program is None or program.split == n_layers:
        return (n_layers - 1,)
    found = tuple(i for i, work in enumerate(program.work) if work in (Work.FUSE, Work.RESET, Work.KEYS))
    if not found:
        raise InputError(
            f"{WHAT}: text sees no image from layer {program.split} on in this model (ideal, vtw), so there is no "
            "fusion layer: name layers below the split with FusionAttention.layers, or measure another variant"
        )
    return found


def check_layers(layers: tuple[int, ...], anatomy: Anatomy) -> None:
    """Refuse layers that a model does not have.

    Raises:
        SettingError: names them.
    """
    outside = [layer for layer in layers if layer >= len(anatomy.layers)]
    if outside:
        raise SettingError(
            f"FusionAttention.layers = {layers}: this model has layers 0..{len(anatomy.layers) - 1}, not {outside[0]}"
        )


def head_mass(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    layers: tuple[int, ...],
    chunk: int = 128,
    max_samples: int | None = None,
    progress: bool = True,
    name: str = WHAT,
) -> HeadMass:
    """Measure one model; memory does not grow with samples but for a digest each.

    Args:
        model: of either host, stock or routed.
        samples: keyword arguments of its forward, each a batch of one without padding.
        layers: numbers.
        chunk: attention queries held at a time.
        max_samples: stop after so many usable ones.
        progress: show a progress bar on stderr.
        name: what the bar says.
    """
    anatomy = find(model)
    check_layers(layers, anatomy)
    found = HeadMass(layers, len(anatomy.layers))
    with evaluating(model):
        for sample in files.track(samples, name, progress):
            if max_samples is not None and found.samples >= max_samples:
                break
            found.add(*measure_sample(anatomy, sample, layers, chunk))
    return found


@torch.no_grad()
def measure_sample(
    anatomy: Anatomy, sample: dict[str, Any], layers: tuple[int, ...], chunk: int = 128
) -> tuple[Tensor, str] | tuple[None, None]:
    """One forward pass.

    Returns:
        (float32 [layers, heads] on CPU, digest of what the model read); (None, None) for a sample without an image or
        without text after it. Layers that see no image have zeros; where image tokens are pruned, mass is that on the
        ones that are left.

    Raises:
        InputError: a batch, or padding.
        HostError: something besides llava_patch removes tokens, or numbers that are not finite.
    """
    ids = sample["input_ids"]
    if not passes.has_image(anatomy, sample) or not len(text_after_image(ids[0] == anatomy.image_token_id)):
        return None, None
    with traced(anatomy, chunk, layers) as seen:
        run(anatomy, seen, sample, WHAT)
    text = ids[0][ids[0] != anatomy.image_token_id]
    digest = hashlib.sha256(str((text.tolist(), seen.mask().int().tolist())).encode()).hexdigest()
    found = torch.stack([seen.mass[layer].cpu() for layer in layers])
    for layer, mass in zip(layers, found.tolist(), strict=True):
        check_finite(mass, layer, anatomy)
    return found, digest


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
    open_model: Opener, open_base: Opener, settings: FusionAttention = DEFAULTS, progress: bool = True
) -> FusionAttentionResult:
    """Compare two models that are never in memory together; only sums are kept of the first.

    Args:
        open_model: loads the checkpoint: (model, samples for it).
        open_base: the same of the base; its samples are of the same examples in the same order.
        settings: see `FusionAttention`.
        progress: show progress bars on stderr.

    Raises:
        InputError: as `measure_fusion_attention`.
        SettingError: as `measure_fusion_attention`.
    """
    trained = _one(open_model, settings.layers, settings, progress, f"{WHAT}: checkpoint")
    passes.forget_models()
    stock = _one(open_base, trained.layers, settings, progress, f"{WHAT}: base")
    return compare(trained, stock, settings)


def _one(
    opened: Opener, layers: tuple[int, ...] | None, settings: FusionAttention, progress: bool, name: str
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
