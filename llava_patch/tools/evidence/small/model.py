"""A LLaVA-1.5 of any size, of Hugging Face's own classes, with weights from a seed."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava_patch.hosts import anatomy


@dataclass(frozen=True)
class Vision:
    """The vision tower: a CLIP ViT.

    Attributes:
        image: side of the square image in pixels.
        patch: side of a patch; an image has (image // patch)² visual tokens.
        width: channels.
        layers: number N of blocks.
        heads: of each block.
        feature_layer: which hidden state the projector reads, as in LLaVA's configuration.
    """

    image: int = 112
    patch: int = 28
    width: int = 64
    layers: int = 4
    heads: int = 2
    feature_layer: int = -2

    @property
    def tokens(self) -> int:
        """Visual tokens of an image."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Text:
    """The decoder: a Llama.

    Attributes:
        vocabulary: number of token ids.
        width: hidden size.
        layers: number L of layers.
        heads: of each layer.
        wide: hidden size of the feed-forward network.
        positions: longest sequence.
    """

    vocabulary: int
    width: int = 64
    layers: int = 8
    heads: int = 2
    wide: int = 128
    positions: int = 512


def build(vision: Vision, text: Text, image_token: int, seed: int, pad_token: int = 0) -> Any:
    """A new `LlavaForConditionalGeneration` in float32 on the CPU, in eval mode.

    The initialisation is the one that lets such a model learn in hundreds of steps: word embeddings large enough to be
    told apart (std 0.5), linear layers of the decoder with std 1/√width, those that write into the residual stream
    divided by √(2L), projector with std 1/√fan-in, and a head that begins near the uniform distribution. The global
    generator of torch is left as it was.

    Args:
        vision: sizes of the tower.
        text: sizes of the decoder.
        image_token: id that marks an image in `input_ids`.
        seed: of all weights.
        pad_token: id of padding.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.width, intermediate_size=4 * vision.width, num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads, image_size=vision.image, patch_size=vision.patch,
            projection_dim=vision.width,
        ),
        text_config=LlamaConfig(
            vocab_size=text.vocabulary, hidden_size=text.width, intermediate_size=text.wide,
            num_hidden_layers=text.layers, num_attention_heads=text.heads, num_key_value_heads=text.heads,
            max_position_embeddings=text.positions, initializer_range=1 / math.sqrt(text.width),
            pad_token_id=pad_token,
        ),
        image_token_index=image_token, image_seq_length=vision.tokens, vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
        initialise(model)
    return model.eval()


@torch.no_grad()
def initialise(model: Any) -> None:
    """The parts of `build`'s initialisation that no configuration can ask for, from torch's global generator."""
    parts = anatomy.find(model)
    for module in parts.projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
    nn.init.normal_(parts.embed_tokens.weight, std=0.5)
    layers: Any = parts.layers
    for layer in layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.div_(math.sqrt(2 * len(parts.layers)))
    nn.init.normal_(parts.lm_head.weight, std=0.02)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights by name, each in storage of its own, as safetensors wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
