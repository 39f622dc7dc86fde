"""Every variant written down plainly, one sample at a time, as an oracle: no cache, no batch, no backend."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor


def _rotary(decoder, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = decoder.rotary_emb(torch.zeros(1, 1, 1), positions[None])
    return cos[0], sin[0]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(len(x), x.shape[-1] // head_dim, head_dim).transpose(0, 1)  # x may be empty


def _turn(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    return x * rotary[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rotary[1]


def probabilities(decoder, layer, asking: Tensor, at: Tensor, giving: Tensor, where: Tensor) -> Tensor:
    """[heads, queries, keys]; `at` and `where` are places in the sequence."""
    attention = layer.self_attn
    d = attention.head_dim
    q = _turn(_heads(attention.q_proj(layer.input_layernorm(asking)), d), _rotary(decoder, at))
    k = _turn(_heads(attention.k_proj(layer.input_layernorm(giving)), d), _rotary(decoder, where))
    k = k.repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(d)
    hidden = where[None] > at[:, None]
    window = getattr(decoder.config, "sliding_window", None)
    if window is not None:
        hidden |= where[None] <= at[:, None] - window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def run_layer(decoder, layer, asking: Tensor, at: Tensor, giving: Tensor, where: Tensor) -> Tensor:
    p = probabilities(decoder, layer, asking, at, giving, where)
    attention = layer.self_attn
    v = _heads(attention.v_proj(layer.input_layernorm(giving)), attention.head_dim)
    v = v.repeat_interleave(len(p) // len(v), 0)
    out = asking + attention.o_proj((p @ v).transpose(0, 1).flatten(1))
    mlp = layer.mlp
    x = layer.post_attention_layernorm(out)
    return out + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def naive(decoder, embeds: Tensor, image: Tensor, routing=None, pruning=None, choice: Tensor | None = None) -> Tensor:
    """Final hidden states of one sample.

    Args:
        decoder: the LlamaModel, with its side branch where the routing has one.
        embeds: [tokens, hidden].
        image: bool [tokens].
        routing: settings or None.
        pruning: settings or None.
        choice: bool [tokens], what pruning kept, when it was decided elsewhere.
    """
    n = len(embeds)
    layers = decoder.layers
    split = len(layers) if routing is None else routing.split
    fusion = ()
    if routing is not None and routing.variant == "lf" and split < len(layers):
        k = routing.fusion_layers
        fusion = k if isinstance(k, tuple) else range(len(layers) - k, len(layers))
    place = torch.arange(n)
    x, before = embeds.clone(), embeds.clone()
    alive = torch.ones(n, dtype=torch.bool)
    side = None

    def on(layer, rows: Tensor) -> None:
        x[rows] = run_layer(decoder, layer, x[rows], place[rows], x[rows], place[rows])

    for number, layer in enumerate(layers):
        resets = routing is not None and routing.variant in ("pc", "kv")
        if resets and number > split:  # whatever the layer before made of them
            x[alive & image] = side[alive & image]
        if pruning is not None and number == pruning.layer and pruning.ratio > 0 and image.any():
            rows = place[alive]
            p = probabilities(decoder, layers[number - 1], before[-1:], place[-1:], before[rows], rows).mean(0)[0]
            wanted = math.ceil((1 - Fraction(pruning.ratio).limit_denominator(10**6)) * int(image.sum()))
            scores = [(-(math.inf if i == n - 1 else float(p[i])), i) for i in place[image].tolist()]
            kept = [i for _, i in sorted(scores)[: max(wanted, int(image[-1]))]]
            alive = ~image
            alive[kept] = True
            if choice is not None:
                alive = choice.clone()
        if number == split:
            side = x.clone()
            rows = place[alive & image]
            if routing.side_layers and len(rows):
                states = side[rows]
                for branch in decoder.side_branch:
                    states = run_layer(decoder, branch, states, rows, states, rows)
                side[rows] = states
            x[rows] = side[rows]
        text = alive & ~image
        before = x.clone()
        if number < split or number in fusion:
            on(layer, alive)
        elif routing.variant == "kv" and number < len(layers) - 1:
            x[text] = run_layer(decoder, layer, x[text], place[text], x[alive], place[alive])
        elif resets:
            on(layer, alive)
        elif text.any():
            on(layer, text)
    return decoder.norm(x)
