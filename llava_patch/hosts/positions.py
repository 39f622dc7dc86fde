"""Image positions on `llava`, which returns embeddings without saying which of them are image features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import InputError

IGNORE_INDEX = -100


def llava_prepare(
    prepare: Callable[..., tuple],
    image_token_id: int,
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    labels: Tensor | None,
    images: Tensor | list[Tensor] | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[tuple, Tensor | None]:
    """Run llava's `prepare_inputs_labels_for_multimodal` and learn where the image features went.

    The host returns embeddings without saying which of them are image features. It does keep labels aligned, so labels
    that hold each text token's own index come back as -100 exactly at image features and padding; padding is told apart
    by the attention mask, and the caller's labels are recovered through the indices.

    `prepare` is the host's bound method, the others are its arguments: ids, positions, mask and labels [batch, tokens],
    images [images, 3, height, width] or a list. InputError: the numbers of placeholders and of images disagree.

    Returns:
        (what the stock method would have returned, bool mask [batch, new tokens] or None when there is no image).
    """
    outputs: tuple
    if images is None or input_ids is None or input_ids.shape[1] == 1:
        outputs = prepare(input_ids, position_ids, attention_mask, past_key_values, labels, images, *args, **kwargs)
        return outputs, None
    placeholders = input_ids == image_token_id
    if attention_mask is not None:
        placeholders = placeholders & attention_mask.bool()
    # A sample without a placeholder still consumes one (dummy) image in the host's loop.
    needed = int(placeholders.sum(1).clamp(min=1).sum())
    if needed != len(images):
        raise InputError(
            f"image tokens and images disagree: {int(placeholders.sum())} image tokens in {len(input_ids)} samples "
            f"need {needed} images (a sample without an image token needs one dummy image), got {len(images)}"
        )
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    own_index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    outputs = prepare(input_ids, position_ids, valid, past_key_values, own_index, images, *args, **kwargs)
    new_ids, new_positions, new_mask, past_key_values, embeds, index = outputs
    if embeds is None:  # the host had nothing to insert (no vision tower)
        return (new_ids, new_positions, attention_mask, past_key_values, None, labels), None
    image_mask = (index == IGNORE_INDEX) & new_mask.bool()
    new_labels = None
    if labels is not None:
        taken = labels.gather(1, index.clamp(min=0))
        new_labels = torch.where(index == IGNORE_INDEX, torch.full_like(taken, IGNORE_INDEX), taken)
    kept_mask = None if attention_mask is None else new_mask
    return (new_ids, new_positions, kept_mask, past_key_values, embeds, new_labels), image_mask


def row_numbers(shape: Sequence[int], device: torch.device) -> Tensor:
    """Features that hold their own row's number, to learn where the host puts each row: float32 of `shape`.

    The host splits, cuts, joins and truncates features [images (or tiles), tokens, hidden] on the way (anyres above
    all); it does the same to these. Channels are 1 + the row and its negative in turn, which no learned vector is.
    """
    tiles, tokens, width = shape
    numbers = torch.arange(1, tiles * tokens + 1, device=device, dtype=torch.float32)
    signs = torch.tensor([1.0, -1.0], device=device).repeat(width // 2)
    return (numbers[:, None] * signs).view(tiles, tokens, width)


def numbered_rows(embeds: Tensor, image_mask: Tensor) -> Tensor:
    """Which row of the image features stands at each place of the decoder's input: int64 [batch, tokens].

    It is 1 + the row, 0 where there is none (text, padding, line ends of anyres). `embeds` [batch, tokens, hidden] is
    what the host made of `row_numbers`, `image_mask` bool [batch, tokens] or [1, 1].
    """
    first, second = embeds[..., 0], embeds[..., 1]
    numbered = image_mask & (first == -second) & (first >= 1) & (first == first.round())
    return torch.where(numbered, first, torch.zeros_like(first)).long()
