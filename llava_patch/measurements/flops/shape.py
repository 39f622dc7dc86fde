"""The sizes that matrix products have in a LLaVA model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from llava_patch.core.errors import HostError
from llava_patch.hosts.anatomy import HF, find
from llava_patch.hosts.towers import layout as towers

Linear = tuple[int, int]
"""(inputs, outputs) of one linear layer."""


@dataclass(frozen=True)
class DecoderShape:
    """A Llama-like decoder.

    Attributes:
        layers: L.
        hidden: channels of a position.
        intermediate: width of the gated feed-forward network.
        heads: attention heads.
        key_value_heads: heads of keys and values (fewer with grouped-query attention).
        head_dim: channels of a head.
        vocabulary: outputs of the head.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "DecoderShape":
        """Read a decoder's configuration (LlamaConfig and kin)."""
        heads = int(config.num_attention_heads)
        return cls(
            int(config.num_hidden_layers), int(config.hidden_size), int(config.intermediate_size), heads,
            int(getattr(config, "num_key_value_heads", None) or heads),
            int(getattr(config, "head_dim", None) or config.hidden_size // heads), int(config.vocab_size),
        )  # fmt: skip


@dataclass(frozen=True)
class TowerShape:
    """A vision tower on one image (tile).

    Attributes:
        blocks: how many run (all of them, whichever is read).
        tokens: of a block, CLS token included.
        linears: of one block.
        attention_width: heads times channels of a head.
        patches: that the patch embedding makes.
        patch_embedding: values of a patch, channels of a token.
        pooled: multiply-adds of what comes after the blocks (SigLIP's pooling head), whether it is read or not.
    """

    blocks: int
    tokens: int
    linears: tuple[Linear, ...]
    attention_width: int
    patches: int
    patch_embedding: Linear
    pooled: int = 0


@dataclass(frozen=True)
class ModelShape:
    """Everything that the closed form reads of a model.

    Attributes:
        name: as tables say it.
        host: "hf" or "llava".
        decoder: its decoder.
        tower: its vision tower.
        projector: linear layers from tower to decoder; () where the features go over as they are.
        projected: tokens that the projector takes of an image; those that the decoder gets.
        stacked: how many taps DeepStack sends through a projector like this one.
    """

    name: str
    host: str
    decoder: DecoderShape
    tower: TowerShape
    projector: tuple[Linear, ...]
    projected: int
    stacked: int = 0


def tower_shape(vision: nn.Module) -> TowerShape:
    """Read a vision model, whose weights may be on the meta device.

    Raises:
        HostError: a tower whose blocks, patch embedding or last part are not understood.
    """
    parts = towers.describe(vision)
    block = parts.blocks[0]
    linears = _linears(block)
    patches = parts.grid[0] * parts.grid[1]
    config: Any = getattr(vision, "config", None)
    width = towers.shape_of(config).width
    entry = _patch_embedding(parts.before, type(vision).__name__)
    tokens = parts.prefix_tokens + patches
    return TowerShape(len(parts.blocks), tokens, linears, width, patches, entry, _pooling(parts.after, tokens, width))


def _linears(module: nn.Module) -> tuple[Linear, ...]:
    return tuple((m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear))


def _patch_embedding(before: list[nn.Module], kind: str) -> Linear:
    for module in (m for part in before for m in part.modules()):
        if isinstance(module, nn.Conv2d):
            return module.in_channels * math.prod(module.kernel_size), module.out_channels
        if isinstance(module, nn.Linear):
            return module.in_features, module.out_features
    raise HostError(f"vision tower {kind}: no convolution or linear layer embeds its patches")


def _pooling(after: list[nn.Module], tokens: int, width: int) -> int:
    """Multiply-adds behind the blocks for one image: attention pooling with one query, linear layers on its answer."""
    total = 0
    for name, module in ((n, m) for part in after for n, m in part.named_modules()):
        last = name.rpartition(".")[2]
        if isinstance(module, nn.MultiheadAttention):  # SigLIP; its out_proj is a Linear and comes by itself
            total += (2 * tokens + 1) * width * width + 2 * tokens * width
        elif isinstance(module, nn.Linear):
            each = module.in_features * module.out_features
            total += each * (tokens if last in ("k_proj", "v_proj") else 1)  # AIMv2
            total += 2 * tokens * width if last == "k_proj" else 0
    return total


def shape_of(model: Any, name: str = "") -> ModelShape:
    """Read a host model in memory, stock or patched (also with its weights on the meta device).

    Args:
        model: as `patch` takes it.
        name: as tables say it; "": the model's class.

    Raises:
        HostError: a model or a tower that is not known, or one that is not loaded yet.
    """
    from llava_patch.fusion.base import Join
    from llava_patch.patching.handle import get_handle

    anatomy = find(model)
    anatomy.vision_parts()  # an error names what is not loaded
    handle = get_handle(anatomy.model)
    taps = None if handle is None else handle.taps
    rows, columns = anatomy.grid
    tower = tower_shape(anatomy.vision_model)
    projected = rows * columns + tower.tokens - tower.patches - anatomy.dropped_tokens
    if taps is not None and not taps.keeps_tokens:
        projected = taps.tokens((rows, columns))
    stacked = len(taps.groups) if taps is not None and taps.join is Join.LAYERS else 0
    return ModelShape(
        name or type(anatomy.model).__name__, anatomy.host, DecoderShape.of(anatomy.text_config), tower,
        _linears(anatomy.projector), projected, stacked,
    )  # fmt: skip


def named(name: str) -> ModelShape:
    """The sizes of LLaVA-1.5: "7b", "13b", or "small" (7B's depth and token counts at a fraction of its width).

    Raises:
        SettingError: another name.
    """
    from llava_patch.core.errors import SettingError
    from llava_patch.hosts.sizes import IMAGE_TOKENS, SHAPES, TOWERS

    if name not in SHAPES:
        raise SettingError(f"--shape {name}: expected one of {', '.join(SHAPES)}")
    size, vision = SHAPES[name], TOWERS["small" if name == "small" else "large"]
    width, wide = vision["hidden_size"], vision["intermediate_size"]
    decoder = DecoderShape(
        size.layers, size.hidden, size.intermediate, size.heads, size.heads, size.hidden // size.heads, size.vocabulary
    )
    tower = TowerShape(
        blocks=vision["num_hidden_layers"], tokens=1 + IMAGE_TOKENS,
        linears=((width, width),) * 4 + ((width, wide), (wide, width)), attention_width=width,
        patches=IMAGE_TOKENS, patch_embedding=(3 * 14 * 14, width),
    )  # fmt: skip
    projector = ((width, size.hidden), (size.hidden, size.hidden))
    return ModelShape(f"LLaVA-1.5 {name}", HF, decoder, tower, projector, IMAGE_TOKENS)
