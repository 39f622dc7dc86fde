"""Tensor names: one neutral spelling, and both hosts' own.

Neutral names: `decoder.<name in the LlamaModel>`, `head.weight`, `projector.<k>.<weight or bias>` (the k-th Linear,
from 0), `stack.<k>.<...>` (DeepStack's second projector), `tower.<name in the vision model>`, `image_newline`.
"""

from __future__ import annotations

import re

from llava_patch.hosts.anatomy import HF, LLAVA

# HF writes its files with the first spelling and has the second one in memory (where adapters take their names from).
_PARTS = {
    HF: (
        (r"(?:language_model\.model|model\.language_model)\.(.+)", "decoder."),
        (r"(?:language_model\.)?lm_head\.(weight)", "head."),
        (r"(?:model\.)?vision_tower\.(.+)", "tower."),
        (r"(?:model\.)?multi_modal_projector\.(.+)", "projector."),
        (r"(?:model\.)?multi_modal_projector_stack\.(.+)", "stack."),
        (r"(?:model\.)?(image_newline)", ""),
    ),
    LLAVA: (
        (r"model\.vision_tower\.vision_tower\.(.+)", "tower."),
        (r"model\.mm_projector\.(.+)", "projector."),
        (r"model\.mm_projector_stack\.(.+)", "stack."),
        (r"model\.(image_newline)", ""),
        (r"lm_head\.(weight)", "head."),
        (r"model\.((?:embed_tokens|layers|norm|side_branch)\..+)", "decoder."),
    ),
}
_WRITTEN = {
    HF: {
        "decoder": "language_model.model.", "head": "language_model.lm_head.", "tower": "vision_tower.",
        "projector": "multi_modal_projector.", "stack": "multi_modal_projector_stack.", "image_newline": "",
    },
    LLAVA: {
        "decoder": "model.", "head": "lm_head.", "tower": "model.vision_tower.vision_tower.",
        "projector": "model.mm_projector.", "stack": "model.mm_projector_stack.", "image_newline": "model.",
    },
}  # fmt: skip
# Old releases stored these; every version computes them itself.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def is_computed(name: str) -> bool:
    """Whether a stored tensor is a table that the model computes by itself (rotary frequencies, position ids)."""
    return _COMPUTED.search(name) is not None


def neutral(name: str, host: str) -> str | None:
    """A host's tensor name in the neutral spelling; None when it is not known."""
    for pattern, prefix in _PARTS[host]:
        found = re.fullmatch(pattern, name)
        if found is None:
            continue
        rest = found[1]
        if prefix not in ("projector.", "stack."):
            return prefix + rest
        linear = _linear(rest, host)
        return None if linear is None else prefix + linear
    return None


def _linear(rest: str, host: str) -> str | None:
    if host == HF:
        found = re.fullmatch(r"linear_([12])\.(weight|bias)", rest)
        return None if found is None else f"{int(found[1]) - 1}.{found[2]}"
    if rest in ("weight", "bias"):  # mm_projector_type = linear
        return f"0.{rest}"
    found = re.fullmatch(r"(\d*[02468])\.(weight|bias)", rest)  # activations have the odd places
    return None if found is None else f"{int(found[1]) // 2}.{found[2]}"


def written(name: str, host: str, single: bool = False) -> str:
    """A neutral name as a host's files have it.

    Args:
        name: the neutral name.
        host: "llava" or "hf".
        single: llava's projector is one Linear (mm_projector_type = linear).
    """
    part, _, rest = name.partition(".")
    if part in ("projector", "stack"):
        place, _, kind = rest.partition(".")
        in_llava = kind if single else f"{2 * int(place)}.{kind}"
        rest = f"linear_{int(place) + 1}.{kind}" if host == HF else in_llava
    return _WRITTEN[host][part] + (rest or part)
