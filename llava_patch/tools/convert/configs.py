"""config.json of one host made from the other's, and what has no counterpart there."""

from __future__ import annotations

from typing import Any

from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import read_json
from llava_patch.hosts import compat
from llava_patch.hosts.anatomy import LLAVA
from llava_patch.hosts.hf import whole_config
from llava_patch.hosts.llava import is_own, text_config

ORIGINAL_KEY = "original_llava_config"
"""What llava's config says and HF's has no place for is kept there in HF's, so that the way back restores it."""
_FEATURES = {"patch": "default", "cls_patch": "full"}
_DERIVED = {"mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "mm_vision_select_feature"}
# What LLaVA-1.5's own release says, for a checkpoint that never was llava's.
_RELEASED = {
    "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "tune_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False, "use_mm_proj": True,
    "pad_token_id": 0,
}  # fmt: skip


def vision_config(source: str) -> Any:
    """A CLIP tower's configuration, from a tower folder or hub name."""
    from transformers import CLIPVisionConfig

    values = read_json(source, "config.json")
    if values is None:
        raise CheckpointError(f"vision tower {source}: no config.json there; name its folder with --vision-tower")
    if not str(values.get("model_type")).startswith("clip"):
        raise CheckpointError(
            f"vision tower {source} is a {values.get('model_type')!r}: conversion knows CLIP towers, which are what "
            "llava builds"
        )
    return CLIPVisionConfig(**values.get("vision_config") or values)


def check_convertible(config: dict[str, Any], host: str) -> None:
    """Refuse what the other host has no counterpart for."""
    if host == LLAVA:
        merge = config.get("mm_patch_merge_type") or "flat"
        if merge != "flat" or config.get("image_aspect_ratio") == "anyres":
            raise CheckpointError(
                f"mm_patch_merge_type = {merge!r}, image_aspect_ratio = {config.get('image_aspect_ratio')!r}: "
                "conversion knows one tile an image (LLaVA-1.5), not anyres"
            )
        if config.get("mm_projector_type", "linear") != "mlp2x_gelu":
            raise CheckpointError(
                f"mm_projector_type = {config.get('mm_projector_type', 'linear')!r}: HF's projector is mlp2x_gelu only"
            )
        if config.get("s2"):
            raise CheckpointError("s2 = True: HF has no multi-scale (S2) tower")
        if config.get("mm_vision_select_feature", "patch") not in _FEATURES:
            raise CheckpointError(f"mm_vision_select_feature = {config['mm_vision_select_feature']!r} is not known")
        return
    whole = whole_config(config)
    if whole.model_type != "llava":
        raise CheckpointError(
            f"model_type = {whole.model_type!r}: conversion knows one tile an image (LLaVA-1.5), not anyres"
        )
    if not isinstance(whole.vision_feature_layer, int):
        raise CheckpointError(
            f"vision_feature_layer = {whole.vision_feature_layer}: llava's projector takes one layer, so this merged "
            "checkpoint stays on HF; convert the patched one instead"
        )
    if whole.vision_config.model_type != "clip_vision_model":
        raise CheckpointError(
            f"its vision tower is a {whole.vision_config.model_type!r}: conversion knows CLIP towers, which are what "
            "llava builds"
        )
    if whole.text_config.model_type not in ("llama", "mistral"):
        raise CheckpointError(f"its language model is a {whole.text_config.model_type!r}: llava has llama and mistral")
    if whole.projector_hidden_act != "gelu" or not whole.multimodal_projector_bias:
        raise CheckpointError(
            f"projector_hidden_act = {whole.projector_hidden_act!r}, multimodal_projector_bias = "
            f"{whole.multimodal_projector_bias}: llava's mlp2x_gelu has gelu and biases"
        )


def to_hf(config: dict[str, Any], vision: Any, tokens: dict[str, int], added: list[str], vocab: int) -> dict[str, Any]:
    """The config.json of HF for a llava checkpoint."""
    text = text_config(config)
    original = {k: v for k, v in config.items() if is_own(k) and k not in _DERIVED}
    original |= {"vocab_size": text.vocab_size, "pad_token_id": text.pad_token_id, "added_tokens": added}
    text.vocab_size, text.pad_token_id = vocab, tokens["<pad>"]
    text.architectures = [f"{text.model_type.capitalize()}ForCausalLM"]
    stored = compat.stored_dtype(config)
    dtype = {"torch_dtype": stored} if stored else {}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "image_token_index": tokens["<image>"],
        "pad_token_id": tokens["<pad>"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(text.tie_word_embeddings),
        "text_config": plain(text) | dtype,
        "vision_config": {**plain(vision), "architectures": ["CLIPVisionModel"]},
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _FEATURES[config.get("mm_vision_select_feature", "patch")],
        **dtype,
        ORIGINAL_KEY: original,
    }


def to_llava(config: dict[str, Any], tower: str, vocab: int) -> dict[str, Any]:
    """The config.json of llava for an HF checkpoint."""
    whole = whole_config(config)
    kind, stored = whole.text_config.model_type, compat.stored_dtype(config)
    original = {k: v for k, v in config.get(ORIGINAL_KEY, {}).items() if k != "added_tokens"}
    return {
        **plain(whole.text_config),
        **({"torch_dtype": stored} if stored else {}),
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "model_type": f"llava_{kind}",
        "mm_projector_type": "mlp2x_gelu",
        **_RELEASED,
        **original,
        "vocab_size": vocab,
        "mm_hidden_size": whole.vision_config.hidden_size,
        "mm_vision_select_feature": {v: k for k, v in _FEATURES.items()}[whole.vision_feature_select_strategy],
        "mm_vision_select_layer": whole.vision_feature_layer,
        "mm_vision_tower": tower,
    }


def plain(config: Any) -> dict[str, Any]:
    """What a configuration object says beyond what every transformers configuration has by default, without dtype."""
    from transformers import PretrainedConfig

    default = PretrainedConfig().to_dict()
    dropped = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
    values = {k: v for k, v in config.to_dict().items() if k not in default or default[k] != v}
    return {k: v for k, v in values.items() if k not in dropped} | {"model_type": config.model_type}
