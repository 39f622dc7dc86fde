"""From queries and keys of one ViT block to a map over the patches: mathematics only."""

import math

import torch
from torch import Tensor


def patch_attention(q: Tensor, k: Tensor, scaling: float, prefix: int, cls: bool, chunk: int = 256) -> Tensor:
    """Attention that each patch gets, mean over heads, without what goes to the tokens before the patches.

    Args:
        q: [heads, tokens, head_dim].
        k: [heads, tokens, head_dim].
        scaling: factor on q.k before the softmax.
        prefix: tokens before the patches.
        cls: whether token 0 is a CLS token, which then asks alone; otherwise all patches ask, and their mean is taken.
        chunk: queries held at a time, so that memory is O(heads * chunk * tokens).

    Returns:
        float32 [patches]; the sum is at most 1 (less what the prefix tokens get).
    """
    queries = q[:, :1] if cls else q[:, prefix:]
    keys = k.float().transpose(1, 2)
    total = torch.zeros(k.shape[1] - prefix, device=k.device)
    for part in queries.float().split(chunk, dim=1):
        total += (torch.matmul(part, keys) * scaling).softmax(-1)[:, :, prefix:].sum(dim=(0, 1))
    return total / (queries.shape[0] * queries.shape[1])


def min_max(scores: Tensor) -> Tensor:
    """Scores moved to 0..1; all zeros when they are all the same."""
    low, high = scores.min(), scores.max()
    return torch.zeros_like(scores) if low == high else (scores - low) / (high - low)


def nearest(grid: Tensor, patch: int) -> Tensor:
    """Each cell of [rows, columns] as a square of `patch` pixels: [rows * patch, columns * patch]."""
    return grid.repeat_interleave(patch, 0).repeat_interleave(patch, 1)


def entropy(scores: Tensor) -> float:
    """Entropy of the scores as a distribution over patches, in nats: 0 for one patch, ln(patches) for all alike.

    exp of it is the effective number of patches.
    """
    share = scores.double().flatten()
    share = share / share.sum()
    value = float(-(share * share.clamp(min=1e-300).log()).sum())
    return min(max(value, 0.0), math.log(share.numel()))


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson correlation of two maps of the same grid; NaN where one of them is constant."""
    pair = torch.stack([one.double().flatten(), other.double().flatten()])
    pair = pair - pair.mean(1, keepdim=True)
    norms = pair.norm(dim=1)
    return float((pair[0] * pair[1]).sum() / (norms[0] * norms[1])) if bool((norms > 0).all()) else math.nan
