"""Fusion attention: has the fusion layer learned to look at the image, and which of its heads?

Text-to-image attention mass of single heads in chosen layers, from the q and k that the layers really see.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import InputError, SettingError
from llava_patch.hosts import wrappers
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements import pairs, passes, trace
from llava_patch.measurements.fusion_attention.measurement import DEFAULTS, FusionAttention, FusionAttentionResult
from llava_patch.patching.handle import get_handle
from llava_patch.routing.schedule import LayerMode

WHAT = "fusion attention"


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
    return MassMeter(settings).together(model, base, samples, base_samples, progress)


class MassMeter(pairs.Meter):
    """Attention mass of both models' heads, summed over samples."""

    what, lacking = WHAT, "without an image, or without text after it"
    total: Tensor | None = None  # float64 [2, layers, heads]

    def begin(self, anatomy: Anatomy) -> None:
        """Look at the layers that the settings name, or at the checkpoint's fusion layers."""
        self.layers = self.settings.layers or fusion_layers(anatomy)
        self.check(anatomy)
        self.n_layers = self.base_layers

    def check(self, base: Anatomy) -> None:
        """Refuse layers that a model does not have: SettingError names them."""
        self.base_layers = len(base.layers)
        outside = [layer for layer in self.layers if layer >= self.base_layers]
        if outside:
            raise SettingError(
                f"FusionAttention.layers = {self.layers}: this model has layers 0..{self.base_layers - 1}, not "
                f"{outside[0]}"
            )

    def usable(self, anatomy: Anatomy, sample: dict[str, Any]) -> bool:
        """Whether there is an image, and text after it that could look at it."""
        image = wrappers.placeholders(anatomy, sample["input_ids"])[0]
        return super().usable(anatomy, sample) and len(trace.text_after_image(image)) > 0

    def read(self, anatomy: Anatomy, sample: dict[str, Any]) -> tuple[Tensor, str] | None:
        """See `measure_sample`; None for an unusable sample, which the base's may be."""
        usable = self.usable(anatomy, sample)
        return measure_sample(anatomy, sample, self.layers, self.settings.chunk) if usable else None

    def add(self, number: int, one: tuple[Tensor, str], other: tuple[Tensor, str] | None) -> None:
        """Add what `read` gave; InputError: another depth or number of heads, or the two did not read the same."""
        (trained, digest), (stock, base_digest) = one, other or (one[0], "")
        heads, base_heads = trained.shape[1], stock.shape[1]
        if (self.n_layers, heads) != (self.base_layers, base_heads):
            raise InputError(
                f"{WHAT}: the checkpoint has {self.n_layers} layers of {heads} heads, the base {self.base_layers} of "
                f"{base_heads}: is it this checkpoint's base?"
            )
        if digest != base_digest:
            raise _unlike(number)
        mass = torch.stack([trained, stock]).double()
        self.total = mass if self.total is None else self.total + mass

    def left_out(self, number: int, base: Anatomy, sample: dict[str, Any]) -> None:
        """Refuse a sample that is usable in the base alone."""
        if self.usable(base, sample):
            raise _unlike(number)

    def result(self) -> FusionAttentionResult:
        """The mean over samples."""
        assert self.total is not None
        trained, stock = (self.total / self.samples).tolist()
        return FusionAttentionResult(
            list(self.layers), trained, stock, self.n_layers, self.samples, self.skipped, settings=self.settings
        )


def _unlike(number: int) -> InputError:
    return InputError(
        f"{WHAT}: sample {number} has other text tokens or image positions in the checkpoint than in the base, so that "
        "the two cannot be compared: their tokenizers, chat templates or numbers of image tokens differ"
    )


def fusion_layers(anatomy: Anatomy) -> tuple[int, ...]:
    """The layers in which a model's text reads what the deep layers have of the image.

    LF: the fusion layers; PC and KV: all deep layers; a model that routes nothing: the last layer. Ideal and VTW have
    none, which is an InputError.
    """
    n_layers = len(anatomy.layers)
    handle = get_handle(anatomy.model)
    schedule = None if handle is None else handle.program()
    if schedule is None or schedule.split == n_layers:
        return (n_layers - 1,)
    read = (LayerMode.FUSE, LayerMode.RESET, LayerMode.KEYS)
    found = tuple(i for i, mode in enumerate(schedule.modes) if mode in read)
    if not found:
        raise InputError(
            f"{WHAT}: text sees no image from layer {schedule.split} on in this model (ideal, vtw), so there is no "
            "fusion layer: name layers below the split with FusionAttention.layers, or measure another variant"
        )
    return found


def image_attention(model: nn.Module, sample: dict[str, Any], layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """Where the position that answers looks in the image, head by head.

    Args:
        model: of either host, stock or patched, in evaluation mode.
        sample: keyword arguments of its forward, a batch of one without padding, with an image and text after it.
        layers: numbers; None: the fusion layers, see `fusion_layers`.

    Returns:
        Per layer float32 [heads, image tokens], on CPU: the attention of the last position whose next token is the
        answer's (without labels: the last text position) on each image token that the layer sees, in order.
    """
    anatomy = find(model)
    chosen = tuple(fusion_layers(anatomy) if layers is None else layers)
    with torch.no_grad(), trace.traced(anatomy, sample, FusionAttention().chunk, chosen, WHAT) as seen:
        passes.run(anatomy, sample)
    return {layer: seen.looked[layer].cpu() for layer in chosen}


@torch.no_grad()
def measure_sample(
    anatomy: Anatomy, sample: dict[str, Any], layers: tuple[int, ...], chunk: int = 128
) -> tuple[Tensor, str]:
    """One forward pass on a sample with an image and text after it.

    Returns:
        (float32 [layers, heads] on CPU, digest of what the model read). Layers that see no image have zeros; where
        image tokens are pruned, mass is that on the ones that are left.

    Raises:
        InputError: a batch, or padding.
        HostError: something besides llava_patch removes tokens, or numbers that are not finite.
    """
    with trace.traced(anatomy, sample, chunk, layers, WHAT) as seen:
        passes.run(anatomy, sample)
    digest = hashlib.sha256(str((seen.seen.text_ids.tolist(), seen.mask.int().tolist())).encode()).hexdigest()
    found = torch.stack([seen.mass[layer].cpu() for layer in layers])
    for layer, mass in zip(layers, found.tolist(), strict=True):
        passes.check_finite(mass, layer, anatomy)
    return found, digest
