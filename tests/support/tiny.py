"""Tiny random models of both hosts, and samples that go straight into their forward; offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support import models

IMAGE_TOKEN = 63
PATCHES = 4


def vision_config() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )


def hf_model(layers: int = 5, attention: str = "sdpa") -> nn.Module:
    """Hugging Face host with grouped-query attention (4 heads, 2 key heads)."""
    models.needs_hf()
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision_config(), text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    return model


def hf_sample(seed: int = 0, before: int = 2, after: int = 5) -> dict[str, torch.Tensor]:
    """`before` text tokens, one image, `after` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 60, (before + after,), generator=generator)
    ids = torch.cat([text[:before], torch.full((PATCHES,), IMAGE_TOKEN), text[before:]])[None]
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def llava_model(folder: Path, layers: int = 5, attention: str = "sdpa") -> nn.Module:
    """Original host; its vision tower is read from `folder`, as the package does it."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionModel

    torch.manual_seed(0)
    tower = folder / "clip"
    CLIPVisionModel(vision_config()).save_pretrained(tower)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tower)
    config = LlavaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2, mm_vision_tower=str(tower),
        mm_hidden_size=16, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        tune_mm_mlp_adapter=False, attn_implementation=attention,
    )  # fmt: skip
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    return model.float().eval()


def llava_sample(seed: int = 0, before: int = 2, after: int = 5) -> dict[str, torch.Tensor]:
    """The same sample with llava's placeholder."""
    from llava.constants import IMAGE_TOKEN_INDEX

    sample = hf_sample(seed, before, after)
    ids = sample["input_ids"][0]
    text = ids[ids != IMAGE_TOKEN]
    ids = torch.cat([text[:before], torch.tensor([IMAGE_TOKEN_INDEX]), text[before:]])[None]
    return {"input_ids": ids, "images": sample["pixel_values"], "attention_mask": torch.ones_like(ids).bool()}
