"""Tiny vision towers of every known class, random, in memory or as folders, and llava models on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import models

BLOCKS, WIDTH, SIDE, PATCH = 8, 32, 56, 14
NAMES = ("clip", "siglip", "siglip2", "internvl", "aimv2", "timm")
ON_HF = ("clip", "siglip", "aimv2")
PREFIX = {"clip": 1, "siglip": 0, "siglip2": 0, "internvl": 1, "aimv2": 0, "timm": 1}
SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}


def config(name: str) -> Any:
    import transformers as t

    if name == "clip":
        return t.CLIPVisionConfig(**SIZES, image_size=SIDE, patch_size=PATCH)
    if name == "siglip":
        return t.SiglipVisionConfig(**SIZES, image_size=SIDE, patch_size=PATCH)
    if name == "siglip2":
        return t.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=PATCH)
    if name == "internvl":
        return t.InternVLVisionConfig(
            **SIZES, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH], use_mean_pooling=False,
            use_absolute_position_embeddings=True, use_mask_token=True,
        )  # fmt: skip
    if name == "aimv2":
        return t.Aimv2VisionConfig(**SIZES, image_size=SIDE, patch_size=PATCH)
    colours = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    return t.TimmWrapperConfig(
        architecture="vit_pe_stand_in", model_args={"embed_dim": WIDTH, "depth": BLOCKS}, pretrained_cfg=colours,
        label_names=["a", "b"],
    )  # fmt: skip


def scramble(model: nn.Module) -> nn.Module:
    """Weights of one seed, far from their tiny initial values, so that blocks differ from one another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if parameter.ndim == 1 and name.endswith("weight") else noise)
    return model


def stock(name: str) -> Any:
    """The class of transformers."""
    from transformers import AutoModel

    made = config(name)
    return scramble(AutoModel._model_mapping[type(made)](made)).eval()


def ours(name: str) -> Any:
    """What llava's tower holds."""
    from llava_patch.hosts.towers import models as tower_models

    made = config(name)
    return scramble((tower_models.model_class(made) if name != "clip" else type(stock("clip")))(made)).eval()


def blocks_of(vision: Any) -> nn.ModuleList:
    """The blocks, found without the code under test."""
    if hasattr(vision, "timm_model"):
        return vision.timm_model.blocks
    encoder = getattr(vision, "vision_model", vision).encoder
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def folder(root: Path, name: str) -> Path:
    """A tower's folder as the hub has it."""
    import transformers as t

    path = root / name
    if path.exists():
        return path
    stock(name).save_pretrained(path)
    square = {"height": SIDE, "width": SIDE}
    if name in ("clip", "aimv2"):
        t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(path)
    elif name == "siglip":
        t.SiglipImageProcessor(size=square).save_pretrained(path)
    elif name == "siglip2":
        t.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=16).save_pretrained(path)
    elif name == "internvl":
        t.GotOcr2ImageProcessor(size=square).save_pretrained(path)
    return path  # timm's has its colours in config.json


def llava_model(path: Path, select_layer: int = -2, loaded: bool = True) -> Any:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    torch.manual_seed(0)
    made = LlavaConfig(
        **models.TEXT, mm_vision_tower=str(path), mm_hidden_size=WIDTH, mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=select_layer, mm_vision_select_feature="patch", tune_mm_mlp_adapter=False,
    )  # fmt: skip
    model = LlavaLlamaForCausalLM(made)
    if loaded:
        model.get_vision_tower().load_model()
    return model.float().eval()


def hf_model(name: str, layer: int = -2, strategy: str | None = None) -> Any:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    made = LlavaConfig(
        vision_config=config(name), text_config=LlamaConfig(**models.TEXT), image_token_index=models.HF_IMAGE_TOKEN,
        image_seq_length=16, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy or ("default" if PREFIX[name] else "full"),
    )  # fmt: skip
    model = LlavaForConditionalGeneration(made).eval()
    scramble(model.model.vision_tower)
    return model


class _Attention(nn.Module):
    """As timm's attention with rope: one projection for all three, norms a head, rotary on the patches."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.scale, self.fused_attn = heads, (width // heads) ** -0.5, True
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (torch.cat([t[:, :, :1], _turned(t[:, :, 1:], rope)], 2) for t in (q, k))
        if self.fused_attn:
            x = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            self.seen = ((q * self.scale) @ k.mT).softmax(-1)
            x = self.seen @ v
        return self.proj(x.transpose(1, 2).flatten(2))


def _turned(x: Tensor, rope: Tensor) -> Tensor:
    sin, cos = rope.chunk(2, -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), _Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm(x), rope=rope)
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_size, self.grid_size = (PATCH, PATCH), (SIDE // PATCH, SIDE // PATCH)
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class StandIn(nn.Module):
    """A ViT made and called as timm's `Eva` is for Perception Encoder (timm 1.0): same names, same order of modules."""

    def __init__(self, embed_dim: int, depth: int, num_classes: int = 0) -> None:
        super().__init__()
        self.embed_dim, self.num_prefix_tokens = embed_dim, 1
        self.patch_embed = _PatchEmbed(embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, embed_dim))
        self.pos_drop, self.norm_pre = nn.Dropout(0.0), nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(_Block(embed_dim) for _ in range(depth))
        self.norm, self.fc_norm = nn.LayerNorm(embed_dim), nn.Identity()
        self.head_drop, self.head = nn.Dropout(0.0), nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = self.norm_pre(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)
        angles = torch.arange(16.0, device=x.device)[:, None] * 0.1 * torch.arange(1, 9).repeat_interleave(2)
        rope = torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)
        for block in self.blocks:
            x = block(x, rope=rope)
        return self.norm(x)

    def forward_intermediates(self, x: Tensor) -> Any:
        maps, hooks = [], []
        for block in self.blocks:
            hooks.append(
                block.register_forward_hook(lambda m, a, o: maps.append(o[:, 1:].mT.reshape(len(o), -1, 4, 4)))
            )
        last = self.forward_features(x)
        for hook in hooks:
            hook.remove()
        return last, maps

    def forward_head(self, x: Tensor) -> Tensor:
        return x[:, 1:].mean(1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        pass


def install_timm_stand_in(monkeypatch: Any) -> None:
    """TimmWrapperModel is transformers' own; what `timm.create_model` returns is the stand-in."""
    from transformers.models.timm_wrapper import modeling_timm_wrapper as wrapper

    from llava_patch.hosts.towers import layout as towers

    towers._on_meta.cache_clear()
    create = lambda architecture, pretrained, **kwargs: StandIn(**kwargs)  # noqa: E731
    monkeypatch.setattr(wrapper, "timm", SimpleNamespace(create_model=create, __version__="stand-in"), raising=False)
    monkeypatch.setattr(wrapper, "requires_backends", lambda *a: None)


@dataclass
class Case:
    """One tower on one host."""

    host: models.Host
    name: str

    @property
    def prefix(self) -> int:
        return PREFIX[self.name]
