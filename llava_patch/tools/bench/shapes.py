"""Models with random weights for timing: speed does not depend on the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

IMAGE_TOKENS = 576  # LLaVA-1.5: 336 pixels, patches of 14


@dataclass(frozen=True)
class Shape:
    """A decoder's size.

    Attributes:
        layers: L.
        hidden: hidden size.
        intermediate: width of the feed-forward network.
        heads: attention heads (of 128 channels in LLaVA-1.5).
        vocabulary: number of tokens.
        split: default split of the routed methods.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    split: int


SHAPES = {
    # LLaVA-1.5 7B's depth, head size and token counts at a fraction of its width, for a machine without a GPU.
    "small": Shape(32, 512, 1376, 4, 4096, 18),
    "7b": Shape(32, 4096, 11008, 32, 32064, 18),
    # The paper does not give 13B's splits; 24 is this project's choice, as in dpvr_lf_13b.gin.
    "13b": Shape(40, 5120, 13824, 40, 32064, 24),
}


TOWERS = {
    # Hardly counts: for methods that change the decoder alone.
    "none": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    # CLIP ViT-L's depth and token counts at a fraction of its width.
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 4},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}


def build(
    shape: Shape, device: str, dtype: torch.dtype, attention: str = "sdpa", tower: Mapping[str, int] = TOWERS["none"]
) -> nn.Module:
    """A Hugging Face LLaVA of a shape, in eval mode.

    Args:
        shape: the decoder's size.
        device: where to make it.
        dtype: of the weights.
        attention: attention backend.
        tower: the vision tower's size; by default one that hardly counts.
    """
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
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def inputs(model: Any, text: int, batch: int, image_tokens: int = IMAGE_TOKENS) -> dict[str, Any]:
    """A batch of equal prompts: a beginning token, one image, text.

    Args:
        model: from `build`.
        text: text tokens, the beginning token included.
        batch: number of samples.
        image_tokens: tokens that the image becomes.
    """
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
