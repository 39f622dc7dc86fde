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
    heads, kinds = q.shape[0], k.shape[0]
    if places is None:
        places = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=k.device)
    columns = places[1].to(q.device)
    transposed = k.float().transpose(1, 2)[:, None]
    total = torch.zeros(heads, dtype=torch.float32, device=q.device)
    for rows in queries.split(chunk):
        # [key_value_heads, groups, rows, giving]: query heads of one group share their key head.
        grouped = q[:, rows].float().unflatten(0, (kinds, heads // kinds))
        scores = torch.matmul(grouped, transposed).mul_(scaling)
        here = places[0].to(q.device)[rows][:, None]
        hidden = columns[None] > here
        if window is not None:
            hidden |= columns[None] <= here - window
        scores = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        total += (scores * keys).sum(dim=(-2, -1)).flatten()
    return total / max(len(queries), 1)
