"""One forward pass seen layer by layer: hooks on a decoder's layers, and what is read there.

Hooks see the layers' own inputs and outputs, so the same code serves stock and patched models and every attention
backend: q and k are taken from a layer's own projections. A routed or pruned decoder says itself which positions a
layer runs on (`routing.layers.Observer`). The side branch of a routed model is not part of `decoder.layers` and is not
seen.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_patch.core.errors import HostError, InputError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import known
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.hosts.compat import layer_output, rotary_of_call, sliding_window
from llava_patch.hosts.compat import scaling as scaling_of
from llava_patch.hosts.projections import rotate, split_heads
from llava_patch.measurements import passes
from llava_patch.routing.layers import ExternalKeys, Observer, observing


@dataclass
class Trace(Observer):
    """What one sample's forward pass left behind; L layers, T tokens of which some are image.

    Every text position is in every layer, whatever the patch; image positions may be absent. Dictionaries are by layer.
    """

    seen: passes.Pass  # the sample, and where its image positions are
    states: dict[int, Tensor] = field(default_factory=dict)  # its output, [positions that it runs on, hidden]
    # int64: the positions of the states, and of the keys that those look at, where a routed or pruned decoder tells.
    asking: dict[int, Tensor] = field(default_factory=dict)
    giving: dict[int, Tensor] = field(default_factory=dict)
    # 0-d: mean cosine between input and output at image and at text positions; NaN where there are none.
    image_cosine: dict[int, Tensor] = field(default_factory=dict)
    text_cosine: dict[int, Tensor] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)  # float32 [heads], of text on image keys; zeros without any
    peak: dict[int, Tensor] = field(default_factory=dict)  # float32 [heads], of the read positions on one image key
    looked: dict[int, Tensor] = field(default_factory=dict)  # float32 [heads, image keys], of the last read position
    entered: dict[int, Tensor] = field(default_factory=dict)  # a layer's input, rows as in `states`
    rotary: tuple[Tensor, Tensor] | None = None  # (cos, sin) of layer 0, each [1, positions, head_dim]
    _positions: tuple[Tensor, Tensor, int] | None = None
    _reads: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Image positions, bool [T]; HostError where the decoder ran before they were known."""
        return self.seen.placed

    def positions(self) -> tuple[Tensor, Tensor, int]:
        """(int64 [T], text positions behind the image, number of text positions); one synchronisation a sample."""
        if self._positions is None:
            image = self.mask
            queries = text_after_image(image)
            self._positions = torch.arange(len(image), device=image.device), queries, int((~image).sum())
        return self._positions

    def reads(self) -> Tensor:
        """The text positions behind the image that the answer is read from: int64 [n], see `read_positions`."""
        if self._reads is None:
            self._reads = read_positions(self.mask, self.seen.labels)
        return self._reads

    def layer(self, number: int, asking: Tensor, giving: Tensor) -> None:
        """Take note of what a routed or pruned decoder says of a layer; each [1, n]."""
        self.asking[number], self.giving[number] = asking[0], giving[0]

    def places(self, layer: int, rows: int, keys: bool = False) -> Tensor:
        """Positions of a layer's hidden states, or of its keys: int64 [rows]; HostError where they cannot be known."""
        found = (self.giving if keys else self.asking).get(layer)
        if found is None:
            found = self.positions()[0]
        if len(found) != rows:
            what = "keys" if keys else "tokens"
            raise HostError(
                f"layer {layer} sees {rows} {what} of {len(found)} expected ones (the sample has {len(self.mask)} "
                "tokens): something besides llava_patch removes tokens, and where they are from cannot be known"
            )
        return found

    def image_states(self, layer: int) -> int:
        """How many image positions have hidden states in a layer."""
        return len(self.states[layer]) - self.positions()[2]

    def image_keys(self, layer: int) -> int:
        """How many image positions a layer's queries may look at."""
        found = self.giving.get(layer)
        return (len(self.mask) if found is None else len(found)) - self.positions()[2]

    def rows(self, layer: int) -> Tensor:
        """Where each full position is in `states[layer]`: int64 [T], -1 where absent."""
        places = self.places(layer, len(self.states[layer]))
        row = torch.full_like(self.positions()[0], -1)
        return row.scatter(0, places.to(row.device), torch.arange(len(places), device=row.device))


@contextlib.contextmanager
def traced(
    anatomy: Anatomy, sample: dict[str, Any], chunk: int, mass_of: Sequence[int] | None = None, what: str = "saturation"
) -> Iterator[Trace]:
    """Watch the forward pass of one sample; every hook is gone afterwards, after an exception too.

    Args:
        anatomy: the host model; HostError for a decoder whose attention is not known.
        sample: as `passes.watching` takes it.
        chunk: attention queries held at a time.
        mass_of: layers whose attention mass is all that is wanted; None: everything of every layer.
        what: name of the measurement, for errors.

    Yields:
        The trace, filled by calling `passes.run` inside the block.
    """
    known.check_decoder(anatomy.decoder, "measuring attention")
    with passes.watching(anatomy, sample, what) as (seen, undo):
        trace = Trace(seen)
        for index, layer in enumerate(anatomy.layers):
            if mass_of is None:
                _watch_layer(trace, index, layer, undo)
            if mass_of is None or index in mass_of:
                _watch_attention(trace, index, layer.self_attn, anatomy.text_config, chunk, undo)
        with observing(trace):
            yield trace


def _hidden_argument(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.shape[0] != 1:
        raise InputError(f"one sample at a time is measured, but the decoder got {hidden.shape[0]}")
    return hidden[0]


def _watch_layer(trace: Trace, index: int, layer: nn.Module, undo: UndoStack) -> None:
    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        before = _hidden_argument(args, kwargs)
        states = layer_output(output)[0]
        places = trace.places(index, len(states))
        image = trace.mask[places.to(trace.mask.device)].to(states.device)
        cosine = F.cosine_similarity(before.float(), states.float(), dim=-1)
        trace.image_cosine[index] = (cosine * image).sum() / image.sum()  # 0 / 0 is NaN: absent
        trace.text_cosine[index] = (cosine * ~image).sum() / (~image).sum()
        trace.states[index] = states.detach()
        trace.entered[index] = before.detach()

    undo.push(layer.register_forward_hook(after, with_kwargs=True).remove)


def _watch_attention(trace: Trace, index: int, attention: Any, config: Any, chunk: int, undo: UndoStack) -> None:
    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = _hidden_argument(args, kwargs)
        asking = trace.places(index, len(hidden)).to(hidden.device)
        if trace.image_keys(index) == 0:  # no image key to look at: zero by definition
            trace.mass[index] = torch.zeros(int(config.num_attention_heads), device=hidden.device)
            trace.peak[index] = trace.mass[index]
            trace.looked[index] = trace.mass[index][:, None][:, :0]
            return
        head_dim = int(module.head_dim)
        rotary = rotary_of_call(module, hidden[None], kwargs)
        if index == 0:
            trace.rotary = rotary
        cos, sin = (part[0] for part in rotary)
        q = rotate(split_heads(module.q_proj(hidden[None])[0], head_dim), cos, sin)
        k = rotate(split_heads(module.k_proj(hidden[None])[0], head_dim), cos, sin)
        external = next((value for value in kwargs.values() if isinstance(value, ExternalKeys)), None)
        if external is not None:  # other positions give keys that the layer did not compute in this call
            k = external.merged_keys(k[None])[0]
        giving = trace.places(index, k.shape[1], keys=True).to(hidden.device)
        # Every text position asks in every layer, and positions ascend.
        queries = torch.searchsorted(asking, trace.positions()[1].to(hidden.device))
        image = trace.mask.to(hidden.device)[giving]
        scaling = scaling_of(module)
        window, places = sliding_window(config), (asking, giving)
        trace.mass[index] = mass_on_keys(q, k, queries, image, scaling, window, chunk, places)
        reads = torch.searchsorted(asking, trace.reads().to(hidden.device))
        trace.peak[index] = peak_on_keys(q, k, reads, image, scaling, window, chunk, places)
        (last,) = _probabilities(q, k, reads[-1:], scaling, window, chunk, places)
        trace.looked[index] = last.flatten(0, 2)[:, image]

    undo.push(attention.register_forward_pre_hook(before, with_kwargs=True).remove)


def text_after_image(image: Tensor) -> Tensor:
    """Text positions behind the first image position (bool [tokens]): int64 [n], the queries of the attention mass."""
    return (~image & (image.long().cumsum(0) > 0)).nonzero().flatten()


def read_positions(image: Tensor, labels: Tensor | None) -> Tensor:
    """The text positions behind the image whose next token is the answer's: int64 [n], at least one.

    Args:
        image: bool [tokens], with text behind the first image position.
        labels: int64 [text tokens], -100 where nothing is to be said, or None. Without any label the last text position
            is read, as generation reads a prompt.
    """
    behind = text_after_image(image)
    if labels is not None:
        text = (~image).nonzero().flatten()
        wanted = torch.zeros_like(image)
        said = labels[: len(text)].to(image.device) != -100  # a host that cuts a long sample cuts its end
        wanted[text[: len(said)][said]] = True
        found = behind[wanted.roll(-1)[behind] & (behind + 1 < len(image))]
        if len(found):
            return found
    return behind[-1:]


def mass_on_keys(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    window: int | None = None,
    chunk: int = 128,
    places: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum of causal attention probabilities on a set of keys, mean over a set of queries.

    Memory is O(heads * chunk * keys), never O(tokens^2). Products and softmax are in float32 whatever the dtype.

    Args:
        q: [heads, asking, head_dim], rotary applied.
        k: [key_value_heads, giving, head_dim], rotary applied; heads must be a multiple (grouped-query attention).
        queries: int64 [n], the rows of `q` that are read.
        keys: bool [giving], the rows of `k` whose probabilities are summed.
        scaling: factor on q.k before the softmax, usually head_dim ** -0.5.
        window: sliding window (a query sees itself and the window - 1 tokens before it); None: all before it.
        chunk: queries held at a time.
        places: int64 ([asking], [giving]), where the rows of `q` and `k` are in the sequence; None: rows are places.

    Returns:
        float32 [heads], each between 0 and 1.
    """
    total = torch.zeros(q.shape[0], dtype=torch.float32, device=q.device)
    for scores in _probabilities(q, k, queries, scaling, window, chunk, places):
        total += (scores * keys).sum(dim=(-2, -1)).flatten()
    return total / max(len(queries), 1)


def peak_on_keys(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    window: int | None = None,
    chunk: int = 128,
    places: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Largest causal attention probability on a single one of a set of keys, mean over a set of queries.

    Arguments and result as in `mass_on_keys`.
    """
    total = torch.zeros(q.shape[0], dtype=torch.float32, device=q.device)
    for scores in _probabilities(q, k, queries, scaling, window, chunk, places):
        total += (scores * keys).amax(-1).sum(-1).flatten()
    return total / max(len(queries), 1)


def _probabilities(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    scaling: float,
    window: int | None,
    chunk: int,
    places: tuple[Tensor, Tensor] | None,
) -> Iterator[Tensor]:
    """Causal attention probabilities [key_value_heads, groups, rows, giving], some queries at a time."""
    heads, kinds = q.shape[0], k.shape[0]
    if places is None:
        places = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=k.device)
    columns = places[1].to(q.device)
    transposed = k.float().transpose(1, 2)[:, None]
    for rows in queries.split(chunk):
        # [key_value_heads, groups, rows, giving]: query heads of one group share their key head.
        grouped = q[:, rows].float().unflatten(0, (kinds, heads // kinds))
        scores = torch.matmul(grouped, transposed).mul_(scaling)
        here = places[0].to(q.device)[rows][:, None]
        hidden = columns[None] > here
        if window is not None:
            hidden |= columns[None] <= here - window
        yield scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)


def lens_kl(anatomy: Anatomy, trace: Trace, chunk: int) -> tuple[list[float], list[float], list[float]]:
    """KL(final || layer) of the logit lens: what each layer would predict through the model's own final norm and head.

    Args:
        anatomy: the host model.
        trace: a finished trace.
        chunk: positions whose logits [chunk, vocabulary] are held at a time.

    Returns:
        (image, text, reads): per layer the mean in nats over the positions that both the layer and the last one have
        (pruned ones are in neither); NaN where there are none. The last layer's is 0. `reads` are a part of the text.
    """
    layers = range(len(anatomy.layers))
    last = layers[-1]
    rows = [trace.rows(layer) for layer in layers]

    def predicted(layer: int, positions: Tensor) -> Tensor:
        states = trace.states[layer]
        logits = anatomy.lm_head(anatomy.norm(states[rows[layer][positions].to(states.device)][None]))
        return logits[0].float().log_softmax(-1)

    def means(positions: Tensor, present: list[bool]) -> list[float]:
        # Layers only ever lose image positions for good or for all of them, so one that has any has those of the last.
        if not len(positions):
            return [math.nan] * len(layers)
        sums = torch.zeros(len(layers), dtype=torch.float64, device=positions.device)
        for part in positions.split(chunk):
            final = predicted(last, part)
            probability = final.exp()
            for layer in layers:
                if present[layer]:
                    log_probs = final if layer == last else predicted(layer, part)
                    sums[layer] += (probability * (final - log_probs)).sum().to(sums)
        found = (sums / len(positions)).tolist()
        return [mean if there else math.nan for mean, there in zip(found, present, strict=True)]

    image, text = trace.mask & (rows[last] >= 0), ~trace.mask
    present = [trace.image_states(layer) > 0 for layer in layers]
    always = [True] * len(layers)
    return (
        means(image.nonzero().flatten(), present),
        means(text.nonzero().flatten(), always),
        means(trace.reads(), always),
    )
