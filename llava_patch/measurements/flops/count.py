"""FLOPs of one pass and bytes of its KV cache, by part of the model: the matrix products under any routing.

Counted are matrix products and the patch embedding's convolution, two FLOPs a multiply-add, attention in full. Norms,
softmax, activations and the rotary embedding are left out, as PyTorch's counter leaves them out (it counts the few
products of the rotary angles).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from llava_patch.core.errors import SettingError
from llava_patch.hosts.anatomy import HF
from llava_patch.measurements.flops.shape import DecoderShape, Linear, ModelShape
from llava_patch.routing.pruning import Pruning
from llava_patch.routing.schedule import LayerMode, LayerSchedule, make_schedule
from llava_patch.routing.tower_pruning import TowerPruning
from llava_patch.settings.methods import Routing

POSITION_BYTES = 8  # an int64 position id
Product = tuple[int, int, int]
"""(rows, inner, columns) of one matrix product."""


class Mode(Enum):
    """Which pass."""

    FORWARD = "a plain forward pass: every position is answered"
    PREFILL = "generation's pass over the prompt: only the last position is answered"
    DECODE = "the pass that takes one generated token"


@dataclass(frozen=True)
class Positions:
    """How many positions of a sample a layer works on."""

    asking: int  # go through the queries, the output projection and the feed-forward network
    giving: int  # go through the projections of keys and values
    held: int  # keys that each query is multiplied with (full attention: the causal half is computed too)


def add(*counts: Counter[Product]) -> Counter[Product]:
    """The sum of several counts."""
    return sum(counts, Counter())


def total(counts: Counter[Product]) -> int:
    """FLOPs: two for each multiply-add."""
    return sum(2 * rows * inner * columns * n for (rows, inner, columns), n in counts.items())


def counted(pairs: Iterable[tuple[Product, int]]) -> Counter[Product]:
    """Products and how often each; two of the shapes may be the same, and empty products are left out."""
    result: Counter[Product] = Counter()
    for product, times in pairs:
        if all(product) and times:
            result[product] += times
    return result


def layer_products(shape: DecoderShape, at: Positions, batch: int) -> dict[str, Counter[Product]]:
    """The matrix products of one decoder layer, how often each, by what they are for (fields of `LayerFlops`)."""
    hidden, wide = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    asking, giving = at.asking * batch, at.giving * batch
    projections = counted([((asking, hidden, queries), 1), ((asking, queries, hidden), 1), ((giving, hidden, keys), 2)])
    # Grouped keys are repeated for their queries, so every head has its own product.
    heads = shape.heads * batch
    attention = counted([((at.asking, shape.head_dim, at.held), heads), ((at.asking, at.held, shape.head_dim), heads)])
    feed_forward = counted([((asking, hidden, wide), 2), ((asking, wide, hidden), 1)])
    return {"projections": projections, "attention": attention, "feed_forward": feed_forward}


@dataclass(frozen=True)
class DecoderPositions:
    """How many positions every part of the decoder works on."""

    layers: tuple[Positions, ...]  # of each decoder layer
    side: tuple[Positions, ...]  # of each side-branch layer; () without one, or where it does not run
    choosers: tuple[Positions, ...]  # of each stage of pruning: its own rows of attention, which find what to prune
    answered: int  # positions of a sample that the head answers
    images: int  # image positions that are left at the split


def decoder_positions(
    program: LayerSchedule,
    text: int,
    images: int,
    mode: Mode,
    *,
    answers_last_only: bool = True,
    tiles: int = 1,
    lean: bool = True,
) -> DecoderPositions:
    """What each layer works on, for a prompt whose image is followed by text.

    As the implementation does it: at the prefill of a model that leaves anything out, the last layer answers at the
    last position alone, and a sparse fusion's last fusion layer takes only keys and values of the image. FastV prunes,
    as it does outside training. In the last layer of KV, image positions are answered too on a plain forward.

    Args:
        program: what the layers do.
        text: text positions of a sample, 1 or more.
        images: image positions of a sample; 0: the stock forward serves the prompt.
        mode: which pass; DECODE is the first token after such a prompt.
        answers_last_only: whether the stock model's head answers at the prompt's last position alone (Hugging Face's
            generation asks for that; llava's forward answers everywhere).
        tiles: images (or tiles) of a sample, each of which has its own tokens left by a pruning in the vision tower.
        lean: whether the prefill's last layer answers at the last position alone, as ours does; False: what the routing
            saves without that.
    """
    routed = images > 0 and program.leaves_out
    last, late_fusion = program.n_layers - 1, program.late_fusion
    last_token_only = mode is Mode.PREFILL and routed and lean
    pruning = program.pruning if images else None
    here, layers, choosers, at_split = images, [], [], images
    for number, does in enumerate(program.modes):
        if pruning is not None and number in program.stages:
            if pruning.USES_ATTENTION:  # with a cache the keys are there already, unless the layer is yet to run
                known = mode is Mode.PREFILL and not pruning.READS_NEXT
                choosers.append(Positions(text if pruning.MANY_RATERS else 1, 0 if known else text + here, text + here))
            if isinstance(pruning, TowerPruning):
                if pruning.tokens is None:
                    raise SettingError(
                        f"{pruning.label}: how many tokens stay depends on the picture, and so do the FLOPs"
                    )
                here = min(images, tiles * pruning.tokens)
            else:
                here = pruning.keep_counts(program.stages[number], (images,), (0,))[0]
        if number == program.split:
            at_split = here
        held = asking = text if routed and does is LayerMode.TEXT else text + here
        if routed and does is LayerMode.KEYS and number != last:
            asking = text
        if last_token_only and text > 1 and does is LayerMode.FUSE and number != last and number == late_fusion[-1]:
            asking = text
        if last_token_only and number == last:
            asking = 1
        layers.append(Positions(1, 1, held + 1) if mode is Mode.DECODE else Positions(asking, held, held))
    side: tuple[Positions, ...] = ()
    if mode is Mode.DECODE:
        choosers = []
    elif routed and program.split < program.n_layers and at_split:
        side = (Positions(at_split, at_split, at_split),) * program.side_layers
    answered = text + images
    if mode is Mode.DECODE or (mode is Mode.PREFILL and (last_token_only or answers_last_only)):
        answered = 1
    return DecoderPositions(tuple(layers), side, tuple(choosers), answered, at_split)


def chooser_products(shape: DecoderShape, at: Positions, batch: int) -> Counter[Product]:
    """A stage's own rows of attention, as FastV's: some positions' queries against all keys, values left out."""
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    row = (at.asking * shape.heads // shape.key_value_heads, shape.head_dim, at.held)
    rows = shape.key_value_heads * batch
    return counted(
        [((at.asking * batch, shape.hidden, queries), 1), ((at.giving * batch, shape.hidden, keys), 1), (row, rows)]
    )


def lora_products(shape: DecoderShape, at: Positions, batch: int, rank: int) -> Counter[Product]:
    """LoRA's own products on every linear layer of a decoder layer."""
    hidden, wide = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    asking, giving = at.asking * batch, at.giving * batch
    return counted(
        [
            ((asking, hidden, rank), 3), ((asking, rank, queries), 1), ((asking, rank, wide), 2),  # q, gate, up
            ((giving, hidden, rank), 2), ((giving, rank, keys), 2),  # k, v
            ((asking, queries, rank), 1), ((asking, rank, hidden), 2), ((asking, wide, rank), 1),  # o, down
        ]
    )  # fmt: skip


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
    pruning: int  # its own rows of attention
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


def program_of(shape: ModelShape, routing: Routing | None, pruning: Pruning | None) -> LayerSchedule:
    """Settings resolved against a model's depth; errors name the setting (DeepStack's layers change no FLOPs)."""
    return make_schedule(routing, pruning, shape.decoder.layers)


def count_flops(
    shape: ModelShape, program: LayerSchedule, prompt: Prompt, mode: Mode = Mode.FORWARD, lean: bool = True
) -> Flops:
    """FLOPs of one pass of a model over a prompt, where `program` (see `program_of`) says what its layers do.

    `lean` as in `decoder_positions`.
    """
    decoder, batch = shape.decoder, prompt.batch
    brought = prompt.images(shape.projected)
    images = 0 if mode is Mode.DECODE else brought
    last, tiles = shape.host == HF, brought // batch
    at = decoder_positions(program, prompt.text, prompt.image, mode, answers_last_only=last, tiles=tiles, lean=lean)

    def layer(position: Positions, times: int = 1) -> LayerFlops:
        parts = layer_products(decoder, position, batch).items()
        return LayerFlops(**{name: times * total(counts) for name, counts in parts})

    tower = shape.tower  # every block runs, whichever is read
    block = tower.tokens * _multiplied(tower.linears) + 2 * tower.tokens**2 * tower.attention_width
    embedded = tower.patches * _multiplied([tower.patch_embedding])
    rated = program.pruning is not None and program.pruning.MANY_RATERS and mode is not Mode.DECODE
    raters = 2 * batch * prompt.image * prompt.text * decoder.hidden * rated  # what comes to layer 0, image with text
    return Flops(
        tower=2 * images * (tower.blocks * block + embedded + tower.pooled),
        projector=2 * images * shape.projected * _multiplied(shape.projector) * (1 + shape.stacked),
        layers=tuple(map(layer, at.layers)),
        side=layer(at.side[0], len(at.side)) if at.side else LayerFlops(),
        pruning=sum(total(chooser_products(decoder, chooser, batch)) for chooser in at.choosers) + raters,
        head=2 * at.answered * batch * decoder.hidden * decoder.vocabulary,
    )


def _multiplied(linears: Iterable[Linear]) -> int:
    """Multiply-adds of linear layers on one position."""
    return sum(inputs * outputs for inputs, outputs in linears)


def cache_bytes(shape: ModelShape, program: LayerSchedule, prompt: Prompt, value_bytes: int = 2) -> int:
    """Bytes of the KV cache after a prompt, and of what the side branch remembers for later images.

    One number takes `value_bytes`: 2 in half precision, 4 in float32.
    """
    at = decoder_positions(
        program, prompt.text, prompt.image, Mode.PREFILL, tiles=prompt.images(shape.projected) // prompt.batch
    )
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
