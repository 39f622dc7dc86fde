"""Attention probabilities from q and k, in chunks of queries: mathematics only.

The same numbers come out whatever attention backend the model runs (eager, sdpa, flash attention), because none of them
is asked: q and k are taken from the layer's own projections.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mass_on_keys(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    window: int | None = None,
    chunk: int = 128,
) -> Tensor:
    """Sum of causal attention probabilities on a set of keys, mean over a set of queries.

    Memory is O(heads * chunk * tokens), never O(tokens^2).

    Args:
        q: [heads, tokens, head_dim], rotary applied.
        k: [key_value_heads, tokens, head_dim], rotary applied; heads must be a multiple (grouped-query attention).
        queries: int64 [n], the positions whose rows are read.
        keys: bool [tokens], the positions whose probabilities are summed.
        scaling: factor on q.k before the softmax, usually head_dim ** -0.5.
        window: sliding window (a query sees itself and the window - 1 tokens before it); None: all before it.
        chunk: queries held at a time.

    Returns:
        float32 [heads], each between 0 and 1.
    """
    heads, tokens = q.shape[0], k.shape[1]
    groups = heads // k.shape[0]
    columns = torch.arange(tokens, device=q.device)
    total = torch.zeros(heads, dtype=torch.float32, device=q.device)
    for rows in queries.split(chunk):
        # [key_value_heads, groups, rows, tokens]: query heads of one group share their key head.
        grouped = q[:, rows].unflatten(0, (k.shape[0], groups))
        scores = torch.matmul(grouped, k.transpose(1, 2)[:, None]) * scaling
        hidden = columns[None] > rows[:, None]
        if window is not None:
            hidden |= columns[None] <= rows[:, None] - window
        scores = scores.float().masked_fill(hidden, float("-inf")).softmax(dim=-1)
        total += (scores * keys).sum(dim=(-2, -1)).flatten()
    return total / max(len(queries), 1)
