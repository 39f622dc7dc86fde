"""Queries, keys and values from an attention layer's own projections, apart from its forward.

Used where a position gives keys and values but asks nothing (the KV variant, the last layer at prefill), and to read
attention without asking any backend for it. Projections are called as modules, so LoRA and quantised ones count.
"""

from typing import Any

import torch
from torch import Tensor

from llava_patch.hosts import compat


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary (cos, sin) [..., tokens, head_dim] to x [..., heads, tokens, head_dim], broadcast over heads.

    Llama's layout: first and second half of a head form the pairs (`apply_rotary_pos_emb` of modeling_llama).
    """
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """[..., tokens, heads * head_dim] to [..., heads, tokens, head_dim]."""
    return projected.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def keys_values(layer: Any, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys, with rotary applied, and values: each [batch, key_value_heads, tokens, head_dim].

    `layer` is a decoder layer, `hidden_states` its input [batch, tokens, hidden] at some positions, `rotary` their
    (cos, sin), each [batch or 1, tokens, head_dim].
    """
    attention, states = layer.self_attn, _normed(layer, hidden_states)
    key = _heads(attention, "k", states, rotary)  # in the stock layer's order, as LoRA's dropout draws
    return key, split_heads(attention.v_proj(states), attention.head_dim)


def keys(layer: Any, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The keys of `keys_values` alone."""
    return _heads(layer.self_attn, "k", _normed(layer, hidden_states), rotary)


def queries(layer: Any, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries of some positions with rotary applied: [batch, heads, tokens, head_dim]; arguments as `keys_values`."""
    return _heads(layer.self_attn, "q", _normed(layer, hidden_states), rotary)


def _normed(layer: Any, hidden_states: Tensor) -> Tensor:
    weight = layer.self_attn.k_proj.weight
    if not weight.is_meta:  # offloaded weights are brought where the layer runs, and its input with them
        hidden_states = hidden_states.to(weight.device)
    return layer.input_layernorm(hidden_states)


def _heads(attention: Any, kind: str, states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries ("q") or keys ("k") by the attention's own projection, and its own norm of each head if it has one."""
    heads = getattr(attention, f"{kind}_proj")(states).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{kind}_norm", None)
    heads = (heads if norm is None else norm(heads)).transpose(-3, -2)
    return rotate(heads, *compat.as_read(attention, rotary, heads))


def attention_of_queries(query: Tensor, key: Tensor, allowed: Tensor, scaling: float) -> Tensor:
    """Attention probabilities of some queries of a sample, mean over heads: float32 [batch, queries, keys].

    `query` is [batch, heads, queries, head_dim], `key` [batch, key_value_heads, keys, head_dim], whose heads divide the
    query's (grouped-query attention), `allowed` bool [batch, queries, keys]; `scaling` is the factor on q.k before the
    softmax.
    """
    groups = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (-1, groups)).flatten(2, 3)  # [batch, key_value_heads, groups * queries, head_dim]
    scores = torch.matmul(grouped, key.transpose(-1, -2)).float() * scaling
    scores = scores.unflatten(2, (groups, -1)).masked_fill(~allowed[:, None, None], float("-inf"))
    return scores.softmax(-1).mean(dim=(1, 2))
