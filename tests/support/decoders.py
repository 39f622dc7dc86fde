"""Tiny hosts on every decoder that routing is proven on, and on some that it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava_patch.core.undo import UndoStack
from llava_patch.hosts import compat, llava_code
from tests.support import models
from tests.support.models import HF_IMAGE_TOKEN, TEXT, TOKENS, Host

GROUPED = {**TEXT, "num_key_value_heads": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 12}
PROVEN = {
    "llama": ("Llama", {**TEXT, "attention_bias": True, "mlp_bias": True}),
    "llama-rope": ("Llama", {**TEXT, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 12, "head_dim": 16}),
    "mistral-full": ("Mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-window": ("Qwen2", {**GROUPED, **WINDOW, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 32}),
}
"""Class and configuration; windows of less than one image."""

BOTH_HOSTS = [(host, name) for name in PROVEN for host in ("hf", "llava") if (host, name) != ("llava", "qwen3")]
ONE_TILE = list(BOTH_HOSTS)
BOTH_HOSTS += [(host, name) for name in ("llama", "mistral", "qwen2") for host in ("next", "onevision")]


def text_config(kind: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}Config")(**settings)


def hf_host(kind: str, **settings: Any) -> Host:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    models.needs_hf()
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=models.vision_config(), text_config=text_config(kind, **settings),
        image_token_index=HF_IMAGE_TOKEN, image_seq_length=TOKENS,
    )  # fmt: skip
    return Host("hf", _biased(LlavaForConditionalGeneration(config).eval()))


def llava_host(folder: Path, kind: str, **settings: Any) -> Host:
    models.llava_model(folder)  # writes the tower's folder
    torch.manual_seed(0)
    config_class, model_class = _llava_classes(kind)
    config = config_class(
        **settings, mm_vision_tower=str(folder / "clip"), mm_hidden_size=32, mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2, mm_vision_select_feature="patch", tune_mm_mlp_adapter=False,
    )  # fmt: skip
    model = model_class(config)
    model.get_vision_tower().load_model()
    return Host("llava", _biased(model.float().eval()))


def build(name: str, decoder: str, folder: Path) -> Host:
    """A host ("hf", "llava", or HF's "next" and "onevision") on one of PROVEN."""
    kind, settings = PROVEN[decoder]
    if settings.get("sliding_window") and not compat.makes_windows():
        pytest.skip("a sliding window is refused on this transformers")
    if name in ("next", "onevision"):
        made = models.anyres_host(name, text_config(kind, **settings))
        return models.AnyresHost("hf", _biased(made.model))
    return hf_host(kind, **settings) if name == "hf" else llava_host(folder, kind, **settings)


def _biased(model: nn.Module) -> nn.Module:
    """Biases start at zero, and norms of heads at one, where nobody would miss them."""
    generator = torch.Generator().manual_seed(3)
    decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
    for layer in decoder.layers:
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def silence(decoder: nn.Module) -> None:
    """As models.silence_side_branch, for layers with biases too."""
    for layer in decoder.side_branch:
        for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
            nn.init.zeros_(parameter)


def _llava_classes(kind: str) -> tuple[Any, Any]:
    if kind == "Qwen2":
        return _qwen_classes()
    from importlib import import_module

    module = import_module(f"llava.model.language_model.llava_{kind.lower()}")
    name = {"Llama": "Llava", "Mistral": "LlavaMistral"}[kind]
    return getattr(module, f"{name}Config"), getattr(module, f"Llava{kind}ForCausalLM")


def _qwen_classes() -> tuple[Any, Any]:
    """LLaVA-NeXT's LlavaQwen where its package is at hand; else a stand-in.

    It has its names and its `modalities`, and llava's own way with images; where a batch brings a video, it pools all
    patches by 2, and its tower has no `no_grad`.
    """
    try:
        from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
    except ImportError:
        return _qwen_stand_in()
    return LlavaQwenConfig, LlavaQwenForCausalLM


def _qwen_stand_in() -> tuple[Any, Any]:
    from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

    class LlavaQwenConfig(Qwen2Config):
        model_type = "llava_qwen"

    class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
        config_class = LlavaQwenConfig

    class Meta(LlavaMetaForCausalLM):
        def prepare_inputs_labels_for_multimodal(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities=("image",),
            image_sizes=None,
        ):  # fmt: skip
            undo = UndoStack()
            if "video" in modalities:
                undo.wrap(self, "encode_images", lambda encode, pixels: self.get_2dPool(encode(pixels)))
            with undo:
                return super().prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
                )

        def get_2dPool(self, features):
            return features.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)

    class LlavaQwenForCausalLM(Meta, Qwen2ForCausalLM):
        config_class = LlavaQwenConfig

        def __init__(self, config):
            super(Qwen2ForCausalLM, self).__init__(config)
            self.model = LlavaQwenModel(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def get_model(self):
            return self.model

        def forward(
            self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
            labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, images=None,
            image_sizes=None, return_dict=None, modalities=("image",), cache_position=None,
        ):  # fmt: skip
            if inputs_embeds is None:
                input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                    self.prepare_inputs_labels_for_multimodal(
                        input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities,
                        image_sizes,
                    )
                )  # fmt: skip
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
                output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            )  # fmt: skip

        @torch.no_grad()
        def generate(self, inputs=None, images=None, image_sizes=None, modalities=("image",), **kwargs):
            position_ids, mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
            embeds = None
            if images is not None:
                inputs, position_ids, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                    inputs, position_ids, mask, None, None, images, modalities, image_sizes=image_sizes
                )
            else:
                embeds = self.get_model().embed_tokens(inputs)
            return super().generate(position_ids=position_ids, attention_mask=mask, inputs_embeds=embeds, **kwargs)

    arch = "llava.model.llava_arch"
    prepare = Meta.prepare_inputs_labels_for_multimodal
    named(prepare, arch, "LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal")
    llava_code.fix_forward_arguments(LlavaQwenForCausalLM, UndoStack())
    named(LlavaQwenForCausalLM.forward, "llava.model.language_model.llava_qwen", "LlavaQwenForCausalLM.forward")
    return LlavaQwenConfig, LlavaQwenForCausalLM


def named(function: Any, module: str, name: str) -> Any:
    """Let a function pass for another version of a known class's."""
    function.__module__, function.__qualname__ = module, name
    return function
