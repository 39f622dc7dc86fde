"""Whether a checkpoint holds what its configuration and settings call for, and nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import Tensors
from llava_patch.hosts import configs
from llava_patch.hosts import tensor_names as names
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.settings.methods import DeepStack

if TYPE_CHECKING:
    from llava_patch.tools.convert.source import Checkpoint


def check_complete(found: "Checkpoint", source: str, tower: str) -> None:
    """Compare names and shapes with what the configuration and the settings call for.

    Args:
        found: the checkpoint.
        source: what messages call it.
        tower: where llava's vision tower is.

    Raises:
        CheckpointError: names the tensor that is missing, left over or of another shape.
    """
    from transformers import AutoModelForCausalLM

    text = configs.text_config(found.config, found.host)
    with torch.device("meta"):
        language = _stored(AutoModelForCausalLM.from_config(text))
    expected = {_language(name): shape for name, shape in language.items()}
    if text.tie_word_embeddings and "head.weight" not in found.tensors:
        del expected["head.weight"]
    shapes = shapes_of(found.tensors)
    routing = found.methods().get("routing")
    side = 0 if routing is None or routing.split == text.num_hidden_layers else routing.side_layers
    for name in [n for n in expected if n.startswith("decoder.layers.0.")]:
        rest = name.removeprefix("decoder.layers.0.")
        expected |= {f"decoder.side_branch.{i}.{rest}": expected[name] for i in range(side)}
    kept = {k: v for k, v in shapes.items() if k.startswith(("decoder.", "head."))}
    compare(kept, expected, source)
    if found.host == HF or found.reads_own_tower():
        vision = configs.hf_config(found.config).vision_config if found.host == HF else configs.vision_config(tower)
        blocks = {f"tower.{k}": v for k, v in expected_tower(vision).items()}
        compare({k: v for k, v in shapes.items() if k.startswith("tower.")}, blocks, source)
    _check_projectors(found, shapes, int(text.hidden_size), source)


def _check_projectors(found: "Checkpoint", shapes: dict[str, torch.Size], hidden: int, source: str) -> None:
    """The projector, DeepStack's second one, and the new line of anyres: each there if and only if it is called for."""
    width, fusion = configs.feature_width(found.config, found.host), found.methods().get("fusion")
    linears, biased, layers = 2, True, 1
    if found.host == LLAVA:
        depth = re.fullmatch(r"mlp(\d+)x_gelu", found.config.get("mm_projector_type", "linear"))
        linears, anyres = int(depth[1]) if depth else 1, "unpad" in (found.config.get("mm_patch_merge_type") or "")
    else:
        biased, anyres = found.config.get("multimodal_projector_bias", True), found.config["model_type"] == "llava_next"
        select = found.config.get("vision_feature_layer", -2)
        layers = len(select) if isinstance(select, list) else 1
    expected = {}
    for part in ["projector", *(["stack"] if isinstance(fusion, DeepStack) else [])]:
        for i in range(linears):
            expected[f"{part}.{i}.weight"] = torch.Size([hidden, hidden if i else layers * width])
            if biased:
                expected[f"{part}.{i}.bias"] = torch.Size([hidden])
        first = shapes.get(f"{part}.0.weight")
        if fusion is not None and first is not None and len(first) == 2 and first[1] and first[1] % width == 0:
            expected[f"{part}.0.weight"] = torch.Size([hidden, first[1]])  # how wide is the fusion's business
    if anyres:
        expected["image_newline"] = torch.Size([hidden])
    compare({k: v for k, v in shapes.items() if not k.startswith(("decoder.", "head.", "tower."))}, expected, source)


def expected_tower(vision: Any) -> dict[str, torch.Size]:
    """Names and shapes of a vision model's tensors."""
    from transformers import AutoModel

    with torch.device("meta"):
        return _stored(AutoModel.from_config(vision))


def _stored(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items() if not names.is_computed(name)}


def shapes_of(tensors: Tensors) -> dict[str, torch.Size]:
    """The shape of every tensor."""
    return {name: load().shape for name, load in tensors.items()}


def compare(found: dict[str, torch.Size], expected: dict[str, torch.Size], source: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: names the tensor that is missing, left over or of another shape.
    """
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise CheckpointError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if unknown:
        raise CheckpointError(f"{source}: tensor {unknown[0]} has no place in this model ({len(unknown)} in all)")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{source}: {name} has shape {tuple(found[name])}, expected {tuple(shape)}")


def _language(name: str) -> str:
    return "head.weight" if name == "lm_head.weight" else "decoder." + name.removeprefix("model.")
