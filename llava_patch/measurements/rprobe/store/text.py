"""The text side of frozen samples: token ids, and the rows of the embedding table that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import InputError, SettingError
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.settings import RProbe


@dataclass(frozen=True, eq=False)
class Text:
    """Frozen text of many samples, on CPU.

    Attributes:
        ids: int64 [samples, width], rows of `table`, padded with 0.
        counts: int64 [samples].
        table: float32 [distinct tokens, hidden].
    """

    ids: Tensor
    counts: Tensor
    table: Tensor


def token_ids(text: str, name: str, tokenizer: Any, settings: RProbe) -> tuple[list[int], bool]:
    """Ids of a text, cut to `max_text_tokens`; the unknown token in their places when `settings.text` is False.

    Returns:
        The ids, and whether they are all that the text has.

    Raises:
        InputError: the text has no tokens; names the sample.
        SettingError: the unknown token is wanted, but the tokenizer has none.
    """
    found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = found[: settings.max_text_tokens]
    whole = len(ids) == len(found)
    if not ids:
        raise InputError(f"{name}: the text {text!r} has no tokens")
    if settings.text:
        return ids, whole
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        raise SettingError("RProbe.text = False replaces text by the unknown token, but this tokenizer has none")
    return [int(unknown)] * len(ids), whole


def embed(anatomy: Anatomy, texts: Sequence[list[int]]) -> Text:
    """Embed every distinct token once.

    Raises:
        InputError: an id that the model does not embed.
    """
    counts = torch.tensor([len(ids) for ids in texts], dtype=torch.int64)
    flat = torch.tensor([i for ids in texts for i in ids], dtype=torch.int64)
    weight = next(anatomy.embed_tokens.parameters())
    if int(flat.max()) >= weight.shape[0]:
        raise InputError(
            f"the tokenizer gives id {int(flat.max())}, the model embeds {weight.shape[0]} tokens: is it its tokenizer?"
        )
    distinct, row = flat.unique(return_inverse=True)
    table = anatomy.embed_tokens(distinct.to(weight.device)).detach().to(device="cpu", dtype=torch.float32, copy=True)
    padded = torch.zeros(len(texts), int(counts.max()), dtype=torch.int64)
    padded[torch.arange(padded.shape[1]) < counts[:, None]] = row
    return Text(padded, counts, table)
