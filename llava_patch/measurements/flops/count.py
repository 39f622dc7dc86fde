"""FLOPs of one pass and bytes of its KV cache, by part of the model.

Counted are matrix products and the patch embedding's convolution, two FLOPs a multiply-add, attention in full. Norms,
softmax, activations and the rotary embedding are left out, as PyTorch's counter leaves them out (it counts the few
products of the rotary angles).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from llava_patch.core.errors import SettingError
from llava_patch.hosts.anatomy import HF
from llava_patch.measurements.flops import products
from llava_patch.measurements.flops.products import Mode, Positions, Product
from llava_patch.measurements.flops.shape import DecoderShape, ModelShape
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
        for name, least in (("text", 1), ("image", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"{name} = {value!r}: expected an integer from {least} on")
        if self.tiles is not None:
            if isinstance(self.tiles, bool) or not isinstance(self.tiles, int) or self.tiles < 1:
                raise SettingError(f"tiles = {self.tiles!r}: expected an integer from 1 on, or None")
            if not self.image:
                raise SettingError(f"tiles = {self.tiles}, but image = 0: give the image tokens that they become")

    def images(self, projected: int) -> int:
        """How often the tower runs for all samples.

        Args:
            projected: tokens that the decoder gets of one image.
        """
        return self.batch * (-(-self.image // projected) if self.tiles is None else self.tiles)


@dataclass(frozen=True)
class LayerFlops:
    """One decoder layer (or all side-branch layers together).

    Attributes:
        projections: of queries, keys, values and the attention's output.
        attention: queries with keys, probabilities with values.
        feed_forward: the gated feed-forward network.
    """

    projections: int = 0
    attention: int = 0
    feed_forward: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.projections + self.attention + self.feed_forward

    def __add__(self, other: "LayerFlops") -> "LayerFlops":
        """Part by part."""
        return LayerFlops(
            self.projections + other.projections,
            self.attention + other.attention,
            self.feed_forward + other.feed_forward,
        )


@dataclass(frozen=True)
class Flops:
    """FLOPs of one pass.

    Attributes:
        tower: the vision tower; 0 where the pass brings no image.
        projector: from tower to decoder, DeepStack's second one included.
        layers: of each decoder layer.
        side: the side branch.
        pruning: its own row of attention.
        head: hidden size to vocabulary.
    """

    tower: int
    projector: int
    layers: tuple[LayerFlops, ...]
    side: LayerFlops
    pruning: int
    head: int

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
    """FLOPs of one pass over a prompt.

    Args:
        shape: the model's sizes.
        program: what its layers do; see `program_of`.
        prompt: what it gets.
        mode: a plain forward pass, generation's prefill, or its first further token.
    """
    at = products.decoder_positions(program, prompt.text, prompt.image, mode, answers_last_only=shape.host == HF)
    decoder, batch = shape.decoder, prompt.batch
    images = 0 if mode is Mode.DECODE else prompt.images(shape.projected)
    chooser: Counter[Product] = (
        Counter() if at.chooser is None else products.chooser_products(decoder, at.chooser, batch)
    )
    side = LayerFlops()
    for position in at.side:
        side = side + _layer(decoder, position, batch)
    return Flops(
        tower=tower_flops(shape, images),
        projector=projector_flops(shape, images),
        layers=tuple(_layer(decoder, position, batch) for position in at.layers),
        side=side,
        pruning=products.total(chooser),
        head=2 * at.answered * batch * decoder.hidden * decoder.vocabulary,
    )


def _layer(shape: DecoderShape, at: Positions, batch: int) -> LayerFlops:
    parts = products.layer_products(shape, at, batch)
    return LayerFlops(*map(products.total, (parts.projections, parts.attention, parts.feed_forward)))


def tower_flops(shape: ModelShape, images: int) -> int:
    """The vision tower on some images: every block, whichever is read."""
    tower = shape.tower
    linears = sum(a * b for a, b in tower.linears)
    block = tower.tokens * linears + 2 * tower.tokens**2 * tower.attention_width
    entry, width = tower.patch_embedding
    return 2 * images * (tower.blocks * block + tower.patches * entry * width + tower.pooled)


def projector_flops(shape: ModelShape, images: int) -> int:
    """The projector on some images, and as often again as DeepStack has taps."""
    each = sum(a * b for a, b in shape.projector)
    return 2 * images * shape.projected * each * (1 + shape.stacked)


def cache_bytes(shape: ModelShape, program: LayerSchedule, prompt: Prompt, value_bytes: int = 2) -> int:
    """Bytes of the KV cache after a prompt, and of what the side branch remembers for later images.

    Args:
        shape: the model's sizes.
        program: what its layers do.
        prompt: what it got.
        value_bytes: of one number: 2 in half precision, 4 in float32.
    """
    at = products.decoder_positions(program, prompt.text, prompt.image, Mode.PREFILL)
    row = 2 * shape.decoder.key_value_heads * shape.decoder.head_dim * value_bytes
    remembered = 0
    if at.side:
        remembered = at.images * (shape.decoder.hidden * value_bytes + POSITION_BYTES)
    return prompt.batch * (sum(layer.held for layer in at.layers) * row + remembered)


def deep_image_flops(shape: ModelShape, program: LayerSchedule, prompt: Prompt, split: int) -> int:
    """What image positions cost a plain forward pass in the decoder layers from `split` on.

    That is these layers' FLOPs less those of the same layers on the text alone; the side branch is not among them.
    """
    stock = make_schedule(None, None, shape.decoder.layers)
    without = Prompt(prompt.text, 0, prompt.batch)
    there, absent = count_flops(shape, program, prompt), count_flops(shape, stock, without)
    return sum(a.total - b.total for a, b in zip(there.layers[split:], absent.layers[split:], strict=True))
