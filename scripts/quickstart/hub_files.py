"""Contents of the files of a LLaVA-1.5 release, in the spelling that the hub has.

Every `text` is keyword arguments of `LlamaConfig`, every `vision` of `CLIPVisionConfig`.
"""

import json
from pathlib import Path

import safetensors.torch
import torch

from .model import CLIP_MEAN, CLIP_STD, SELECT_LAYER

VOCAB_MULTIPLE = 64  # HF pads the embedding to this after adding "<image>" and "<pad>"

# The chat template of the HF checkpoints; a message's content may also be a plain string, as lmms-eval passes it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def json_bytes(content: dict) -> bytes:
    """Indented JSON, as configuration files have it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def vision_config(vision: dict) -> dict:
    """config.json of the vision tower."""
    fixed = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
    fixed |= {"layer_norm_eps": 1e-5, "num_channels": 3, "attention_dropout": 0.0, "torch_dtype": "float32"}
    return {**fixed, **vision}


def text_config(text: dict, vocab_size: int) -> dict:
    """config.json of the language model."""
    fixed = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "num_key_value_heads": text["num_attention_heads"],
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
    }
    return {**fixed, **text, "vocab_size": vocab_size}


def llava_config(text_config: dict, vision: dict, tower: Path) -> dict:
    """config.json of the finished model for the original package.

    Args:
        text_config: as from `text_config`.
        vision: of the tower.
        tower: absolute path of the tower's folder; the checkpoint holds none of its weights.
    """
    return {
        **text_config,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": SELECT_LAYER,
        "mm_vision_tower": str(tower),
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
    }


def hub_preprocessor(image_size: int) -> dict:
    """CLIP's preprocessor_config.json in the old spelling, with sizes as numbers."""
    return {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "size": image_size,
    }


def hf_files(half: dict[str, dict[str, torch.Tensor]], vision: dict, text_config: dict) -> dict[str, bytes]:
    """File name -> content of the HF checkpoint without its tokenizer, with the hub's weight names.

    Args:
        half: float16 weights as from `fileset.split_state`.
        vision: of the tower.
        text_config: as from `text_config`; "<image>" and "<pad>" take the two ids after its vocabulary.
    """
    image_id = text_config["vocab_size"]  # the two added tokens follow the base vocabulary
    pad_id = image_id + 1
    padded = -(-(pad_id + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    weights = {f"vision_tower.{k}": v for k, v in half["vision"].items()}
    for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
        for kind in ("weight", "bias"):
            weights[f"multi_modal_projector.{theirs}.{kind}"] = half["projector"][f"{ours}.{kind}"]
    for key, value in half["language"].items():
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            # The mean row: an added token is never likelier than every real one.
            mean = value.float().mean(0, keepdim=True).half()
            value = torch.cat([value, mean.expand(padded - len(value), -1)])
        weights[f"language_model.{key}"] = value.contiguous()
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": patches,
        "image_token_index": image_id,
        "multimodal_projector_bias": True,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "text_config": {**text_config, "vocab_size": padded, "pad_token_id": pad_id},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {**vision_config(vision), "torch_dtype": "float16"},
        "vision_feature_layer": SELECT_LAYER,
        "vision_feature_select_strategy": "default",
    }
    size = vision["image_size"]
    preprocessor = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": vision["patch_size"],
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad_id}
    return {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes(generation),
        "model.safetensors": safetensors.torch.save(weights, metadata={"format": "pt"}),
        "preprocessor_config.json": json_bytes(preprocessor),
        "processor_config.json": json_bytes(processor),
        "chat_template.json": json_bytes({"chat_template": CHAT_TEMPLATE}),
    }
