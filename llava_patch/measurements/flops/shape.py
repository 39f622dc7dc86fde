"""The sizes that matrix products have in a LLaVA model: one in memory, a checkpoint's files, or LLaVA-1.5's own."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from llava_patch.core.errors import CheckpointError, HostError, SettingError
from llava_patch.core.weights import lacks_config
from llava_patch.fusion.base import Join, Taps, choose_taps
from llava_patch.hosts import configs
from llava_patch.hosts.anatomy import HF, LLAVA, find
from llava_patch.hosts.sizes import IMAGE_TOKENS, SHAPES, TOWERS
from llava_patch.hosts.towers import layout as towers
from llava_patch.hosts.towers import models as tower_models
from llava_patch.patching.handle import get_handle
from llava_patch.routing.pruning import Pruning
from llava_patch.settings.methods import Routing, from_record

Linear = tuple[int, int]
"""(inputs, outputs) of one linear layer."""


@dataclass(frozen=True)
class DecoderShape:
    """A Llama-like decoder."""

    layers: int  # L
    hidden: int  # channels of a position
    intermediate: int  # width of the gated feed-forward network
    heads: int  # of attention
    key_value_heads: int  # heads of keys and values (fewer with grouped-query attention)
    head_dim: int  # channels of a head
    vocabulary: int  # outputs of the head

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
    """A vision tower on one image (tile)."""

    blocks: int  # how many run (all of them, whichever is read)
    tokens: int  # of a block, CLS token included
    linears: tuple[Linear, ...]  # of one block
    attention_width: int  # heads times channels of a head
    patches: int  # that the patch embedding makes
    patch_embedding: Linear  # values of a patch, channels of a token
    pooled: int = 0  # multiply-adds of what comes after the blocks (SigLIP's pooling head), whether it is read or not


@dataclass(frozen=True)
class ModelShape:
    """Everything that the closed form reads of a model."""

    name: str  # as tables say it
    host: str  # "hf" or "llava"
    decoder: DecoderShape
    tower: TowerShape
    projector: tuple[Linear, ...]  # linear layers from tower to decoder; () where the features go over as they are
    projected: int  # tokens that the projector takes of an image; those that the decoder gets
    stacked: int = 0  # how many taps DeepStack sends through a projector like this one


def tower_shape(vision: nn.Module) -> TowerShape:
    """Read a vision model, whose weights may be on the meta device; HostError for one that is not understood."""
    parts = towers.describe(vision)
    patches = parts.grid[0] * parts.grid[1]
    config: Any = getattr(vision, "config", None)
    width = towers.shape_of(config).width
    inside = (module for part in parts.before for module in part.modules())
    embedding = next((module for module in inside if isinstance(module, (nn.Conv2d, nn.Linear))), None)
    if embedding is None:
        raise HostError(f"vision tower {type(vision).__name__}: no convolution or linear layer embeds its patches")
    if isinstance(embedding, nn.Conv2d):
        entry = embedding.in_channels * math.prod(embedding.kernel_size), embedding.out_channels
    else:
        entry = embedding.in_features, embedding.out_features
    tokens, linears = parts.prefix_tokens + patches, _linears(parts.blocks[0])
    return TowerShape(len(parts.blocks), tokens, linears, width, patches, entry, _pooling(parts.after, tokens, width))


def _linears(module: nn.Module) -> tuple[Linear, ...]:
    return tuple((m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear))


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


def _under(taps: Taps | None, grid: tuple[int, int], projected: int) -> tuple[int, int]:
    """(tokens that the projector takes of an image, taps that DeepStack stacks) under a fusion or none."""
    if taps is None:
        return projected, 0
    stacked = len(taps.groups) if taps.join is Join.LAYERS else 0
    return (projected if taps.keeps_tokens else taps.tokens(grid)), stacked


def shape_of(model: Any, name: str = "") -> ModelShape:
    """Read a host model in memory, stock or patched (also with its weights on the meta device).

    Args:
        model: as `patch` takes it.
        name: as tables say it; "": the model's class.

    Raises:
        HostError: a model or a tower that is not known, or one that is not loaded yet.
    """
    anatomy = find(model)
    anatomy.check_one_scale("flops")
    anatomy.vision_parts()  # an error names what is not loaded
    handle = get_handle(anatomy.model)
    rows, columns = anatomy.grid
    tower = tower_shape(anatomy.vision_model)
    projected = rows * columns + tower.tokens - tower.patches - anatomy.dropped_tokens
    return ModelShape(
        name or type(anatomy.model).__name__, anatomy.host, DecoderShape.of(anatomy.text_config), tower,
        _linears(anatomy.projector), *_under(None if handle is None else handle.taps, (rows, columns), projected),
    )  # fmt: skip


def named(name: str) -> ModelShape:
    """The sizes of LLaVA-1.5: "7b", "13b", or "small" (7B's depth and token counts at a fraction of its width)."""
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


def read_shape(checkpoint: str) -> tuple[ModelShape, Routing | None, Pruning | None]:
    """A checkpoint's sizes, and the routing and pruning that it carries.

    Args:
        checkpoint: folder or hub name: a full checkpoint of either host, stock or patched, or an adapter whose base is
            there. Only its JSON files are read, and those of its vision tower.

    Raises:
        CheckpointError: no checkpoint there, or its base or tower is gone.
        HostError: a model or tower that is not known.
    """
    below = files = configs.look(checkpoint)
    if files.base is not None:
        below = configs.look(files.base)
    if not below.host:
        raise lacks_config(below.source, "" if files.base is None else f"{checkpoint}: its base {below.source}")
    methods = from_record(files.record, checkpoint) if files.record else {}
    text, vision, select, drops, projector = (_llava if below.host == LLAVA else _hf)(below.source, below.config)
    shape = towers.shape_of(vision)
    tower = tower_shape(_on_meta(vision, below.host))
    taps = None
    if methods.get("fusion") is not None:
        taps = choose_taps(methods["fusion"], shape.n_blocks, select if select >= 0 else shape.n_blocks + 1 + select)
        if not projector:
            raise HostError("the projector has no linear layer that a fusion could have widened")
        (inputs, outputs), *others = projector
        projector = ((inputs * taps.columns * taps.merge_size**2, outputs), *others)
    dropped = 0 if not drops else 1 if below.host == HF else tower.tokens - tower.patches
    found = ModelShape(
        Path(checkpoint).name, below.host, DecoderShape.of(text), tower, projector,
        *_under(taps, shape.grid, tower.tokens - dropped),
    )  # fmt: skip
    return found, methods.get("routing"), methods.get("pruning")


def _on_meta(vision: Any, host: str) -> Any:
    """A vision tower without weights."""
    from transformers import AutoModel, CLIPVisionModel

    with torch.device("meta"):
        if vision.model_type in tower_models.CLIP:
            return CLIPVisionModel(vision)
        if host == LLAVA:
            return tower_models.model_class(vision)(vision)
        return AutoModel.from_config(vision)


def _llava(base: str, raw: dict[str, Any]) -> tuple[Any, Any, int, bool, tuple[Linear, ...]]:
    """(decoder's and tower's configurations, selected layer, whether the front is dropped, projector)."""
    vision = configs.tower_config(raw, base)
    width, hidden = int(raw["mm_hidden_size"]), int(raw["hidden_size"])
    kind = str(raw.get("mm_projector_type", "linear"))
    digits = "1" if kind in ("identity", "linear") else kind.removeprefix("mlp").removesuffix("x_gelu")
    if not digits.isdigit():
        raise HostError(f"{base}: mm_projector_type = {kind!r} is not known: expected linear, mlpNx_gelu or identity")
    projector = () if kind == "identity" else ((width, hidden), *((hidden, hidden),) * (int(digits) - 1))
    patches_only = raw.get("mm_vision_select_feature", "patch") == "patch"
    return SimpleNamespace(**raw), vision, int(raw["mm_vision_select_layer"]), patches_only, projector


def _hf(base: str, raw: dict[str, Any]) -> tuple[Any, Any, int, bool, tuple[Linear, ...]]:
    """The same of Hugging Face's LLaVA."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base}: its configuration cannot be read: {error}") from error
    layer = config.vision_feature_layer
    width = towers.shape_of(config.vision_config).width * (1 if isinstance(layer, int) else len(layer))
    hidden = int(config.text_config.hidden_size)
    drops = config.vision_feature_select_strategy == "default"
    main = layer if isinstance(layer, int) else layer[-1]
    return config.text_config, config.vision_config, main, drops, ((width, hidden), (hidden, hidden))
