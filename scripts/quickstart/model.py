"""The small LLaVA-1.5 as one torch module, for training; `fileset` writes its weights in either host's format."""

import math

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from .prompts import IMAGE_TOKEN_INDEX

# The 2 M-parameter shape that learns to read within minutes.
SMALL_VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 64,
}
SMALL_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 336,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SELECT_LAYER = -2  # the hidden state that LLaVA-1.5 takes from the tower


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """What CLIP's image processor makes of images that already have the tower's size.

    Args:
        pixels: uint8 [batch, height, width, 3].

    Returns:
        float32 [batch, 3, height, width].
    """
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


class SmallLlava(nn.Module):
    """CLIP tower, mlp2x_gelu projector and Llama, with the wiring of LLaVA-1.5.

    Args:
        vision: keyword arguments of `CLIPVisionConfig`.
        text: keyword arguments of `LlamaConfig`, without `vocab_size`.
        vocab_size: number of tokens.
        seed: of the random initial weights.
    """

    def __init__(self, vision: dict, text: dict, vocab_size: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tower = CLIPVisionModel(CLIPVisionConfig(**vision))
            # About 1/sqrt(width), where Llama's 0.02 fits a width of thousands.
            spread = 1 / math.sqrt(text["hidden_size"])
            config = LlamaConfig(**{"initializer_range": spread, **text}, vocab_size=vocab_size, pad_token_id=0)
            self.language = LlamaForCausalLM(config)
            width_in, width = vision["hidden_size"], text["hidden_size"]
            self.projector = nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))
            with torch.no_grad():
                for linear in (self.projector[0], self.projector[2]):
                    linear.weight.normal_(0, 1 / math.sqrt(linear.in_features))
                    linear.bias.zero_()
                # Of the size of the projector's output, so that text and image tokens start on a par.
                self.language.model.embed_tokens.weight.normal_(0, 0.5)
                # Residual branches as in GPT-2: without this the loss rests on a plateau for hundreds of steps.
                for layer in self.language.model.layers:
                    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                        linear.weight.div_(math.sqrt(2 * text["num_hidden_layers"]))
                # From small logits, or the first steps only unlearn the random ones.
                self.language.lm_head.weight.normal_(0, 0.02)
        self.num_patches = (vision["image_size"] // vision["patch_size"]) ** 2

    def patch_features(self, images: torch.Tensor) -> torch.Tensor:
        """The tower's selected hidden state without the class token.

        Args:
            images: float [batch, 3, height, width], normalised.

        Returns:
            float [batch, num_patches, vision hidden size].
        """
        return self.tower(images, output_hidden_states=True).hidden_states[SELECT_LAYER][:, 1:]

    def embed(self, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Input embeddings with every image's projected features in place of its placeholders.

        Args:
            ids: int64 [batch, tokens]; an image takes `num_patches` entries of `IMAGE_TOKEN_INDEX`.
            images: float [number of images, 3, height, width], in the order of their placeholders.

        Returns:
            float [batch, tokens, text hidden size].
        """
        is_image = ids == IMAGE_TOKEN_INDEX
        embeddings = self.language.model.embed_tokens(ids.clamp(min=0))
        if not len(images):
            return embeddings
        features = self.projector(self.patch_features(images)).to(embeddings.dtype)
        return embeddings.masked_scatter(is_image[..., None], features)

    def loss(self, ids: torch.Tensor, images: torch.Tensor, answer_mask: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the tokens under `answer_mask`, each predicted from the ones before it.

        Args:
            ids: int64 [batch, tokens], padded on the right.
            images: see `embed`.
            answer_mask: bool [batch, tokens].
        """
        hidden = self.language.model(inputs_embeds=self.embed(ids, images), use_cache=False).last_hidden_state
        # The head is applied to the answers only: most positions are prompt or image.
        logits = self.language.lm_head(hidden[:, :-1][answer_mask[:, 1:]])
        return nn.functional.cross_entropy(logits, ids[:, 1:][answer_mask[:, 1:]])

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, images: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Greedy answers to prompts of one length.

        Args:
            ids: int64 [batch, tokens], as for `embed`, without padding.
            images: see `embed`.
            max_new_tokens: how many tokens to add; the caller cuts at EOS.

        Returns:
            int64 [batch, max_new_tokens].
        """
        out = self.language.model(inputs_embeds=self.embed(ids, images), use_cache=True)
        tokens = []
        for _ in range(max_new_tokens):
            tokens.append(self.language.lm_head(out.last_hidden_state[:, -1]).argmax(-1))
            out = self.language.model(
                input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True
            )
        return torch.stack(tokens, dim=1)
