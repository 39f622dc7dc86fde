"""Models with random weights for timing: speed does not depend on the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llava_patch.core.memory import default_dtype
from llava_patch.hosts.sizes import IMAGE_TOKENS, TOWERS, Shape


def build(
    shape: Shape, device: str, dtype: torch.dtype, attention: str = "sdpa", tower: Mapping[str, int] = TOWERS["none"]
) -> nn.Module:
    """A Hugging Face LLaVA of a shape, in eval mode."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**tower, image_size=336, patch_size=14)  # type: ignore[arg-type]
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=shape.vocabulary - 1,
        image_seq_length=IMAGE_TOKENS,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):
        return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def inputs(model: Any, text: int, batch: int, image_tokens: int = IMAGE_TOKENS) -> dict[str, Any]:
    """A batch of equal prompts: a beginning token, one image, text."""
    generator = torch.Generator().manual_seed(0)
    marker = int(model.config.image_token_id)
    words = torch.randint(3, marker, (batch, text), generator=generator)
    ids = torch.cat([words[:, :1], torch.full((batch, image_tokens), marker), words[:, 1:]], dim=1)
    pixels = torch.randn(batch, 3, 336, 336, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
