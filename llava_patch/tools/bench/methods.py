"""What is compared, on which model, and what each row must equal."""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llava_patch.core.errors import SettingError
from llava_patch.core.memory import default_dtype
from llava_patch.hosts.sizes import IMAGE_TOKENS, TOWERS, Shape
from llava_patch.patching.handle import restore_flags
from llava_patch.patching.patch import patch
from llava_patch.settings.methods import FastV, PyramidDrop, Routing, SparseVLM


@dataclass(frozen=True)
class Partner:
    """What a method must equal, whatever the weights (docs/guarantees.md)."""

    name: str  # as the table says it
    left: dict[str, Any] | None  # settings that are compared; None: the stock model
    right: dict[str, Any] | None = None  # with what; None: the stock model
    silent: bool = False  # zero the side branch's output projections on the left, so that it passes image states on
    text_only: bool = False  # compare text positions only


@dataclass(frozen=True)
class Method:
    """One row."""

    name: str  # as the table says it
    settings: dict[str, Any]  # keyword arguments of `patch`; empty: the stock model
    partner: Partner
    lora_rank: int | None = None  # LoRA on every linear layer of the decoder instead

    def applied(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The model with this method; as it was afterwards."""
        return patched(model, self.settings) if self.lora_rank is None else _lora(model, self.lora_rank)


def patched(model: nn.Module, settings: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """The model under keyword arguments of `patch`, with its handle; without any the stock model, and None."""
    return patch(model, **settings) if settings else contextlib.nullcontext()


@contextlib.contextmanager
def _lora(model: Any, rank: int) -> Iterator[None]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SettingError("the LoRA rows need peft: pip install peft, or leave them out (--no-lora)") from error
    targets = r".*language_model\.layers\..*_proj"
    restore = restore_flags(model)
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    try:
        yield
    finally:
        wrapped.unload()
        restore()


def methods(n_layers: int, split: int, lora: bool = True) -> list[Method]:
    """The rows of the table for a model of some depth."""

    def routed(variant: str, at: int = split, **more: Any) -> dict[str, Any]:
        return {"routing": Routing(variant=variant, split=at, **more)}

    def pruned(ratio: float) -> dict[str, Any]:
        return {"pruning": FastV(layer=2, ratio=ratio)}

    def silent(layers: int, variant: str, **more: Any) -> Partner:
        name = f"silent side branch, split = L-{layers}, is stock"
        return Partner(name, routed(variant, n_layers - layers, **more), silent=True)

    rows = [
        Method("stock", {}, Partner("split = L is stock", routed("lf", n_layers))),
        Method("LF", routed("lf"), silent(1, "lf")),
        Method("LF, K = 2", routed("lf", fusion_layers=2), silent(2, "lf", fusion_layers=2)),
        Method("PC", routed("pc"), Partner("KV at text positions", routed("pc"), routed("kv"), text_only=True)),
        Method("KV", routed("kv"), silent(1, "kv")),
        Method("ideal", routed("ideal"), Partner("VTW at text positions", routed("ideal"), routed("vtw"), False, True)),
        Method("VTW", routed("vtw"), Partner("split = L is stock", routed("vtw", n_layers))),
    ]
    for ratio in (0.5, 0.75):
        rows.append(Method(f"FastV(2, {ratio})", pruned(ratio), Partner("r = 0 is stock", pruned(0))))
        off = Partner("r = 0 is LF", {**routed("lf"), **pruned(0)}, routed("lf"))
        rows.append(Method(f"LF + FastV(2, {ratio})", {**routed("lf"), **pruned(ratio)}, off))
    for staged in (PyramidDrop(), SparseVLM()):
        if n_layers > staged.layers[-1]:
            off = Partner("what keeps all is stock", {"pruning": replace(staged, keep=(1.0,) * len(staged.layers))})
            rows.append(Method(type(staged).__name__, {"pruning": staged}, off))
    for rank in (16, 64) if lora else ():
        rows.append(Method(f"LoRA, r = {rank}", {}, Partner("B = 0 is stock", None), lora_rank=rank))
    return rows


@torch.no_grad()
def partner_difference(model: Any, method: Method, inputs: dict[str, Any]) -> float:
    """Largest difference of a logit between a method and its identity partner."""
    partner = method.partner
    with patched(model, partner.left) if method.lora_rank is None else method.applied(model) as handle:
        for layer in handle.anatomy.decoder.side_branch if partner.silent else ():
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        left = model(**inputs, use_cache=False).logits
    with patched(model, partner.right):
        right = model(**inputs, use_cache=False).logits
    if partner.text_only:
        text = inputs["input_ids"] != model.config.image_token_id
        left, right = left[text], right[text]
    return float((left.float() - right.float()).abs().max())


def build(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    attention: str = "sdpa",
    tower: Mapping[str, int] = TOWERS["none"],
    side: int = 336,
) -> nn.Module:
    """A Hugging Face LLaVA of a shape, in eval mode, with random weights: speed does not depend on the values.

    `side` is that of its images in pixels.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**tower, image_size=side, patch_size=14)  # type: ignore[arg-type]
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
        image_seq_length=(side // 14) ** 2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):
        return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def make_inputs(model: Any, text: int, batch: int, image_tokens: int = IMAGE_TOKENS, side: int = 336) -> dict[str, Any]:
    """A batch of equal prompts: a beginning token, one image, text."""
    generator = torch.Generator().manual_seed(0)
    marker = int(model.config.image_token_id)
    words = torch.randint(3, marker, (batch, text), generator=generator)
    ids = torch.cat([words[:, :1], torch.full((batch, image_tokens), marker), words[:, 1:]], dim=1)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def decode(model: Any, inputs: dict[str, Any], cache: Any, tokens: int) -> None:
    """Decode some tokens behind a cache that holds `make_inputs`' prompt, and what was decoded behind it before."""
    token = torch.full_like(inputs["input_ids"][:, :1], 7)
    mask = torch.ones_like(token).expand(-1, cache.get_seq_length())
    for _ in range(tokens):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
