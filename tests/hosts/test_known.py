"""Classes that nothing was proven on are refused by name, and what overrides nothing is not."""

import functools
import types

import pytest
import torch
import transformers
from torch import nn

from llava_patch import AuxiliaryProbe, DeepStack, DenseConnector, DirectFusion, FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import HostError
from llava_patch.hosts import anatomy, known
from llava_patch.patching.handle import get_handle
from tests.support import decoders
from tests.support.decoders import GROUPED, WINDOW, hf_host
from tests.support.models import HF_IMAGE_TOKEN, IMAGE, TEXT, close

UNPROVEN = {
    "Gemma": ("GemmaModel: it scales the embeddings", {"head_dim": 16}),
    "Gemma2": ("Gemma2Model: it scales the embeddings, has two kinds of masks", {"head_dim": 16}),
    "Gemma3Text": ("Gemma3TextModel: it has two kinds of masks", {"head_dim": 16}),
    "Phi3": (r"Phi3Model: one projection makes its queries, keys and values \(qkv_proj\)", {}),
    "Olmo2": ("Olmo2Model: its norms stand behind attention and MLP", {}),
    "Olmo": ("OlmoModel: it was never proven there. Proven decoders: LlamaModel, MistralModel, Qwen2Model", {}),
    "GPTNeoX": ("GPTNeoXModel: it was never proven there", {}),
}
DECODER_WORK = {
    "Routing": {"routing": Routing(split=2)},
    "FastV": {"pruning": FastV(layer=2, ratio=0.5)},
    "DeepStack": {"fusion": DeepStack(start=1, interval=1)},
    "AuxiliaryProbe": {"probe": AuxiliaryProbe(weight=0.1)},
    "Routing and FastV": {"routing": Routing(split=3), "pruning": FastV(layer=2, ratio=0.5)},
}
CHANNELS = {
    "skip": SkipLinks(stride=2),
    "dci": DenseConnector(),
    "direct": DirectFusion(layers=(3, 6)),
}


@pytest.mark.parametrize("what", DECODER_WORK)
@pytest.mark.parametrize("kind", UNPROVEN)
def test_a_decoder_that_nothing_was_proven_on_is_refused_by_name(kind, what):
    message, settings = UNPROVEN[kind]
    host = hf_host(kind, **TEXT, **settings)
    before = dict(vars(host.model)), dict(vars(host.decoder))
    with pytest.raises(HostError, match=f"{what} is not available on {message}"):
        patch(host.model, **DECODER_WORK[what])
    assert (dict(vars(host.model)), dict(vars(host.decoder))) == before


@torch.no_grad()
@pytest.mark.parametrize("fusion", CHANNELS)
@pytest.mark.parametrize("kind", ["Gemma", "Gemma2", "Phi3", "Olmo2"])
def test_a_fusion_on_channels_leaves_every_decoder_alone(kind, fusion):
    """Exactly the stock model before training; afterwards what the decoder makes of the fused features."""
    host = hf_host(kind, **TEXT, **UNPROVEN[kind][1])
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)], "left")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [HF_IMAGE_TOKEN]}
    stock, answer = host.logits(batch), host.model.generate(**batch.inputs, **options)
    with patch(host.model, fusion=CHANNELS[fusion]) as handle:
        assert torch.equal(host.logits(batch), stock)
        assert torch.equal(host.model.generate(**batch.inputs, **options), answer)
        for parameter in handle.adapter_parameters():
            nn.init.normal_(parameter, std=0.2)
        trained = host.logits(batch)
        features = handle.anatomy.encode_images(batch.inputs["pixel_values"])
    embeds = host.model.get_input_embeddings()(batch.inputs["input_ids"])
    embeds[batch.image] = features.flatten(0, 1)
    by_hand = host.model(inputs_embeds=embeds, attention_mask=batch.inputs["attention_mask"]).logits
    assert torch.equal(trained, by_hand) and not close(trained, stock)


def test_every_decoder_of_the_list_is_one_that_the_identity_tests_run_on():
    assert {f"{kind}Model" for kind, _ in decoders.PROVEN.values()} == set(known.DECODERS)


ROPE = {"rope_type": "dynamic", "factor": 2.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
CONFIGURED = {
    "unread-window": ("Llama", {"sliding_window": 12}, r"LlamaModel applies in no layer.*config.sliding_window = None"),
    "mixed": ("Qwen2", {**WINDOW, "max_window_layers": 3}, "sliding_window = 12, which Qwen2Model applies in some"),
    "named": (
        "Qwen2",
        {**WINDOW, "layer_types": ["full_attention", "sliding_attention"] * 3},
        "sliding_window = 12, which Qwen2Model applies in some layers only",
    ),
    "none": ("Qwen2", {**WINDOW, "max_window_layers": 99}, "which Qwen2Model applies in no layer"),
    "dynamic": ("Llama", {"rope_scaling": ROPE}, 'rope_scaling of type "dynamic" changes the rotary embedding'),
    "longrope": ("Qwen2", {"rope_scaling": LONG}, 'rope_scaling of type "longrope"'),
}


@pytest.mark.parametrize("case", CONFIGURED)
def test_what_a_proven_decoder_can_be_set_to_and_routing_cannot_follow_is_refused(case):
    kind, settings, message = CONFIGURED[case]
    host = hf_host(kind, **GROUPED, **settings)
    for what in DECODER_WORK.values():
        with pytest.raises(HostError, match=message):
            patch(host.model, **what)
    patch(host.model, fusion=SkipLinks(stride=2)).remove()


def test_a_decoder_that_stops_early_is_refused(host):
    host.decoder.config.num_hidden_layers = 4
    with pytest.raises(HostError, match=r"num_hidden_layers = 4, but (Llava)?LlamaModel has 6 layers"):
        patch(host.model, routing=Routing(split=2))


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
], ids=lambda rope: rope["rope_type"])  # fmt: skip
@torch.no_grad()
def test_fixed_rotary_scalings_are_exact(rope):
    host = hf_host("Llama", **TEXT, rope_scaling=rope)
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 9)], "left")
    stock = host.logits(batch)
    with patch(host.model, routing=Routing(variant="kv", split=5)):
        decoders.silence(host.decoder)
        assert close(host.logits(batch)[batch.valid], stock[batch.valid])


# --- whose forward runs -----------------------------------------------------------------------------------------------


def _replace(host, part, forward):
    """Give one part of the decoder a subclass of its class: with a forward of its own, or without."""
    module = {"decoder": host.decoder, "layer": host.decoder.layers[3], "attention": host.decoder.layers[3].self_attn}[
        part
    ]
    own = {"forward": lambda self, *args, **kwargs: type(module).__mro__[1].forward(self, *args, **kwargs)}
    module.__class__ = type("Ours", (type(module),), own if forward else {})


@pytest.mark.parametrize("part", ["decoder", "layer", "attention"])
def test_a_subclass_counts_as_its_parent_while_it_overrides_nothing(host, part):
    batch = host.batch([(2, IMAGE, 5)])
    with torch.no_grad(), patch(host.model, routing=Routing(split=2)):
        expected = host.logits(batch)
    _replace(host, part, forward=False)
    with torch.no_grad(), patch(host.model, routing=Routing(split=2)):
        assert torch.equal(host.logits(batch), expected)
    _replace(host, part, forward=True)
    with pytest.raises(HostError, match=r"Routing is not available on Ours \(its forward is .*never proven there"):
        patch(host.model, routing=Routing(split=2))
    patch(host.model, fusion=SkipLinks(stride=2)).remove()


@pytest.mark.parametrize("part", ["decoder", "layer", "attention"])
def test_a_function_in_the_place_of_a_forward_is_seen(host, part):
    layer = host.decoder.layers[1]
    module = {"decoder": host.decoder, "layer": layer, "attention": layer.self_attn}[part]

    def other(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    module.forward = types.MethodType(other, module)
    with pytest.raises(HostError, match=r"Routing is not available on .*its forward is .*other"):
        patch(host.model, routing=Routing(split=2))
    module.forward = types.MethodType(functools.wraps(type(module).forward)(other), module)
    patch(host.model, routing=Routing(split=2)).remove()


def test_a_class_whose_forward_somebody_has_replaced_is_seen(host, monkeypatch):
    """As kernels that are patched in for a whole class do it."""
    attention = type(host.decoder.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: None)
    with pytest.raises(HostError, match=r"layer 0 of .*Routing is not available on LlamaAttention"):
        patch(host.model, routing=Routing(split=2))


@torch.no_grad()
def test_wrappers_of_known_tools_are_seen_through(host):
    """accelerate's hooks (device_map), peft and the flags of a second patch."""
    from accelerate.hooks import ModelHook, add_hook_to_module
    from peft import LoraConfig, get_peft_model

    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, routing=Routing(split=2)):
        expected = host.logits(batch)
    for module in (host.model, host.decoder, *host.decoder.layers, host.decoder.layers[0].self_attn):
        add_hook_to_module(module, ModelHook())
    wrapped = get_peft_model(host.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with patch(wrapped, routing=Routing(split=2, freeze="none")):
        assert close(host.logits(batch), expected)
        with patch(wrapped, pruning=FastV(1, 0.5)):
            assert not close(host.logits(batch), expected)


def _wrapped(how, module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for step in how.split(" of "):
        module = torch.compile(module, backend="eager") if step == "compile" else checkpoint_wrapper(module)
    return module


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("part", ["layer", "attention"])
@pytest.mark.parametrize("how", ["compile", "checkpoint", "checkpoint of compile"])
def test_what_compiles_or_checkpoints_a_layer_is_seen_through(host, how, part, order):
    """On both sides of patch(); what it wraps is asked, so another class inside is refused all the same."""
    batch = host.batch([(2, IMAGE, 5)], labels=True)
    settings = {"routing": Routing(split=2, freeze="none")}
    layers = host.decoder.layers

    def wrap():
        for i in (0, 3):
            if part == "layer":
                layers[i] = _wrapped(how, layers[i])
            else:
                layers[i].self_attn = _wrapped(how, layers[i].self_attn)

    def loss_and_gradient():
        host.model.zero_grad()
        loss = host.model(**batch.inputs, use_cache=False).loss
        loss.backward()
        return loss.detach(), host.model.get_input_embeddings().weight.grad.clone()

    with patch(host.model, **settings):
        expected, gradient = loss_and_gradient()
        if order == "after":
            wrap()
            found, theirs = loss_and_gradient()
    if order == "before":
        wrap()
        with patch(host.model, **settings):
            found, theirs = loss_and_gradient()
    assert close(found, expected) and close(theirs, gradient)
    inner = known.bare(known.bare(layers[3]).self_attn)
    inner.__class__ = type("Ours", (type(inner),), {"forward": lambda self, *args, **kwargs: None})
    with pytest.raises(HostError, match=r"layer 3 of .*: Routing is not available on Ours"):
        patch(host.model, **settings)


@torch.no_grad()
def test_a_compiled_model_is_patched_as_the_model_in_it(host):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, routing=Routing(variant="vtw", split=1)):
        expected = host.logits(batch)
    model = torch.compile(host.model, backend="eager")
    with patch(model, routing=Routing(variant="vtw", split=1)) as handle:
        assert get_handle(model) is handle and handle.anatomy.model is host.model
        assert close(model(**batch.inputs).logits, expected)


# --- whole models -----------------------------------------------------------------------------------------------------

OTHER_MODELS = [
    "LlavaNextVideo", "VideoLlava", "VipLlava", "Mistral3", "InternVL", "AyaVision", "PaliGemma",
    "Gemma3",
]  # fmt: skip
PATCHES = [{"fusion": SkipLinks(stride=2)}, *DECODER_WORK.values()]


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_models_that_only_look_alike_are_refused_by_name(name):
    """Their shells are enough: nothing of them may be asked before they are known."""
    outer = getattr(transformers, f"{name}ForConditionalGeneration")
    inner = getattr(transformers, f"{name}Model")
    model, within = outer.__new__(outer), inner.__new__(inner)
    for module in (model, within):
        nn.Module.__init__(module)
    within.multi_modal_projector, within.language_model = nn.Linear(2, 2), nn.Linear(2, 2)
    model.model = within
    for settings in PATCHES:
        with pytest.raises(HostError, match=f"{outer.__name__} is not a model that llava_patch knows: it brings"):
            patch(model, **settings)


def test_a_subclass_of_a_host_is_that_host_while_it_overrides_nothing(host):
    kind = type(host.model)
    host.model.__class__ = type("Ours", (kind,), {"something": lambda self: None})
    patch(host.model, routing=Routing(split=2), fusion=SkipLinks(stride=2)).remove()
    method = "encode_images" if host.name == "llava" else "forward"
    host.model.__class__ = type("Ours", (kind,), {method: lambda self, *args, **kwargs: None})
    for settings in PATCHES:
        with pytest.raises(HostError, match=f"Ours is not a model that llava_patch knows: it brings a {method} of its"):
            patch(host.model, **settings)


def test_what_encodes_images_counts_too(host):
    """HF's inner model, and llava's way of placing images."""
    owner, method = (
        (host.model, "prepare_inputs_labels_for_multimodal")
        if host.name == "llava"
        else (host.model.model, "get_image_features")
    )
    owner.__class__ = type("Ours", (type(owner),), {method: lambda self, *args, **kwargs: None})
    with pytest.raises(HostError, match=f"it brings a {method} of its own"):
        patch(host.model, fusion=SkipLinks(stride=2))


def test_names_are_those_of_the_class_that_defines_the_method(host):
    found = anatomy.find(host.model)
    assert known.name_of(found.decoder) == "transformers.models.llama.modeling_llama.LlamaModel"
    with patch(host.model, routing=Routing(split=2)):
        assert known.name_of(found.decoder) == "transformers.models.llama.modeling_llama.LlamaModel"


@pytest.mark.parametrize("kind", ["Gemma", "Phi3"])
def test_measurements_that_run_or_read_decoder_layers_are_refused_too(kind):
    from llava_patch.measurements import trace
    from llava_patch.probe.decoder import ProbeDecoder
    from llava_patch.probe.sequence import TokenGrid

    message, settings = UNPROVEN[kind]
    found = anatomy.find(hf_host(kind, **TEXT, **settings).model)
    with pytest.raises(HostError, match=f"measuring attention is not available on {message}"):
        with trace.traced(found, {}, 8):
            pass
    with pytest.raises(HostError, match=f"R-Probe is not available on {message}"):
        ProbeDecoder(found, TokenGrid.__new__(TokenGrid))
