"""Every routing variant and pruning written down plainly: one sample at a time, no cache, no batch, no backend.

Read this first. `final_states` is the definition; the package's own pass (`schedule`, `routed_pass`) does the same for
ragged batches, with a cache and without the work that nobody reads, and the tests hold it to this.

Source: "Late-Layer Fusion is Enough" (DPVR), section 3, for lf, pc, kv and ideal; "Boosting Multimodal LLMs with Visual
Tokens Withdrawal" for vtw; for prunings the sources that their classes name.
"""

import math
from fractions import Fraction
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_patch.settings.methods import FastV, PyramidDrop, Routing, SparseVLM

InDecoder: TypeAlias = FastV | PyramidDrop | SparseVLM


def final_states(
    decoder: Any,
    embeds: Tensor,
    image: Tensor,
    routing: Routing | None = None,
    pruning: InDecoder | None = None,
    choice: Tensor | None = None,
    there: Tensor | None = None,
) -> Tensor:
    """Hidden states of one sample after the final norm.

    Args:
        decoder: a decoder of the Llama kind, with its side branch where the routing has one; float32 on CPU.
        embeds: [tokens, hidden].
        image: bool [tokens].
        routing: settings, the split as a number; None: every layer sees every position.
        pruning: settings, or None.
        choice: what pruning kept, when it was decided elsewhere: bool [tokens], or int64, how many stages each passed.
        there: bool [tokens], what a pruning by the vision tower (`reference_tower`) has left; None: everything.

    Returns:
        [tokens, hidden]; a position that left the decoder has the state it left with.
    """
    layers = decoder.layers
    variant = None if routing is None else routing.variant
    split = len(layers) if routing is None else int(routing.split)
    late_fusion = _late_fusion_layers(routing, len(layers))
    place = torch.arange(len(embeds))
    x, before = embeds.clone(), embeds.clone()
    alive = torch.ones(len(embeds), dtype=torch.bool) if there is None else there  # what pruning has left
    side = embeds  # the side branch's output

    for number, layer in enumerate(layers):
        if variant in ("pc", "kv") and number > split:  # whatever the layer before made of them
            x[alive & image] = side[alive & image]
        if pruning is not None and number in pruning.stages and image.any():
            stage = pruning.stages.index(number)
            kept = prune(decoder, number, before, x, embeds, image, alive, pruning)
            alive = kept if choice is None else choice > stage
        if number == split:
            side = x.clone()
            rows = place[alive & image]
            if routing is not None and routing.side_layers and len(rows):
                for branch in decoder.side_branch:  # image positions alone, causal, their own position ids
                    side[rows] = run_layer(decoder, branch, side[rows], rows, side[rows], rows)
            x[rows] = side[rows]
        text = alive & ~image
        before = x.clone()
        if number < split or number in late_fusion or variant == "pc" or (variant == "kv" and layer is layers[-1]):
            asking = giving = alive
        elif variant == "kv":  # text asks; the image gives keys and values
            asking, giving = text, alive
        else:  # lf between split and late fusion, ideal, vtw: the image is absent
            asking = giving = text
        if asking.any():
            x[asking] = run_layer(decoder, layer, x[asking], place[asking], x[giving], place[giving])
    return decoder.norm(x)


def _late_fusion_layers(routing: Routing | None, n_layers: int) -> tuple[int, ...]:
    if routing is None or routing.variant != "lf" or routing.split == n_layers:
        return ()
    k = routing.fusion_layers
    return k if isinstance(k, tuple) else tuple(range(n_layers - k, n_layers))


def prune(
    decoder: Any, k: int, before: Tensor, x: Tensor, embeds: Tensor, image: Tensor, alive: Tensor, pruning: InDecoder
) -> Tensor:
    """What a pruning keeps before layer k: the image tokens that its raters look at most; lower places win ties.

    It is the last token that rates, and `raters` for SparseVLM. Attention, mean over heads and raters, is read at layer
    k-1, from its input `before` [tokens, hidden], by PyramidDrop at layer k, from its input `x`; `image` and `alive`,
    what earlier stages have left, are bool [tokens], as is the choice. The last token stays, which generation reads.
    """
    place = torch.arange(len(x))
    rows, last = place[alive], place[-1:]
    layer, states = (decoder.layers[k], x) if isinstance(pruning, PyramidDrop) else (decoder.layers[k - 1], before)
    rate = raters(embeds, image) if isinstance(pruning, SparseVLM) else last
    attention = probabilities(decoder, layer, states[rate], rate, states[rows], rows).mean((0, 1))
    score = torch.zeros(len(x)).index_copy(0, rows, attention).tolist()
    score[-1] = math.inf
    best = sorted(place[alive & image].tolist(), key=lambda i: (-score[i], i))
    kept = alive & ~image
    kept[best[: max(left(pruning, k, int(image.sum())), int(image[-1]))]] = True
    return kept


def raters(embeds: Tensor, image: Tensor) -> Tensor:
    """SparseVLM's raters: of the text behind the last image, what the image is more like than the mean: int64 [n]."""
    place = torch.arange(len(embeds))
    text = place[int(place[image][-1]) + 1 :]
    share = (embeds[image] @ embeds[text].T).softmax(1).mean(0)
    chosen = text[share > share.mean()]
    return chosen if len(chosen) else place[-1:]


def left(pruning: InDecoder, k: int, n: int) -> int:
    """How many of n image tokens a pruning leaves from layer k on; 0.3 is 3/10, which it is not in floating point."""
    keep = 1 - pruning.ratio if isinstance(pruning, FastV) else pruning.keep[pruning.layers.index(k)]
    if isinstance(keep, int):
        return min(keep, n)
    share = Fraction(keep).limit_denominator(10**6) * n
    return math.ceil(share) if pruning.count == "ceil" else round(share) if pruning.count == "round" else int(share)


def run_layer(decoder: Any, layer: Any, asking: Tensor, at: Tensor, giving: Tensor, where: Tensor) -> Tensor:
    """A decoder layer whose queries and keys are of different positions: [queries, hidden].

    It asks with `asking` [queries, hidden] at the places `at`, int64 [queries], what `giving` [keys, hidden] has, the
    same input at the places `where`, int64 [keys].
    """
    attention, mlp = layer.self_attn, layer.mlp
    p = probabilities(decoder, layer, asking, at, giving, where)
    v = _heads(attention.v_proj(layer.input_layernorm(giving)), attention.head_dim)
    v = v.repeat_interleave(len(p) // len(v), 0)
    out = asking + attention.o_proj((p @ v).transpose(0, 1).flatten(1))
    x = layer.post_attention_layernorm(out)
    return out + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def probabilities(decoder: Any, layer: Any, asking: Tensor, at: Tensor, giving: Tensor, where: Tensor) -> Tensor:
    """Causal attention of a layer, arguments as in `run_layer`: [heads, queries, keys]."""
    attention = layer.self_attn
    d = attention.head_dim
    q, k = (_heads(p(layer.input_layernorm(x)), d) for p, x in ((attention.q_proj, asking), (attention.k_proj, giving)))
    if hasattr(attention, "q_norm"):  # Qwen3's, of each head
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = _turn(q, _rotary(decoder, at)), _turn(k, _rotary(decoder, where))
    k = k.repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(d)
    hidden = where[None] > at[:, None]
    window = getattr(decoder.config, "sliding_window", None)
    if window is not None:
        hidden |= where[None] <= at[:, None] - window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def _rotary(decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = decoder.rotary_emb(torch.zeros(1, 1, 1), positions[None])
    return cos[0], sin[0]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(len(x), x.shape[-1] // head_dim, head_dim).transpose(0, 1)  # x may be empty


def _turn(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    return x * rotary[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rotary[1]
