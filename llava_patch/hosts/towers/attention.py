"""Queries and keys of one block of a vision tower, whatever attention backend it runs.

The classes of transformers have a projection each for queries and keys, some with a norm behind it: hooks read what
comes out of the last of them. timm's ViTs have one for queries, keys and values together, norms a head and rotary
embeddings: there the attention module is asked once more, alone, and what it hands to PyTorch's attention is read.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llava_patch.core.errors import HostError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts.towers.layout import Tower

_ATTENTION = ("self_attn", "attention", "attn")
_FIRST_NORMS = ("layer_norm1", "layernorm_before", "rms_norm1")


@dataclass
class QueriesKeys:
    """What a block's attention compared in the last forward pass."""

    # [images, heads, tokens, head_dim], as the block multiplies them (norm and rotary applied); None before.
    q: Tensor | None = None
    k: Tensor | None = None
    scaling: float = 1.0  # factor on q.k before the softmax


def has_cls(vision: Any, tower: Tower) -> bool:
    """Whether the tower's first token is a CLS token (not a register, and not a patch)."""
    if tower.prefix_tokens == 0:
        return False
    body = getattr(vision, "timm_model", None)
    return body is None or getattr(body, "cls_token", None) is not None


@contextlib.contextmanager
def watched(tower: Tower, block: int) -> Iterator[QueriesKeys]:
    """Read queries and keys of a block (1..N, as fusions count) while the tower runs inside, detached.

    HostError: the block's attention is of a kind that is not known; names what was looked for.
    """
    layer = tower.blocks[block - 1]
    attention: Any = next(
        (getattr(layer, n) for n in _ATTENTION if isinstance(getattr(layer, n, None), nn.Module)), None
    )
    if attention is None:
        raise HostError(
            f"block {type(layer).__name__} of the vision tower is not known: looked for its attention in "
            f"{', '.join(_ATTENTION)}, but it has {', '.join(n for n, _ in layer.named_children())}"
        )
    seen = QueriesKeys()
    with UndoStack() as undo:
        if hasattr(attention, "fused_attn"):
            _ask_again(attention, seen, undo)
        elif hasattr(attention, "q_proj") and hasattr(attention, "k_proj"):
            _watch_projections(attention, seen, undo)
        else:
            raise HostError(
                f"attention {type(attention).__name__} of the vision tower is not known: it has neither q_proj and "
                f"k_proj nor timm's fused_attn, but {', '.join(n for n, _ in attention.named_children())}"
            )
        yield seen


def _watch_projections(attention: Any, seen: QueriesKeys, undo: UndoStack) -> None:
    heads = int(attention.num_heads)
    seen.scaling = float(attention.scale)

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        setattr(seen, name, output.detach().unflatten(-1, (heads, -1)).transpose(1, 2))

    for name in ("q", "k"):
        last = getattr(attention, f"{name}_norm", None)  # InternViT: over all heads at once, before they are split
        last = last if isinstance(last, nn.Module) else getattr(attention, f"{name}_proj")
        undo.push(last.register_forward_hook(functools.partial(keep, name)).remove)


class _Handed(TorchFunctionMode):
    """Notes what is handed to scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple, dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _ask_again(attention: Any, seen: QueriesKeys, undo: UndoStack) -> None:
    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        handed = _Handed()
        with UndoStack() as meanwhile, torch.no_grad(), handed:
            meanwhile.set_attribute(module, "fused_attn", True)
            module.forward(*args, **kwargs)  # past the hooks, this one among them
        if len(handed.calls) != 1:
            raise HostError(
                f"attention {type(module).__name__} of the vision tower is not known: it called PyTorch's attention "
                f"{len(handed.calls)} times, not once"
            )
        (q, k, *_), options = handed.calls[0]
        seen.q, seen.k = q.detach(), k.detach()
        seen.scaling = float(options.get("scale") or q.shape[-1] ** -0.5)

    undo.push(attention.register_forward_hook(after, with_kwargs=True).remove)


def can_compare(tower: Tower, block: int) -> None:
    """Refuse a tower whose block (1..N) `compared` does not know: HostError names what was looked for."""
    _first_norm(tower.blocks[block - 1])


@torch.no_grad()
def compared(tower: Tower, block: int, states: Tensor, asking: slice) -> QueriesKeys:
    """Queries of some tokens (`asking`) and keys of all in a block, from its input `states` [images, tokens, channels].

    The block is 1..N, as fusions count. Unlike `watched` it needs no hook, and of the queries makes those alone that
    are asked for; no backend is asked for attention. HostError: a block that is not known.
    """
    norm, attention = _first_norm(tower.blocks[block - 1])
    states = norm(states)

    def heads(kind: str, rows: Tensor) -> Tensor:
        rows = getattr(attention, f"{kind}_proj")(rows)
        over_all = getattr(attention, f"{kind}_norm", None)  # InternViT: over all heads at once
        rows = over_all(rows) if isinstance(over_all, nn.Module) else rows
        return rows.unflatten(-1, (int(attention.num_heads), -1)).transpose(1, 2)

    return QueriesKeys(heads("q", states[:, asking]), heads("k", states), float(attention.scale))


def _first_norm(layer: Any) -> tuple[Any, Any]:
    """The norm in front of a block's attention, and the attention, with a projection each for queries and keys."""
    norm: Any = next((getattr(layer, n) for n in _FIRST_NORMS if isinstance(getattr(layer, n, None), nn.Module)), None)
    attention: Any = next(
        (getattr(layer, n) for n in _ATTENTION if isinstance(getattr(layer, n, None), nn.Module)), None
    )
    if norm is None or not (hasattr(attention, "q_proj") and hasattr(attention, "k_proj")):
        raise HostError(
            f"block {type(layer).__name__} of the vision tower is not known: looked for a norm in "
            f"{', '.join(_FIRST_NORMS)} and an attention with q_proj and k_proj, but it has "
            f"{', '.join(n for n, _ in layer.named_children())}"
        )
    return norm, attention
