"""The prunings that choose by the vision tower, written down plainly: one image, no batch, loops.

`reference` says what the decoder makes of their choice: what leaves is absent from layer 0 on. Source: "VisionZip",
section 3.2; "LLaVA-PruMerge", section 3; and their repositories.
"""

import math

import torch
from torch import Tensor


def vision_zip(
    states: Tensor, attention: Tensor, keys: Tensor, dominant: int, contextual: int, prefix: int, dropped: int
) -> tuple[Tensor, Tensor]:
    """What VisionZip makes of one image, and what it keeps.

    Args:
        states: the main feature [tokens, channels].
        attention: probabilities [heads, tokens, tokens] of the block that gave it.
        keys: [heads, tokens, head_dim] of that block.
        dominant: tokens that stay as they are, the CLS token among them.
        contextual: tokens that the others are merged into.
        prefix: 1 where the tower has a CLS token, else 0.
        dropped: tokens at the front that the host drops.

    Returns:
        ([tokens of the projector, channels], bool [tokens of the projector]).
    """
    new, first = states.clone(), max(prefix, dropped)
    looked = attention.mean(0)[0] if prefix else attention.mean(0).mean(0)
    patches = list(range(first, len(states)))
    best = sorted(patches, key=lambda i: (-float(looked[i]), i))[: dominant - prefix]
    rest = [i for i in patches if i not in best]
    centres = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    leaving = [i for i in rest if i not in centres]
    direction = keys.mean(0) / keys.mean(0).norm(dim=-1, keepdim=True)
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in leaving if centres else []:
        members[max(centres, key=lambda c: (float(direction[i] @ direction[c]), -c))].append(i)
    for centre, group in members.items():
        if group:
            new[centre] = states[centre] + states[group].mean(0)
    kept = torch.zeros(len(states), dtype=torch.bool)
    kept[[*range(dropped, prefix), *best, *centres]] = True
    if prefix and dropped:  # the CLS token takes a place among the patches
        new[leaving[0]], kept[leaving[0]] = states[0], True
    return new[dropped:], kept[dropped:]


def pru_merge(
    states: Tensor, queries: Tensor, keys: Tensor, plus: bool, neighbours: int, dropped: int
) -> tuple[Tensor, Tensor]:
    """What PruMerge makes of one image, and what it keeps; PruMerge+ with `plus`.

    Args:
        states: the main feature [tokens, channels], the CLS token first.
        queries: [tokens, width] of the block behind it, all heads as one.
        keys: the same of its keys.
        plus: whether patches at even distances stay too.
        neighbours: patches added to one that stays.
        dropped: tokens at the front that the host drops.

    Returns:
        ([tokens of the projector, channels], bool [tokens of the projector]).
    """
    new, patches = states.clone(), range(1, len(states))
    looked = (keys @ queries[0] / math.sqrt(len(queries[0]))).softmax(0)
    low, high = torch.quantile(looked[1:], 0.25), torch.quantile(looked[1:], 0.75)
    stays = [i for i in patches if looked[i] > high + 1.5 * (high - low)]
    if plus:
        every = max(1, len(patches) // max(1, len(stays)) // 3)
        stays = sorted({*stays, *range(1, len(patches), every)})
    leaving = [i for i in patches if i not in stays]
    direction = keys / keys.norm(dim=-1, keepdim=True)
    for i in stays:
        unlike = (-(direction @ direction[i])).tolist()
        others = sorted((j for j in patches if j != i), key=unlike.__getitem__)
        new[i] = states[i] + sum(looked[j] * states[j] for j in others[:neighbours])
    if leaving:
        new[leaving[0]] = sum(looked[j] * states[j] for j in leaving)
    kept = torch.zeros(len(states), dtype=torch.bool)
    kept[[*range(dropped, 1), *stays, *leaving[:1]]] = True
    return new[dropped:], kept[dropped:]
