"""Tiny random models of both hosts and ragged batches for them; offline, in memory but for the tower folder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_patch.core.undo import UndoStack
from llava_patch.hosts import compat

LAYERS, BLOCKS, TOKENS, VOCAB = 6, 8, 16, 96
HF_IMAGE_TOKEN, HF_VIDEO_TOKEN = 95, 94
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
IMAGE, VIDEO = "image", "video"
FRAMES = 3


def vision_config() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=2, image_size=56,
        patch_size=14, initializer_range=0.2, initializer_factor=4.0,
    )  # fmt: skip


TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def hf_model(attention: str = "sdpa") -> nn.Module:
    needs_hf()
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision_config(), text_config=LlamaConfig(**TEXT), image_token_index=HF_IMAGE_TOKEN,
        image_seq_length=TOKENS,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    set_attention(model, attention)
    return model


def set_attention(model: Any, name: str) -> None:
    """Have a model's decoder run another attention backend; up to 4.47 its attention modules' classes say which."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)
        if model.config._attn_implementation == name:
            return  # to 4.55 it only warns where a class's own file, such as llava's, says nothing of attention
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "_attn_implementation"):
            part.config._attn_implementation = name
        if hasattr(part, "_use_sdpa"):
            part._use_sdpa = name == "sdpa"
        if hasattr(part, "layers") and hasattr(part, "_attn_implementation"):
            part._attn_implementation = name
        if hasattr(part, "q_proj") and hasattr(part, "o_proj"):
            compat.use_backend(part, name, UndoStack())


def needs_hf() -> None:
    """Skip a test of Hugging Face's classes where they are refused."""
    import transformers

    if not hasattr(transformers, "LlavaModel"):
        pytest.skip("Hugging Face's LLaVA places images inside its own forward up to 4.51, and is refused")


def needs_cpu(dtype: torch.dtype) -> None:
    """Skip a test in a precision in which this torch multiplies no matrices on the CPU."""
    if not multiplies(dtype):
        pytest.skip(f"this torch does not multiply {dtype} on the CPU")


def multiplies(dtype: torch.dtype) -> bool:
    try:
        torch.ones(2, 2, dtype=dtype) @ torch.ones(2, 2, dtype=dtype)
    except RuntimeError:
        return False
    return True


def hf_next_model() -> nn.Module:
    """Several tiles an image, with newline features between their rows."""
    needs_hf()
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=vision_config(), text_config=LlamaConfig(**TEXT), image_token_index=HF_IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config).eval()


def anyres_host(kind: str, text: Any) -> Host:
    """HF's LLaVA-NeXT ("next") or LLaVA-OneVision ("onevision") on a decoder's configuration."""
    import transformers as t

    torch.manual_seed(0)
    settings = {"text_config": text, "image_token_index": HF_IMAGE_TOKEN, "image_grid_pinpoints": PINPOINTS}
    if kind == "next":
        settings |= {"vision_config": vision_config()}
        return AnyresHost("hf", t.LlavaNextForConditionalGeneration(t.LlavaNextConfig(**settings)).eval())
    siglip = t.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=2, image_size=56,
        patch_size=14,
    )  # fmt: skip
    config = t.LlavaOnevisionConfig(
        **settings, vision_config=siglip, video_token_index=HF_VIDEO_TOKEN, vision_aspect_ratio="anyres_max_1"
    )
    model = t.LlavaOnevisionForConditionalGeneration(config).eval()
    for parameter in model.model.vision_tower.parameters():  # far from its tiny initial values
        torch.nn.init.normal_(parameter, std=0.2)
    return AnyresHost("hf", model)


def features_of(output: Any) -> Any:
    """The features among what HF's `get_image_features` gives: alone up to transformers 4."""
    return getattr(output, "pooler_output", output)


def llava_model(folder: Path, attention: str = "sdpa", **changes: Any) -> nn.Module:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionModel

    torch.manual_seed(0)
    tower = folder / "clip"
    if not tower.exists():
        CLIPVisionModel(vision_config()).save_pretrained(tower)
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(tower)
    settings = {
        **TEXT, "mm_vision_tower": str(tower), "mm_hidden_size": vision_config().hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "tune_mm_mlp_adapter": False,
        "attn_implementation": attention,
    }  # fmt: skip
    model = LlavaLlamaForCausalLM(LlavaConfig(**(settings | changes)))
    model.get_vision_tower().load_model()
    return model.float().eval()


@dataclass
class Batch:
    """One batch as model.forward takes it.

    `valid` [batch, tokens] and `image` [batch, tokens] are in the decoder's coordinates.
    """

    inputs: dict[str, Any]
    valid: Tensor
    image: Tensor


@dataclass
class Host:
    """A tiny model, how its batches look, and the tokens that an image becomes."""

    name: str
    model: nn.Module
    tokens: int = TOKENS

    def batch(
        self, samples: Sequence[Sequence[Any]], padding: str = "right", seed: int = 0, labels: bool = False
    ) -> Batch:
        """Make a batch.

        Args:
            samples: each a sequence of text lengths and IMAGE.
            padding: "left" or "right".
            seed: of tokens and pixels; sample i depends on seed + i only.
            labels: add labels on all text tokens.
        """
        rows, pixels, kinds = [], [], []
        for i, sample in enumerate(samples):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            ids: list[Tensor] = []
            kind: list[int] = []
            images = 0
            for part in sample:
                if part == IMAGE:
                    images += 1
                    pixels.append(torch.randn(3, 56, 56, generator=generator))
                    ids.append(
                        torch.full(
                            (self.tokens if self.name == "hf" else 1,), HF_IMAGE_TOKEN if self.name == "hf" else -200
                        )
                    )
                    kind += [1] * self.tokens
                else:
                    ids.append(torch.randint(3, 90, (part,), generator=generator))
                    kind += [0] * part
            if images == 0 and self.name == "llava":
                pixels.append(torch.zeros(3, 56, 56))
            rows.append(torch.cat(ids))
            kinds.append(torch.tensor(kind))
        longest = max(map(len, rows))
        input_ids = torch.stack([_pad(r, longest, 0, padding) for r in rows])
        attention = torch.stack([_pad(torch.ones(len(r), dtype=torch.long), longest, 0, padding) for r in rows])
        full = max(map(len, kinds))
        valid = torch.stack([_pad(torch.ones(len(k)), full, 0, padding) for k in kinds]).bool()
        image = torch.stack([_pad(k, full, 0, padding) for k in kinds]).bool()
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention}
        if self.name == "hf":
            if pixels:
                inputs["pixel_values"] = torch.stack(pixels)
        else:
            self.model.config.tokenizer_padding_side = padding
            inputs["images"] = torch.stack(pixels)
            forward = getattr(type(self.model), "forward", None)  # a stand-in for a model has none
            if forward is not None and "modalities" in inspect.signature(forward).parameters:
                inputs["modalities"] = ["image"] * len(pixels)
            elif hasattr(self.model, "get_2dPool"):  # LLaVA-NeXT's Mistral takes them for its modalities
                inputs["image_sizes"] = [(56, 56)] * len(pixels)
        if labels:
            drop = (attention == 0) | (input_ids == HF_IMAGE_TOKEN) | (input_ids == -200)
            inputs["labels"] = input_ids.masked_fill(drop, -100)
        return Batch(inputs, valid, image)

    def logits(self, batch: Batch, **kwargs: Any) -> Tensor:
        return self.model(**batch.inputs, **kwargs).logits

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_model() if self.name == "llava" else self.model.model.language_model


SIZES = [[56, 112], [112, 50], [100, 112]]
"""Heights and widths of images, in turn: of 3, 3 and 5 tiles."""


class AnyresHost(Host):
    """HF's hosts that cut images into tiles, which become tokens of different numbers; OneVision takes videos too."""

    @property
    def takes_videos(self) -> bool:
        return hasattr(self.model.model, "get_video_features")

    def batch(
        self, samples: Sequence[Sequence[Any]], padding: str = "right", seed: int = 0, labels: bool = False
    ) -> Batch:
        """See `Host.batch`; a sample may hold VIDEO, and OneVision takes several images in a sample whole."""
        made, images, videos, sizes, counts = [], [], [], [], []
        for i, sample in enumerate(samples):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            ids: list[Tensor] = []
            own = sum(part == IMAGE for part in sample)
            counts += [own] * bool(own)
            for part in sample:
                if part == IMAGE:
                    sizes.append(SIZES[len(sizes) % len(SIZES)])
                    tiles = 1 if self.takes_videos and own > 1 else 5 if sizes[-1] == SIZES[2] else 3
                    images.append(torch.randn(tiles, 3, 56, 56, generator=generator))
                    ids.append(torch.full((self._tokens(tiles, sizes[-1]),), HF_IMAGE_TOKEN))
                elif part == VIDEO:
                    videos.append(torch.randn(FRAMES, 3, 56, 56, generator=generator))
                    ids.append(torch.full((FRAMES * 4 + 1,), HF_VIDEO_TOKEN))
                else:
                    ids.append(torch.randint(3, 90, (part,), generator=generator))
            made.append(torch.cat(ids))
        longest = max(map(len, made))
        ids = torch.stack([_pad(row, longest, 0, padding) for row in made])
        mask = torch.stack([_pad(torch.ones(len(row), dtype=torch.long), longest, 0, padding) for row in made])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if images:
            most = max(map(len, images))
            fill = [torch.zeros(most - len(tiles), 3, 56, 56) for tiles in images]
            inputs["pixel_values"] = torch.stack([torch.cat(both) for both in zip(images, fill, strict=True)])
            inputs["image_sizes"] = torch.tensor(sizes)
            if self.takes_videos:
                inputs["batch_num_images"] = torch.tensor(counts)
        if videos:
            inputs["pixel_values_videos"] = torch.stack(videos)
        visual = (ids == HF_IMAGE_TOKEN) | ((ids == HF_VIDEO_TOKEN) if videos else False)
        if labels:
            inputs["labels"] = ids.masked_fill((mask == 0) | visual, -100)
        return Batch(inputs, mask.bool(), visual)

    def _tokens(self, tiles: int, size: list[int]) -> int:
        """How many tokens the host makes of an image."""
        inner = self.model.model
        given = {} if self.takes_videos else {"vision_feature_select_strategy": "default"}
        if self.takes_videos:
            given["vision_aspect_ratio"] = self.model.config.vision_aspect_ratio
        features = [torch.zeros(tiles, TOKENS, 4)]
        return len(
            inner.pack_image_features(features, torch.tensor([size]), image_newline=torch.zeros(4), **given)[0][0]
        )


def _pad(row: Tensor, length: int, value: int, side: str) -> Tensor:
    fill = torch.full((length - len(row),), value, dtype=row.dtype)
    return torch.cat([row, fill] if side == "right" else [fill, row])


def close(a: Tensor, b: Tensor) -> bool:
    """Within 1e-5 of the logits' scale: other kernel shapes reorder sums."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1.0))


def silence_side_branch(decoder: nn.Module) -> None:
    """Make the side branch pass its input on: each layer then adds zero to the residual stream."""
    for layer in decoder.side_branch:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
