"""FLOPs of one pass and bytes of its KV cache, by part of the model.

Counted are matrix products and the patch embedding's convolution, two FLOPs a multiply-add, attention in full. Norms,
softmax, activations and the rotary embedding are left out, as PyTorch's counter leaves them out (it counts the few
products of the rotary angles).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from llava_patch.core.errors import SettingError
from llava_patch.hosts.anatomy import HF
from llava_patch.measurements.flops import products
from llava_patch.measurements.flops.products import Mode, Positions
from llava_patch.measurements.flops.shape import Linear, ModelShape
from llava_patch.routing.schedule import LayerSchedule, make_schedule
from llava_patch.settings.methods import FastV, Routing

POSITION_BYTES = 8  # an int64 position id


@dataclass(frozen=True)
class Prompt:
    """What the pass gets: equal samples of one image and text behind it.

    Attributes:
        text: text tokens of a sample, 1 or more.
        image: image tokens of a sample; 0: no image.
        batch: samples.
        tiles: how often the tower and the projector run for a sample; None: once for each full or begun image of the
            model. They differ where tokens are dropped behind the projector (anyres with "spatial_unpad").
    """

    text: int = 64
    image: int = 576
    batch: int = 1
    tiles: int | None = None

    def __post_init__(self) -> None:
        for name, least in {"text": 1, "image": 0, "batch": 1, "tiles": 1}.items():
            value, optional = getattr(self, name), name == "tiles"
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                also = ", or None" if optional else ""
                raise SettingError(f"{name} = {value!r}: expected an integer from {least} on{also}")
        if self.tiles is not None and not self.image:
            raise SettingError(f"tiles = {self.tiles}, but image = 0: give the image tokens that they become")

    def images(self, projected: int) -> int:
        """How often the tower runs for all samples, where the decoder gets `projected` tokens of one image."""
        return self.batch * (-(-self.image // projected) if self.tiles is None else self.tiles)


@dataclass(frozen=True)
class LayerFlops:
    """One decoder layer (or all side-branch layers together)."""

    projections: int = 0  # of queries, keys, values and the attention's output
    attention: int = 0  # queries with keys, probabilities with values
    feed_forward: int = 0  # the gated feed-forward network

    @property
    def total(self) -> int:
        """All of it."""
        return self.projections + self.attention + self.feed_forward


@dataclass(frozen=True)
class Flops:
    """FLOPs of one pass."""

    tower: int  # the vision tower; 0 where the pass brings no image
    projector: int  # from tower to decoder, DeepStack's second one included
    layers: tuple[LayerFlops, ...]  # of each decoder layer
    side: LayerFlops  # the side branch
    pruning: int  # its own row of attention
    head: int  # hidden size to vocabulary

    @property
    def decoder(self) -> int:
        """Decoder layers, side branch and pruning."""
        return sum(layer.total for layer in self.layers) + self.side.total + self.pruning

    @property
    def total(self) -> int:
        """All of it."""
        return self.tower + self.projector + self.decoder + self.head

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the totals."""
        return {**asdict(self), "decoder": self.decoder, "total": self.total}


def program_of(shape: ModelShape, routing: Routing | None, pruning: FastV | None) -> LayerSchedule:
    """Settings resolved against a model's depth; errors name the setting (DeepStack's layers change no FLOPs)."""
    return make_schedule(routing, pruning, shape.decoder.layers)


def count_flops(shape: ModelShape, program: LayerSchedule, prompt: Prompt, mode: Mode = Mode.FORWARD) -> Flops:
    """FLOPs of one pass of a model over a prompt, where `program` (see `program_of`) says what its layers do."""
    at = products.decoder_positions(program, prompt.text, prompt.image, mode, answers_last_only=shape.host == HF)
    decoder, batch = shape.decoder, prompt.batch
    images = 0 if mode is Mode.DECODE else prompt.images(shape.projected)

    def layer(position: Positions, times: int = 1) -> LayerFlops:
        parts = products.layer_products(decoder, position, batch).items()
        return LayerFlops(**{name: times * products.total(counts) for name, counts in parts})

    tower = shape.tower  # every block runs, whichever is read
    block = tower.tokens * _multiplied(tower.linears) + 2 * tower.tokens**2 * tower.attention_width
    embedded = tower.patches * _multiplied([tower.patch_embedding])
    return Flops(
        tower=2 * images * (tower.blocks * block + embedded + tower.pooled),
        projector=2 * images * shape.projected * _multiplied(shape.projector) * (1 + shape.stacked),
        layers=tuple(map(layer, at.layers)),
        side=layer(at.side[0], len(at.side)) if at.side else LayerFlops(),
        pruning=products.total(products.chooser_products(decoder, at.chooser, batch)) if at.chooser else 0,
        head=2 * at.answered * batch * decoder.hidden * decoder.vocabulary,
    )


def _multiplied(linears: Iterable[Linear]) -> int:
    """Multiply-adds of linear layers on one position."""
    return sum(inputs * outputs for inputs, outputs in linears)


def cache_bytes(shape: ModelShape, program: LayerSchedule, prompt: Prompt, value_bytes: int = 2) -> int:
    """Bytes of the KV cache after a prompt, and of what the side branch remembers for later images.

    One number takes `value_bytes`: 2 in half precision, 4 in float32.
    """
    at = products.decoder_positions(program, prompt.text, prompt.image, Mode.PREFILL)
    row = 2 * shape.decoder.key_value_heads * shape.decoder.head_dim * value_bytes
    remembered = at.images * (shape.decoder.hidden * value_bytes + POSITION_BYTES) if at.side else 0
    return prompt.batch * (sum(layer.held for layer in at.layers) * row + remembered)


def deep_image_flops(shape: ModelShape, program: LayerSchedule, prompt: Prompt, split: int) -> int:
    """What image positions cost a plain forward pass in the decoder layers from `split` on.

    That is these layers' FLOPs less those of the same layers on the text alone; the side branch is not among them.
    """
    stock = make_schedule(None, None, shape.decoder.layers)
    without = Prompt(prompt.text, 0, prompt.batch)
    there, absent = count_flops(shape, program, prompt), count_flops(shape, stock, without)
    return sum(a.total - b.total for a, b in zip(there.layers[split:], absent.layers[split:], strict=True))
