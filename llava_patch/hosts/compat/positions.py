"""Rotary embeddings, which the decoder makes for all of its layers, or each attention module for itself.

It does so out of a table that it indexes by positions (all in 4.37), or from positions (from 4.38 on, a class at a
time); the decoder of Llama does from 4.43 on, others' from 4.46 to 4.48 on.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.undo import UndoStack, holding, inner
from llava_patch.hosts.compat.features import parameters_of
from llava_patch.hosts.zero import bare

Rotary = tuple[Tensor, Tensor]
_given: ContextVar[Rotary | None] = ContextVar("llava_patch_rotary", default=None)


def looks_up(attention: Any) -> bool:
    """Whether an attention module makes its own rotary embedding instead of being given it."""
    return "position_embeddings" not in parameters_of(type(bare(attention)).forward)


def _has_table(embedding: Any) -> bool:
    return "position_ids" not in parameters_of(type(embedding).forward)


def rotary(decoder: Any, hidden_states: Tensor, position_ids: Tensor) -> Rotary:
    """The stock (cos, sin) at some positions, int64 [batch or 1, tokens]: each [batch or 1, tokens, head_dim].

    They are of the hidden states' precision. Where attention modules make their own they are of float32: a module
    rounds them to that of its values, see `as_read`.
    """
    attention = decoder.layers[0].self_attn
    if not looks_up(attention):
        return decoder.rotary_emb(hidden_states, position_ids)  # type: ignore[no-any-return]
    return _looked_up(attention.rotary_emb, position_ids)


def _looked_up(embedding: Any, position_ids: Tensor) -> Rotary:
    example = torch.empty(0, device=position_ids.device)
    if not _has_table(embedding):
        return embedding(example, position_ids)  # type: ignore[no-any-return]
    cos, sin = embedding(example, seq_len=int(position_ids.max()) + 1)
    return cos[position_ids], sin[position_ids]


def rotary_of_call(attention: Any, hidden_states: Tensor, arguments: dict[str, Any]) -> Rotary:
    """What an attention module turns its heads by in a call with these arguments; as `rotary`, in their precision.

    `hidden_states` is [batch, tokens, hidden].
    """
    if not looks_up(attention):
        return arguments["position_embeddings"]  # type: ignore[no-any-return]
    rows = _given.get() or _looked_up(attention.rotary_emb, arguments["position_ids"])
    cos, sin = (part.reshape(-1, hidden_states.shape[1], part.shape[-1]).to(hidden_states) for part in rows)
    return cos, sin


def as_read(attention: Any, rotary: Rotary, heads: Tensor) -> Rotary:
    """(cos, sin) as an attention module turns its heads [batch, heads, tokens, head_dim] by: [batch or 1, 1, ...]."""
    dtype = heads.dtype if looks_up(attention) else None
    cos, sin = (part.unsqueeze(-3).to(heads.device, dtype) for part in rotary)
    return cos, sin


def rope_type(decoder: Any) -> str | None:
    """How rotary embeddings are scaled: "default", "linear", "dynamic", ..."""
    if hasattr(decoder, "rotary_emb"):
        return getattr(decoder.rotary_emb, "rope_type", None)
    return (getattr(decoder.config, "rope_scaling", None) or {}).get("type")


def inverse_frequencies(decoder: Any) -> Tensor | None:
    """What positions are multiplied by, [head_dim / 2]; None: no rotary decoder."""
    owner = decoder if hasattr(decoder, "rotary_emb") else getattr(decoder.layers[0], "self_attn", None)
    found = getattr(getattr(owner, "rotary_emb", None), "inv_freq", None)
    return found if isinstance(found, Tensor) else None


class _Given:
    """The forward of an attention module's own embedding, which gives the rows of `giving` where there are some."""

    def __init__(self, embedding: Any) -> None:
        self.stock = inner(embedding, "forward")

    def __call__(self, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = _given.get()
        if rows is None:
            return self.stock(values, *args, **kwargs)
        return tuple(part.to(values.device, values.dtype) for part in rows)


def take_given(attention: Any, undo: UndoStack) -> None:
    """Let `giving` say what an attention module turns its heads by.

    Modifications: where it makes that itself, the instance attribute `forward` of its `rotary_emb`.
    """
    if looks_up(attention) and not isinstance(inner(attention.rotary_emb, "forward"), _Given):
        undo.set_attribute(attention.rotary_emb, "forward", _Given(attention.rotary_emb))


@contextlib.contextmanager
def giving(attention: Any, rotary: Rotary, arguments: dict[str, Any]) -> Iterator[None]:
    """Inside the block, an attention module of `take_given` turns its heads by the (cos, sin) of `rotary`.

    `arguments` of its layer are changed in place: a module that indexes a table is asked for the rows of this one.
    """
    if not isinstance(inner(attention.rotary_emb, "forward"), _Given):
        raise RuntimeError("a decoder layer that looks its rotary embedding up was not prepared (`prepare_layers`)")
    if _has_table(attention.rotary_emb):
        count, tokens = rotary[0].shape[:2]
        arguments["position_ids"] = torch.arange(count * tokens, device=rotary[0].device).view(count, tokens)
        rotary = rotary[0].flatten(0, 1), rotary[1].flatten(0, 1)
    with holding(_given, rotary):
        yield
