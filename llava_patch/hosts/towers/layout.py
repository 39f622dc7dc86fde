"""Where things are in a vision tower: its blocks, what comes before and after them, and what its tokens mean.

A tower is recognised by what it is made of. Known: CLIP, SigLIP (and SigLIP 2 of one resolution,
which is the same class), SigLIP 2 NaFlex, InternViT, AIMv2, and timm's ViTs through TimmWrapperModel (Perception
Encoder).
"""

import functools
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llava_patch.core.errors import HostError
from llava_patch.hosts import compat, zero

TIMM = "timm_wrapper"
SEVERAL_SCALES = "{} does not know multi-scale (S2) towers, which see an image several times: take a model without s2"
PREFIX_TOKENS = {
    "clip_vision_model": 1, "internvl_vision": 1, "siglip_vision_model": 0, "siglip2_vision_model": 0,
    "aimv2_vision_model": 0,
}  # fmt: skip
"""Tokens before the patches by `config.model_type`: a configuration alone does not say whether there is a CLS token."""

_BLOCKS = (("encoder", "layers"), ("encoder", "layer"), ("blocks", ""))


@dataclass(frozen=True, eq=False)
class Tower:
    """The parts of one vision model."""

    before: list[nn.Module]  # modules before the first block (patch embedding, a norm)
    blocks: nn.ModuleList  # the N transformer blocks
    after: list[nn.Module]  # modules after the last block (final norm, pooling head)
    own: list[nn.Parameter]  # parameters that belong to no child module
    prefix_tokens: int  # tokens before the patches (1 for a CLS token)
    grid: tuple[int, int]  # rows and columns of patches
    last_is_normed: bool = False  # whether the last hidden state that the model reports comes after the final norm
    # Parameters before the blocks that an ordinary forward does not read (a mask token).
    idle: list[nn.Parameter] = field(default_factory=list)

    def final_norm(self, deepest: int) -> list[nn.Module]:
        """The final norm when the output of block `deepest` is read through it, else nothing."""
        return self.after[:1] if self.last_is_normed and deepest == len(self.blocks) else []

    def unused(self, deepest: int) -> list[nn.Parameter]:
        """Parameters that nothing reads when block `deepest` (1..N) is the deepest used one."""
        after = self.after[len(self.final_norm(deepest)) :]
        return [p for module in (*self.blocks[deepest:], *after) for p in module.parameters()] + self.idle


@dataclass(frozen=True)
class Shape:
    """What a tower's configuration says, before its weights are loaded."""

    n_blocks: int  # number N of transformer blocks
    width: int  # channels of a token
    patch_size: int  # side of a patch in pixels
    grid: tuple[int, int]  # rows and columns of patches


def describe(vision: Any) -> Tower:
    """Describe a vision model of transformers; HostError names what was looked for and what is there."""
    kind = type(vision).__name__
    body = getattr(vision, "timm_model", None) or getattr(vision, "vision_model", vision)
    children = dict(body.named_children())
    holder, blocks = _find_blocks(body)
    if blocks is None:
        raise HostError(
            f"vision tower {kind} is not known: looked for its blocks in encoder.layers, encoder.layer and blocks, but "
            f"{type(body).__name__} has {', '.join(children) or 'no child modules'}"
        )
    if {id(p) for p in children[holder].parameters()} != {id(p) for p in blocks.parameters()}:
        raise HostError(f"vision tower {kind} is not known: {holder} holds more weights than its blocks'")
    modules, at = list(children.values()), list(children).index(holder)
    before, after = modules[:at], modules[at + 1 :]
    prefix = _prefix_tokens(kind, body, children)
    shape = _timm_shape(vision) if hasattr(vision, "timm_model") else shape_of(vision.config)
    _check_positions(kind, body, children, prefix, shape.grid)
    masks = [m.mask_token for m in before if isinstance(getattr(m, "mask_token", None), nn.Parameter)]
    return Tower(
        before=before, blocks=blocks, after=after, own=list(body.parameters(recurse=False)), prefix_tokens=prefix,
        grid=shape.grid, last_is_normed=_last_is_normed(vision, after), idle=masks,
    )  # fmt: skip


def check_reports(vision: Any) -> None:
    """Refuse a class that gives a host no hidden states on `vision(pixels, output_hidden_states)`: HostError."""
    parameters = list(inspect.signature(type(vision).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if extra := [p.name for p in named if p.default is p.empty and p.name != "pixel_values"]:
        reason = f"its forward also needs {', '.join(extra)}"
    elif not any(p.name == "output_hidden_states" or p.kind is p.VAR_KEYWORD for p in parameters):
        reason = "its forward takes no output_hidden_states"
    elif hasattr(vision, "timm_model") and not hasattr(vision, "last_state_is_normed"):
        reason = "it reports feature maps [images, channels, rows, columns] without prefix tokens, not tokens"
    else:
        return
    raise HostError(
        f"{type(vision).__name__} cannot be the tower of this host, which asks for pixel_values with "
        f"output_hidden_states=True: {reason}. Use it with the llava package, whose tower llava_patch builds for it"
    )


def shape_of(config: Any) -> Shape:
    """Blocks, width, patch size and grid of a vision configuration; HostError names fields that are not understood."""
    kind = type(config).__name__
    if getattr(config, "model_type", None) == TIMM and not hasattr(config, "num_hidden_layers"):
        return _timm_shape(_without_weights(config))
    missing = [n for n in ("num_hidden_layers", "hidden_size", "patch_size") if not hasattr(config, n)]
    if not hasattr(config, "image_size") and not hasattr(config, "num_patches"):
        missing.append("image_size (or num_patches)")
    if missing:
        raise HostError(f"vision configuration {kind} is not known: it has no {', '.join(missing)}")
    patch = _pair(config.patch_size)
    if patch[0] != patch[1]:
        raise HostError(f"{kind}.patch_size = {patch}: only square patches are known")
    if hasattr(config, "image_size"):
        height, width = _pair(config.image_size)
        grid = height // patch[0], width // patch[1]
    else:  # NaFlex: the number of patches that its positions were made for, as a square
        side = math.isqrt(int(config.num_patches))
        if side * side != config.num_patches:
            raise HostError(f"{kind}.num_patches = {config.num_patches} is no square: no fixed grid follows from it")
        grid = side, side
    return Shape(int(config.num_hidden_layers), int(config.hidden_size), patch[0], grid)


def prefix_tokens_of(config: Any) -> int:
    """Tokens before the patches, by configuration; HostError for a kind of tower that is not known."""
    kind = getattr(config, "model_type", type(config).__name__)
    if hasattr(config, "num_prefix_tokens"):
        return int(config.num_prefix_tokens)
    if kind == TIMM:
        return int(_without_weights(config).timm_model.num_prefix_tokens)
    if kind not in PREFIX_TOKENS:
        raise HostError(
            f"vision tower of type {kind}: whether it has a CLS token is not known; known are "
            f"{', '.join([*PREFIX_TOKENS, TIMM])}"
        )
    return PREFIX_TOKENS[kind]


def _find_blocks(body: nn.Module) -> tuple[str, nn.ModuleList | None]:
    for holder, name in _BLOCKS:
        found = getattr(body, holder, None)
        found = getattr(found, name, None) if name else found
        if isinstance(found, nn.Sequential):  # older timm
            found = nn.ModuleList(found)
        if isinstance(found, nn.ModuleList):
            return holder, found
    return "", None


def _prefix_tokens(kind: str, body: Any, children: dict[str, nn.Module]) -> int:
    if "blocks" in children:
        if not isinstance(getattr(body, "num_prefix_tokens", None), int):
            raise HostError(f"vision tower {kind} is not known: {type(body).__name__} has no num_prefix_tokens")
        return int(body.num_prefix_tokens)
    embeddings = children.get("embeddings")
    if embeddings is None:
        raise HostError(f"vision tower {kind} is not known: {type(body).__name__} has no embeddings")
    if getattr(embeddings, "register_tokens", None) is not None:
        raise HostError(f"vision tower {kind} has register tokens, which no host drops: it is not supported")
    return int(any(getattr(embeddings, n, None) is not None for n in ("class_embedding", "cls_token")))


def _check_positions(kind: str, body: Any, children: dict[str, nn.Module], prefix: int, grid: tuple[int, int]) -> None:
    """Compare the learned positions with the tokens that were found: a token nobody counted shows here."""
    if "blocks" in children:
        return  # timm's own count was taken
    embeddings: Any = children["embeddings"]
    table = getattr(getattr(embeddings, "position_embedding", None), "weight", None)
    table = getattr(embeddings, "position_embeddings", None) if table is None else table
    if not isinstance(table, torch.Tensor) or zero.is_partitioned([table]):
        return
    positions, tokens = table.shape[-2], prefix + grid[0] * grid[1]
    if positions != tokens:
        raise HostError(
            f"vision tower {kind} is not known: it has positions for {positions} tokens, but {prefix} before a grid of "
            f"{grid[0]} x {grid[1]} patches make {tokens}"
        )


def _last_is_normed(vision: Any, after: Sequence[nn.Module]) -> bool:
    """Whether hidden_states[N] comes after the final norm.

    transformers' output recorder (`_can_record_outputs`) may put the model's last_hidden_state in the last place, which
    is normed on every class where it does; CLIP norms the pooled token alone.
    """
    recorder = getattr(type(vision), "_can_record_outputs", None) or {}
    records = "hidden_states" in recorder and compat.ties_last_state(vision)
    normed = getattr(vision, "last_state_is_normed", records)
    return bool(normed and after and any(True for _ in after[0].parameters()))


def _pair(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, (list, tuple)) else (value, value)
    return int(height), int(width)


def _timm_shape(vision: Any) -> Shape:
    body = vision.timm_model
    embed, kind = getattr(body, "patch_embed", None), type(body).__name__
    found: dict[str, Any] = {
        "blocks": _find_blocks(body)[1],
        "patch_embed.grid_size": getattr(embed, "grid_size", None),
        "patch_embed.patch_size": getattr(embed, "patch_size", None),
        "embed_dim": getattr(body, "embed_dim", None),
    }
    if missing := [name for name, value in found.items() if value is None]:
        raise HostError(f"timm model {kind} is not a known tower: it has no {', '.join(missing)}")
    blocks, grid, patch, channels = found.values()
    height, width = _pair(patch)
    if height != width:
        raise HostError(f"timm model {kind} has patches of {height} x {width}: only square ones are known")
    return Shape(len(blocks), int(channels), height, _pair(grid))


def _without_weights(config: Any) -> Any:
    """A timm tower on the meta device: its configuration holds only a name that timm alone can resolve."""
    return _on_meta(config.architecture, json.dumps(config.model_args, sort_keys=True))


@functools.lru_cache(maxsize=4)
def _on_meta(architecture: str, model_args: str) -> Any:
    from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

    config = TimmWrapperConfig(architecture=architecture, model_args=json.loads(model_args))
    try:
        with torch.device("meta"):
            return TimmWrapperModel(config)
    except ImportError as error:
        raise HostError(f"a timm tower (Perception Encoder) needs the timm package: {error}") from error
