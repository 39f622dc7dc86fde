"""Taking a patch off a checkpoint where the stock model can do the same by itself.

HF's LLaVA takes several vision layers: it concatenates them on channels in front of a projector that wide. A fusion on
channels is therefore a plain HF checkpoint. What adds nothing (zero columns, a split at the model's depth) is left out.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import CheckpointError
from llava_patch.fusion.base import Fusion
from llava_patch.hosts import configs
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.hosts.hf import whole_config
from llava_patch.patching.handle import Handle
from llava_patch.patching.patch import patch
from llava_patch.routing.schedule import make_schedule
from llava_patch.settings.methods import DeepStack, DenseConnector
from llava_patch.tools.convert.source import Checkpoint

logger = logging.getLogger("llava_patch")

_FIRST = "projector.0.weight"
_KEEP = "keep it patched: with llava_patch installed, the host's own from_pretrained loads it as it is"


def _no_plain_form(found: Checkpoint, what: str, further: str = "") -> CheckpointError:
    return CheckpointError(f"{found.name}: {what} does: it has no plain form; {_KEEP}{further}")


def columns(handle: Handle) -> list[tuple[int, ...]]:
    """The blocks of each group of a fused projector's columns, after the main one; a group's feature is their mean."""
    assert handle.taps is not None
    return [group.blocks for group in handle.taps.groups]


def spread(weight: Tensor, width: int, groups: Sequence[tuple[int, ...]]) -> Tensor:
    """A fused projector's weight with columns of their own for every block of every group.

    Args:
        weight: [out, (1 + groups) * width].
        width: channels of one feature.
        groups: the blocks of each group; W @ mean(h) = sum of (W / n) @ h.

    Returns:
        [out, (1 + blocks of all groups) * width]. W / n is rounded to the weight's precision unless n is a power of 2.
    """
    parts = [weight[:, :width]]
    for place, blocks in enumerate(groups, start=1):
        part = weight[:, place * width : (place + 1) * width]
        share = part if len(blocks) == 1 else (part.double() / len(blocks)).to(part.dtype)
        parts += [share] * len(blocks)
    return torch.cat(parts, dim=1)


def without_patch(found: Checkpoint, target: str) -> Checkpoint:
    """The same model as a stock checkpoint of its host."""
    methods = found.methods()
    routing, pruning, fusion = (methods.get(kind) for kind in ("routing", "pruning", "fusion"))
    depth = int(configs.files_of(found.host).text_config(found.config).num_hidden_layers)
    if routing is not None and make_schedule(routing, None, depth).does_something:
        raise _no_plain_form(found, f"{routing} sends image tokens around decoder layers, which no stock decoder")
    if pruning is not None and make_schedule(None, pruning, depth).does_something:
        what = f"{pruning} takes image tokens out of the decoder, which no stock decoder"
        further = " (it has no weights of its own: without it, merge the checkpoint that it was put on)"
        raise _no_plain_form(found, what, further)
    plain = replace(found, record=None)
    return plain if fusion is None else _without_fusion(plain, fusion, target)


def _without_fusion(found: Checkpoint, fusion: Fusion, target: str) -> Checkpoint:
    name = type(fusion).__name__
    if fusion.merge_size != 1:
        what = f"{name}.merge_size = {fusion.merge_size} joins neighbouring patches, which no stock projector"
        raise _no_plain_form(found, what)
    if isinstance(fusion, DenseConnector) and fusion.kind == "sti":
        raise _no_plain_form(found, 'DenseConnector.kind = "sti" appends visual tokens, which no stock model')
    if isinstance(fusion, DeepStack):
        if fusion.shares_projector:
            what = 'DeepStack.projector = "shared" adds features inside the decoder, which no stock decoder'
            raise _no_plain_form(found, what)
        stack = {k: load for k, load in found.tensors.items() if k.startswith("stack.")}
        last = max(int(k.split(".")[1]) for k in stack)
        if any(load().any() for k, load in stack.items() if k.startswith(f"stack.{last}.")):
            what = "its DeepStack has learnt, and adds features inside the decoder, which no stock decoder"
            raise _no_plain_form(found, what)
        return replace(found, tensors={k: load for k, load in found.tensors.items() if k not in stack})
    weight, width = found.tensors[_FIRST](), configs.files_of(found.host).feature_width(found.config)
    if not weight[:, width:].any():
        logger.warning("%s: the columns of %s are all zero: nothing of it is left in the merged one", found.name, name)
        return _with_projector(found, lambda: found.tensors[_FIRST]()[:, :width])
    if LLAVA in (found.host, target):
        raise CheckpointError(
            f"{found.name}: {fusion} has learnt, and llava's model takes one vision layer only: merge it with --to hf, "
            f"whose model takes several, or {_KEEP}"
        )
    groups = columns(on_meta(found, fusion))
    takes, makes = weight.shape[1], (1 + len(groups)) * width
    if takes != makes:
        raise CheckpointError(f"{found.name}: its projector takes {takes} channels, {fusion} makes {makes}")
    merged = _with_projector(found, lambda: spread(found.tensors[_FIRST](), width, groups))
    main = whole_config(found.config).vision_feature_layer
    # Blocks are counted as HF counts hidden states: 0 is the embedding. The main one stays as the config has it (-2).
    layers = [main, *(block for blocks in groups for block in blocks)]
    return replace(merged, config={**found.config, "vision_feature_layer": layers})


def _with_projector(found: Checkpoint, load: Any) -> Checkpoint:
    return replace(found, tensors={**found.tensors, _FIRST: load})


def on_meta(found: Checkpoint, fusion: Fusion) -> Handle:
    """The patched HF model without weights: the patch itself says which blocks it takes on this tower."""
    return patch(configs.skeleton(found.config, HF), fusion=fusion, loading=True)
