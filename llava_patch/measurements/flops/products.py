"""The decoder's matrix products under any routing: how many positions each layer works on. Mathematics only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import reduce

from llava_patch.measurements.flops.shape import DecoderShape
from llava_patch.routing.schedule import LayerMode, LayerSchedule

Product = tuple[int, int, int]
"""(rows, inner, columns) of one matrix product."""


class Mode(Enum):
    """Which pass."""

    FORWARD = "a plain forward pass: every position is answered"
    PREFILL = "generation's pass over the prompt: only the last position is answered"
    DECODE = "the pass that takes one generated token"


@dataclass(frozen=True)
class Positions:
    """How many positions of a sample a layer works on.

    Attributes:
        asking: go through the queries, the output projection and the feed-forward network.
        giving: go through the projections of keys and values.
        held: keys that each query is multiplied with (full attention: the causal half is computed too).
    """

    asking: int
    giving: int
    held: int


@dataclass(frozen=True)
class LayerProducts:
    """One decoder layer's matrix products, how often each, by what they are for."""

    projections: Counter[Product]
    attention: Counter[Product]
    feed_forward: Counter[Product]

    def all(self) -> Counter[Product]:
        """All of them."""
        return add(self.projections, self.attention, self.feed_forward)


def add(*counts: Counter[Product]) -> Counter[Product]:
    """The sum of several counts."""
    return reduce(lambda a, b: a + b, counts, Counter())


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


def layer_products(shape: DecoderShape, at: Positions, batch: int) -> LayerProducts:
    """The matrix products of one decoder layer."""
    hidden, wide = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    asking, giving = at.asking * batch, at.giving * batch
    projections = counted([((asking, hidden, queries), 1), ((asking, queries, hidden), 1), ((giving, hidden, keys), 2)])
    # Grouped keys are repeated for their queries, so every head has its own product.
    heads = shape.heads * batch
    attention = counted([((at.asking, shape.head_dim, at.held), heads), ((at.asking, at.held, shape.head_dim), heads)])
    feed_forward = counted([((asking, hidden, wide), 2), ((asking, wide, hidden), 1)])
    return LayerProducts(projections, attention, feed_forward)


@dataclass(frozen=True)
class DecoderPositions:
    """How many positions every part of the decoder works on.

    Attributes:
        layers: of each decoder layer.
        side: of each side-branch layer; () without one, or where it does not run.
        chooser: of the pruning's own row of attention, which finds what to prune; None where nothing is pruned.
        answered: positions of a sample that the head answers.
        images: image positions that are left at the split.
    """

    layers: tuple[Positions, ...]
    side: tuple[Positions, ...]
    chooser: Positions | None
    answered: int
    images: int


def decoder_positions(
    program: LayerSchedule, text: int, images: int, mode: Mode, *, answers_last_only: bool = True
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
    """
    routed = images > 0 and program.leaves_out
    last = program.n_layers - 1
    last_token_only = mode is Mode.PREFILL and routed
    pruning = program.pruning if images else None
    kept = images if pruning is None else pruning.keep_counts((images,), (0,))[0]
    here, layers, at_split = images, [], images
    for number, does in enumerate(program.modes):
        if pruning is not None and number == pruning.layer:
            here = kept
        if number == program.split:
            at_split = here
        whole = text + here
        held = text if routed and does is LayerMode.TEXT else whole
        asking = held
        if routed and does is LayerMode.KEYS and number != last:
            asking = text
        if (
            last_token_only
            and text > 1
            and does is LayerMode.FUSE
            and number != last
            and number == program.late_fusion[-1]
        ):
            asking = text
        if last_token_only and number == last:
            asking = 1
        if mode is Mode.DECODE:
            layers.append(Positions(1, 1, held + 1))
        else:
            layers.append(Positions(asking, held, held))
    side: tuple[Positions, ...] = ()
    chooser = None
    if mode is not Mode.DECODE:
        if routed and program.split < program.n_layers and at_split:
            side = (Positions(at_split, at_split, at_split),) * program.side_layers
        if pruning is not None and pruning.USES_ATTENTION:  # with a cache the keys are there already
            chooser = Positions(1, 0 if mode is Mode.PREFILL else text + images, text + images)
    answered = text + images
    if mode is Mode.DECODE or (mode is Mode.PREFILL and (routed or answers_last_only)):
        answered = 1
    return DecoderPositions(tuple(layers), side, chooser, answered, at_split)


def chooser_products(shape: DecoderShape, at: Positions, batch: int) -> Counter[Product]:
    """FastV's row of attention: the last position's query against all keys, values left out."""
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    group = shape.heads // shape.key_value_heads
    return counted(
        [
            ((batch, shape.hidden, queries), 1),
            ((at.giving * batch, shape.hidden, keys), 1),
            ((group, shape.head_dim, at.held), shape.key_value_heads * batch),
        ]
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
