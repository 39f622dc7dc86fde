"""The sizes of LLaVA-1.5's models, and of a small one with their depth."""

from dataclasses import dataclass

IMAGE_TOKENS = 576  # LLaVA-1.5: 336 pixels, patches of 14


@dataclass(frozen=True)
class Shape:
    """A decoder's size."""

    layers: int  # L
    hidden: int  # hidden size
    intermediate: int  # width of the feed-forward network
    heads: int  # attention heads (of 128 channels in LLaVA-1.5)
    vocabulary: int  # number of tokens
    split: int  # default split of the routed methods


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
