"""Which classes llava_patch was proven on: everything else is refused by name.

What counts is whose `forward` runs, not what a class is called: a subclass that overrides nothing passes (llava's own
`LlavaLlamaModel`), one that overrides `forward` does not, nor does a function that somebody put in its place. Wrappers
made with `functools.wraps` (accelerate's hooks, deprecations) carry the name of what they wrap, and the modules that
torch.compile, activation checkpointing and FSDP put around a layer are seen through.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from llava_patch.core.errors import HostError
from llava_patch.hosts import compat
from llava_patch.hosts.zero import bare

_HF = "transformers.models"
_LLAVA = "llava.model"

HOSTS = (
    f"{_HF}.llava.modeling_llava.LlavaForConditionalGeneration",
    f"{_HF}.llava.modeling_llava.LlavaModel",
    f"{_HF}.llava_next.modeling_llava_next.LlavaNextForConditionalGeneration",
    f"{_HF}.llava_next.modeling_llava_next.LlavaNextModel",
    f"{_HF}.llava_onevision.modeling_llava_onevision.LlavaOnevisionForConditionalGeneration",
    f"{_HF}.llava_onevision.modeling_llava_onevision.LlavaOnevisionModel",
    f"{_LLAVA}.language_model.llava_llama.LlavaLlamaForCausalLM",
    f"{_LLAVA}.language_model.llava_mistral.LlavaMistralForCausalLM",
    f"{_LLAVA}.language_model.llava_qwen.LlavaQwenForCausalLM",
    f"{_LLAVA}.llava_arch.LlavaMetaForCausalLM",
)
"""Models, and what turns their images into embeddings."""

NEXT_SIGLIP = "llava.model.multimodal_encoder.siglip_encoder.SigLipVisionTower"
WITHOUT_NO_GRAD = ("llava.model.multimodal_encoder.clip_encoder.CLIPVisionTower", NEXT_SIGLIP)
"""Vision towers of the llava package; those of LLaVA-NeXT's run with gradients."""

DECODERS = {
    "LlamaModel": f"{_HF}.llama.modeling_llama.Llama",
    "MistralModel": f"{_HF}.mistral.modeling_mistral.Mistral",
    "Qwen2Model": f"{_HF}.qwen2.modeling_qwen2.Qwen2",
    "Qwen3Model": f"{_HF}.qwen3.modeling_qwen3.Qwen3",
}
"""Decoders that the identity tests ran on; followed by "Model", "DecoderLayer" and "Attention"."""

_LOOKED_AT = {
    "GemmaModel": "it scales the embeddings",
    "Gemma2Model": "it scales the embeddings, has two kinds of masks and caps the attention scores",
    "Gemma3TextModel": "it has two kinds of masks and of rotary embeddings, and norms on queries and keys",
    "Phi3Model": "one projection makes its queries, keys and values (qkv_proj)",
    "Olmo2Model": "its norms stand behind attention and MLP, and it has norms on queries and keys",
}
_BY_BACKEND = ("SdpaAttention", "FlashAttention2")  # classes of up to 4.47
_VARYING_ROPE = ("dynamic", "longrope")


def name_of(module: nn.Module, method: str = "forward", by_class: bool = False) -> str:
    """The class whose method an object runs, "package.module.Class"; one set on it counts unless `by_class`."""
    own = None if by_class else vars(module).get(method)
    used: Any = getattr(type(module), method) if own is None else own
    where = getattr(used, "__module__", None) or type(used).__module__
    name = getattr(used, "__qualname__", None) or type(used).__qualname__
    return f"{where}.{name}".removesuffix(f".{method}")


def check_host(model: nn.Module, parts: Iterable[tuple[nn.Module, str]]) -> None:
    """Refuse a model that looks like a known one and is not, by what its classes define (HostError).

    `parts` are (module, name of its method) that make embeddings of images.
    """
    for module, method in parts:
        name = name_of(module, method, by_class=True)
        if not any(name == known or name.endswith(f".{known}") for known in HOSTS):
            raise HostError(
                f"{type(model).__name__} is not a model that llava_patch knows: it brings a {method} of its own "
                f"({name}.{method}), which may take videos or place its images otherwise. Known: "
                f"{', '.join(n.rsplit('.', 1)[1] for n in HOSTS if n.endswith(('Generation', 'CausalLM')))} of "
                "transformers and of the llava package, and subclasses that override none of it"
            )


def check_decoder(decoder: Any, what: str, by_class: bool = False) -> None:
    """Refuse a decoder whose layers the identity tests did not run on.

    `what` was asked for, for the message; `by_class`: what runs is a copy of the layers, made by their classes, so what
    their instances carry does not count. HostError names the class, or the entry of its config, and what is missing.
    """
    used = name_of(decoder, by_class=by_class)
    family = next((f for f in DECODERS.values() if used == f"{f}Model"), None)
    if family is None:
        _refuse(type(decoder), used, what)
    for number, layer in enumerate(decoder.layers):
        layer = bare(layer)
        for part, kind in ((layer, "DecoderLayer"), (bare(getattr(layer, "self_attn", layer)), "Attention")):
            used = name_of(part, by_class=by_class)
            if used not in (f"{family}{kind}", *(f"{family}{own}" for own in _BY_BACKEND if kind == "Attention")):
                _refuse(type(part), used, what, f"layer {number} of {type(decoder).__name__}: ")
    _check_config(decoder, what)


def _refuse(kind: type, used: str, what: str, where: str = "") -> None:
    name = used.rsplit(".", 1)[1]
    missing = _LOOKED_AT.get(name)
    why = f"{missing}, which is not built" if missing else "it was never proven there"
    whose = "" if used == f"{kind.__module__}.{kind.__qualname__}" else f" (its forward is {used}'s)"
    raise HostError(
        f"{where}{what} is not available on {kind.__name__}{whose}: {why}. Proven decoders: {', '.join(DECODERS)}. "
        "SkipLinks, DenseConnector and DirectFusion without routing leave the decoder alone and are available"
    )


def _check_config(decoder: Any, what: str) -> None:
    """Refuse what a proven class can be set to and routing would compute otherwise."""
    config, kind = decoder.config, type(decoder).__name__
    if config.num_hidden_layers != len(decoder.layers):
        raise HostError(
            f"config.num_hidden_layers = {config.num_hidden_layers}, but {kind} has {len(decoder.layers)} layers: "
            f"{what} would run them all, the stock model the first ones only"
        )
    window = compat.sliding_window(config)
    if window is not None and not compat.makes_windows():
        raise HostError(
            f"config.sliding_window = {window}, which {kind} of this transformers applies under some attention "
            f"backends only: {what} is available without one (config.sliding_window = None), or on transformers 4.57"
        )
    windows = {_window(bare(layer.self_attn)) for layer in decoder.layers}
    if windows != {window}:
        reads = "in some layers only" if window in windows else "in no layer"
        raise HostError(
            f"config.sliding_window = {window}, which {kind} applies {reads}: {what} is available where all layers "
            "have the same window" + ("" if window in windows else " (set config.sliding_window = None)")
        )
    rope = compat.rope_type(decoder)
    if rope in _VARYING_ROPE:
        raise HostError(
            f'config.rope_scaling of type "{rope}" changes the rotary embedding with the length of each call, and '
            f'{what} with what its cache holds: use a fixed one ("linear", "yarn", "llama3"), or none'
        )


def _window(attention: Any) -> int | None:
    """The sliding window that an attention module applies."""
    if name_of(attention, by_class=True).rpartition(".")[2].startswith("Llama"):
        return None  # whatever its config says
    return getattr(attention, "sliding_window", compat.sliding_window(attention.config))
