"""Text-to-image attention mass of single heads in chosen layers, from the q and k that the layers really see."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core import files
from llava_patch.core.errors import InputError, SettingError
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements import passes
from llava_patch.measurements.passes import check_finite, evaluating
from llava_patch.measurements.trace import run, text_after_image, traced
from llava_patch.patching.handle import get_handle
from llava_patch.routing.schedule import LayerMode

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
    found = tuple(
        i for i, mode in enumerate(program.modes) if mode in (LayerMode.FUSE, LayerMode.RESET, LayerMode.KEYS)
    )
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
