"""A patched model either routes its images or raises, whatever the host, somebody else or a new version does."""

import contextlib
import inspect

import pytest
import torch
from torch import nn

from llava_patch import DeepStack, DenseConnector, FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import HostError, InputError
from llava_patch.hosts import compat
from tests.support import decoders
from tests.support.models import HF_IMAGE_TOKEN, IMAGE, LAYERS, close, features_of
from tests.support.routings import ALL, embeddings

METHODS = {
    "lf": {"routing": Routing(split=2)},
    "vtw": {"routing": Routing(variant="vtw", split=2)},
    "fastv": {"pruning": FastV(layer=2, ratio=0.5)},
    "stack": {"fusion": DeepStack(start=1, interval=1)},
}
NOT_ROUTED = "images were encoded, but no call of the decoder routed them.*handle.remove"


def _newer_host(monkeypatch, way):
    """What transformers does from 5.1x on: generate() encodes, the model's forward gets what was encoded.

    Where this version does it itself, it is let.

    Args:
        monkeypatch: takes it back.
        way: how the features come: as an argument, or without one.
    """
    from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as Outer
    from transformers.models.llava.modeling_llava import LlavaModel as Inner

    if way == "argument" and hasattr(Outer, "_supports_mm_encoder_outputs"):
        monkeypatch.setattr(compat, "encode_in_forward", lambda *args: None)
        return
    inner, generate, prepare = Inner.forward, Outer.generate, Outer.prepare_inputs_for_generation

    def forward(self, input_ids=None, pixel_values=None, mm_encoder_outputs=None, **kwargs):
        waiting, self.__dict__["waiting"] = self.__dict__.get("waiting"), None
        features = mm_encoder_outputs if waiting is None else waiting
        if features is None:
            return inner(self, input_ids, pixel_values, **kwargs)
        embeds = self.get_input_embeddings()(input_ids)
        embeds[input_ids == HF_IMAGE_TOKEN] = features
        names = ("attention_mask", "position_ids", "past_key_values", "cache", "use_cache", "cache_position")
        outputs = self.language_model(inputs_embeds=embeds, **{k: v for k, v in kwargs.items() if k in names})
        outputs.image_hidden_states = outputs.image_outputs = None
        return outputs

    def generating(self, inputs=None, pixel_values=None, **kwargs):
        features = torch.cat(list(features_of(self.model.get_image_features(pixel_values=pixel_values))))
        if way == "hidden":
            self.model.__dict__["waiting"] = features
            return generate(self, inputs, **kwargs)
        return generate(self, inputs, mm_encoder_outputs=features, **kwargs)

    def preparing(self, input_ids, mm_encoder_outputs=None, **kwargs):
        made = prepare(self, input_ids, **kwargs)
        if not kwargs.get("cache", kwargs.get("past_key_values")).get_seq_length():
            made["mm_encoder_outputs"] = mm_encoder_outputs
        return made

    monkeypatch.setattr(Inner, "forward", decoders.named(forward, inner.__module__, inner.__qualname__))
    monkeypatch.setattr(Outer, "generate", generating)
    monkeypatch.setattr(Outer, "prepare_inputs_for_generation", preparing)
    monkeypatch.setattr(Outer, "_validate_model_kwargs", lambda *args: None)


def _generate(host, batch, **options):
    inputs = dict(batch.inputs)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **options}
    return host.model.generate(inputs.pop("input_ids"), **inputs, **options)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize("way", ["argument", "hidden"])
@pytest.mark.parametrize("method", METHODS)
def test_a_host_that_encodes_before_the_decoder_is_called(host, monkeypatch, method, way):
    batch = host.batch([(2, IMAGE, 5)])
    stock = _generate(host, batch)
    _newer_host(monkeypatch, way)
    assert torch.equal(_generate(host, batch), stock)
    with patch(host.model, **METHODS[method]):
        with pytest.raises(HostError, match=NOT_ROUTED):
            _generate(host, batch)
        host.model.model.__dict__.pop("waiting", None)
        host.logits(batch)  # forward routes there: nothing of the failed call is left
    with patch(host.model, routing=Routing(split=LAYERS)):  # nothing is routed, nothing is watched
        assert torch.equal(_generate(host, batch), stock)


@pytest.mark.parametrize("how", ["forward", "generate", "train"])
@pytest.mark.parametrize("what", ["forward", "decoder"])
@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_that_somebody_replaces_after_the_patch(host, method, what, how):
    batch = host.batch([(2, IMAGE, 5), (1, IMAGE, 9)], "left", labels=how == "train")
    owner, name = (host.model, "model") if host.name == "llava" else (host.model.model, "language_model")
    decoder = host.decoder
    with patch(host.model, **METHODS[method]):
        routed = decoder.forward
        if what == "forward":
            decoder.forward = type(decoder).forward.__get__(decoder)
        else:
            other = type(decoder)(decoder.config).eval()
            if host.name == "llava":
                other.vision_tower, other.mm_projector = decoder.vision_tower, decoder.mm_projector
            setattr(owner, name, other)
        with pytest.raises(HostError, match=NOT_ROUTED):
            if how == "generate":
                _generate(host, batch)
            elif how == "train":
                host.model.train()
                host.model(**batch.inputs, use_cache=False)
            else:
                host.logits(batch)
        text = host.batch([(7,)])
        text.inputs.pop("images", None)
        host.logits(text)  # no image, no error
        setattr(owner, name, decoder)
        decoder.forward = routed
        host.model.eval()
        host.logits(batch)


class _Other(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.self_attn = layer, layer.self_attn

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@torch.no_grad()
def test_layers_that_somebody_replaces_after_the_patch(host):
    """By the same kind: those are routed. By another: refused, as patch() would have refused them."""
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, **ALL["lf"]):
        before = host.logits(batch)
        host.decoder.layers[1] = type(host.decoder.layers[1])(host.decoder.config, 1).eval()
        after = host.logits(batch)
        assert not close(after, before) and torch.equal(host.logits(batch), after)
        host.decoder.layers[3] = _Other(host.decoder.layers[3])
        for call in (host.logits, lambda batch: _generate(host, batch)):
            with pytest.raises(HostError, match=r"layer 3 of .*: routing is not available on _Other"):
                call(batch)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_encoding_images_outside_of_a_call_is_nobodys_business(host, method):
    batch = host.batch([(2, IMAGE, 5)])
    pixels = batch.inputs["pixel_values" if host.name == "hf" else "images"]
    step = torch.tensor([[7]])
    with patch(host.model, **METHODS[method]) as handle:
        expected = host.logits(batch, use_cache=False)
        handle.anatomy.encode_images(pixels)
        host.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        assert torch.equal(host.logits(batch, use_cache=False), expected)
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        handle.anatomy.encode_images(pixels)
        host.model(input_ids=step, past_key_values=cache, use_cache=True)
        if method == "stack":
            return  # which needs the pixels
        with handle.image_positions(batch.image):
            embeds = host.model.get_input_embeddings()(batch.inputs["input_ids"].clamp(min=0))
            features = handle.anatomy.encode_images(pixels)[0]
            embeds = torch.cat([embeds[:, :2], features[None], embeds[:, -5:]], 1)
            merged = host.model(inputs_embeds=embeds, use_cache=False).logits
            handle.anatomy.encode_images(pixels)
        assert close(merged, expected)


@pytest.mark.parametrize("host", ["llava"], indirect=True)
def test_images_prepared_by_hand_belong_to_no_call(host):
    batch = host.batch([(2, IMAGE, 5)])
    i = batch.inputs
    with torch.no_grad(), patch(host.model, **ALL["lf"]):
        host.model.prepare_inputs_labels_for_multimodal(
            i["input_ids"], None, i["attention_mask"], None, None, i["images"]
        )
        host.model(input_ids=i["input_ids"][:, -5:], use_cache=False)


def test_a_projector_is_watched_once_whatever_is_added_to_it(host):
    hooks = lambda handle: len(handle.anatomy.projector._forward_hooks)  # noqa: E731
    host.model.requires_grad_(True)
    projector = patch(host.model, routing=Routing(split=3, freeze="none"))
    assert hooks(projector) == 1
    for added in ({"pruning": FastV(2, 0.5)}, {"fusion": SkipLinks(stride=2)}):
        patch(host.model, **added)
        assert hooks(projector) == 1
    projector.remove()
    assert hooks(projector) == 0 and not projector.anatomy.projector._forward_pre_hooks


@torch.no_grad()
def test_a_projector_that_a_fusion_puts_there_later_is_watched_too(host):
    """A projector of one Linear is itself replaced."""
    owner = host.model.model
    name = "mm_projector" if host.name == "llava" else "multi_modal_projector"
    setattr(owner, name, nn.Linear(32, 64))
    batch = host.batch([(2, IMAGE, 5)])
    handle = patch(host.model, routing=Routing(split=2))
    patch(host.model, fusion=SkipLinks(stride=2))
    host.logits(batch)
    host.decoder.forward = type(host.decoder).forward.__get__(host.decoder)
    with pytest.raises(HostError, match=NOT_ROUTED):
        host.logits(batch)
    handle.remove()


def _pixels(host, batch):
    return batch.inputs["pixel_values" if host.name == "hf" else "images"]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_encoding_images_by_hand_inside_a_call_is_nobodys_business(host, method):
    """By a logits processor or a hook, whether the call brings images or not; nor does it change what is routed."""
    from transformers import LogitsProcessor, LogitsProcessorList

    batch, other, text = host.batch([(2, IMAGE, 5)]), host.batch([(4, IMAGE, 2)], seed=7), host.batch([(7,)])
    text.inputs.pop("images", None)
    text.inputs.pop("pixel_values", None)
    with patch(host.model, **METHODS[method]) as handle:
        for parameter in handle.adapter_parameters():
            nn.init.normal_(parameter, std=0.2)

        def encode(*args):
            handle.anatomy.encode_images(_pixels(host, other))

        class Encoding(LogitsProcessor):
            def __call__(self, input_ids, scores):
                encode()
                return scores

        for given in (batch, text):
            expected, answer = host.logits(given, use_cache=False), _generate(host, given)
            assert torch.equal(_generate(host, given, logits_processor=LogitsProcessorList([Encoding()])), answer)
            for module in (host.model, host.decoder, host.model.model):
                for register in (module.register_forward_pre_hook, module.register_forward_hook):
                    hook = register(encode)
                    assert torch.equal(host.logits(given, use_cache=False), expected)
                    assert torch.equal(_generate(host, given), answer)
                    hook.remove()


# --- a mask belongs to the call that it was made for ------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("where", ["projector", "decoder"])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_question_asked_of_the_decoder_on_the_way_takes_nothing(host, method, same, where):
    """As choosing features by the question does it, while images are encoded or right before the decoder runs."""
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 9)], "left")
    ids = torch.randint(3, 90, (2, batch.image.shape[1] if same else 4))
    busy, asked = [], []
    with patch(host.model, **METHODS[method]) as handle:
        for parameter in handle.adapter_parameters():
            nn.init.normal_(parameter, std=0.2)
        expected = host.logits(batch, use_cache=False)
        question = host.decoder(input_ids=ids, use_cache=False).last_hidden_state

        def ask(*args):
            if not busy:
                busy.append(True)
                asked.append(host.decoder(input_ids=ids, use_cache=False).last_hidden_state)
                busy.pop()

        if where == "projector":
            hook = handle.anatomy.projector.register_forward_hook(ask)
        else:
            hook = host.decoder.register_forward_pre_hook(ask)
        assert torch.equal(host.logits(batch, use_cache=False), expected)
        hook.remove()
    assert len(asked) == 1 and torch.equal(asked[0], question)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_positions_by_hand_that_contradict_the_call_are_refused(host, method):
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 9)], "left")
    valid = batch.inputs["attention_mask"].bool()
    valid = valid if valid.shape == batch.image.shape else torch.ones_like(batch.image)
    elsewhere = torch.zeros_like(batch.image)
    elsewhere[:, -5:] = True
    with patch(host.model, **METHODS[method]) as handle:
        expected = host.logits(batch)
        for mask in (torch.zeros_like(batch.image), elsewhere, batch.image | valid):
            with pytest.raises(InputError, match="contradicts the call, which brings images of its own"):
                with handle.image_positions(mask):
                    host.logits(batch)
            with pytest.raises(InputError, match="contradicts the call, which brings images of its own"):
                with handle.image_positions(mask):
                    _generate(host, batch)
        with handle.image_positions(batch.image):
            assert torch.equal(host.logits(batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_that_does_not_hold_what_was_encoded(host, monkeypatch, method):
    """Images that the host placed in another way than the mask says: by none, by fewer, by hand in a newer host."""
    batch = host.batch([(2, IMAGE, 5)])
    less = batch.image.clone()
    less[:, 3] = False
    with patch(host.model, **METHODS[method]) as handle:
        for mask in (torch.zeros_like(batch.image), less):
            with monkeypatch.context() as patched:
                patched.setattr("llava_patch.hosts.wrappers.hf_image_mask", lambda *args, mask=mask: mask)
                for call in (host.logits, lambda batch: _generate(host, batch)):
                    with pytest.raises(HostError, match=NOT_ROUTED):
                        call(batch)
        _newer_host(monkeypatch, "argument")
    with patch(host.model, **METHODS[method]) as handle:
        for mask in (torch.zeros_like(batch.image), less):
            with pytest.raises(HostError, match=NOT_ROUTED), handle.image_positions(mask):
                _generate(host, batch)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_the_image_token_is_the_one_that_the_config_says_at_the_call(host, method):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, **METHODS[method]) as handle:
        for parameter in handle.adapter_parameters():
            nn.init.normal_(parameter, std=0.2)
        expected, answer = host.logits(batch), _generate(host, batch)
        host.model.config.image_token_id = HF_IMAGE_TOKEN - 1
        batch.inputs["input_ids"][batch.image] = HF_IMAGE_TOKEN - 1
        assert torch.equal(host.logits(batch), expected)
        assert torch.equal(_generate(host, batch)[:, -3:], answer[:, -3:])


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize("kind", ["lora", "tokens"])
def test_placeholders_among_embeddings_are_recognised_as_the_host_does(host, kind):
    """The embedding's module gives another vector than its weight, where peft adds to it."""
    from peft import LoraConfig, get_peft_model

    settings = {
        "lora": {"target_modules": r".*language_model.*embed_tokens", "init_lora_weights": False},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [HF_IMAGE_TOKEN]}},
    }
    model = get_peft_model(host.model, LoraConfig(r=2, **settings[kind]))
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter += 0.3
        if "lora_embedding" in name:  # in eighths, sums are exact: however many ids are embedded at once
            parameter.copy_((parameter * 8).round() / 8)
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 9)], "left")
    ids = batch.inputs["input_ids"]
    rest = {k: v for k, v in batch.inputs.items() if k != "input_ids"}
    stock = host.logits(batch)
    with patch(model, routing=Routing(variant="vtw", split=1)):
        expected = host.logits(batch)
        embeds = host.model.get_input_embeddings()(ids)
        assert torch.equal(host.model(inputs_embeds=embeds, **rest).logits, expected)
        assert not close(expected, stock)


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava"], indirect=True)
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("other", ["image elsewhere", "same length", "longer"])
@pytest.mark.parametrize("method", [*METHODS, "fastv-most"])
def test_a_generation_that_prepares_a_second_prompt(host, method, other, beams):
    """As guidance by a negative prompt does; each prompt keeps its own positions."""
    from transformers import GenerationMixin

    kind = type(host.model)

    class Guided(kind):
        @torch.no_grad()
        def generate(self, inputs=None, images=None, attention_mask=None, **kwargs):
            prepare = self.prepare_inputs_labels_for_multimodal
            _, _, mask, _, embeds, _ = prepare(inputs, None, attention_mask, None, None, images)
            if other == "longer":
                second = torch.cat([inputs, inputs[:, -3:]], 1)
            else:
                second = torch.cat([inputs[:, 3:], inputs[:, :3]], 1) if other == "image elsewhere" else inputs.clone()
            prepare(second, None, None, None, None, images + (other == "same length"))
            return GenerationMixin.generate(self, inputs_embeds=embeds, attention_mask=mask, **kwargs)

    settings = {**METHODS, "fastv-most": {"pruning": FastV(1, 0.9)}}[method]
    batch = host.batch([(2, IMAGE, 5)])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams}

    def answers():
        with patch(host.model, **settings) as handle:
            generator = torch.Generator().manual_seed(4)
            for parameter in handle.adapter_parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            return _generate(host, batch, output_scores=True, return_dict_in_generate=True, **options)

    torch.manual_seed(0)
    expected = answers()
    host.model.__class__ = Guided
    torch.manual_seed(0)
    found = answers()
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


# --- features ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize("argument", [
    {"vision_feature_select_strategy": "full"}, {"vision_feature_layer": -1}, {"vision_feature_layer": [-2, -1]},
])  # fmt: skip
@pytest.mark.parametrize("settings", [*METHODS.values(), {"fusion": SkipLinks(stride=2)}])
def test_a_call_that_asks_for_other_features_than_the_config(host, settings, argument):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, **settings):
        for call in (host.model, host.model.get_image_features):
            inputs = batch.inputs if call is host.model else {"pixel_values": batch.inputs["pixel_values"]}
            with pytest.raises(InputError, match=f"{next(iter(argument))} = .*differs from the model's config"):
                call(**inputs, **argument)
        own = {key: getattr(host.model.config, key) for key in argument}
        assert torch.equal(host.logits(batch, **own), host.logits(batch))
        host.logits(host.batch([(7,)]), **argument)  # nothing is encoded


# --- fusions ----------------------------------------------------------------------------------------------------------

FUSIONS = {
    "skip": SkipLinks(stride=2),
    "merge": SkipLinks(layers=(), merge_size=2),
    "sti": DenseConnector(kind="sti", groups=(2, 5)),
    "stack": DeepStack(start=1, interval=1),
}


@torch.no_grad()
@pytest.mark.parametrize("states", ["none", "some"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_tower_whose_taps_took_no_part(host, fusion, states):
    """It gives no hidden states, or those alone that were asked for, and the host finds its feature elsewhere."""
    batch = host.batch([(2, IMAGE, 5)])
    pixels = batch.inputs["pixel_values" if host.name == "hf" else "images"]
    with patch(host.model, fusion=FUSIONS[fusion]) as handle:
        vision, projector = handle.anatomy.vision_model, handle.anatomy.projector
        handle.anatomy.encode_images(pixels)
        with pytest.MonkeyPatch.context() as patched:
            forward = vision.forward

            def newer(*args, **kwargs):
                output = forward(*args, **kwargs)
                found = list(output.hidden_states)
                output["hidden_states"] = None if states == "none" else (*[None] * 8, *found[8:])
                return output

            patched.setattr(vision, "forward", newer)
            feature = vision(pixels, output_hidden_states=True).last_hidden_state
            with pytest.raises(HostError, match=f"features that {type(FUSIONS[fusion]).__name__} had no part in"):
                projector(feature[:, 1:])
        handle.anatomy.encode_images(pixels)


@torch.no_grad()
@pytest.mark.parametrize("before", ["called", "not called"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_tower_that_somebody_replaces_after_the_patch(host, fusion, before):
    batch = host.batch([(2, IMAGE, 5)])
    owner = host.model.get_vision_tower() if host.name == "llava" else host.model.model
    with patch(host.model, fusion=FUSIONS[fusion]) as handle:
        encode, pixels = handle.anatomy.encode_images, _pixels(host, batch)
        if before == "called":
            encode(pixels)
        tower = owner.vision_tower
        owner.vision_tower = type(tower)(tower.config).eval()
        for call in (host.logits, lambda batch: _generate(host, batch), lambda batch: encode(pixels)):
            with pytest.raises(HostError, match=f"was replaced after patch.*{type(FUSIONS[fusion]).__name__} has its"):
                call(batch)
        owner.vision_tower = tower
        expected = encode(pixels)
        owner.vision_tower = torch.compile(tower, backend="eager")  # another module around it is no replacement
        assert close(encode(pixels), expected)
        owner.vision_tower = tower


@torch.no_grad()
def test_a_tower_that_has_raised_is_forgotten(host):
    """Features that the caller has kept are the caller's own, as before."""
    pixels = _pixels(host, host.batch([(2, IMAGE, 5)]))
    with patch(host.model, fusion=FUSIONS["skip"]) as handle:
        projector, vision = handle.anatomy.projector, handle.anatomy.vision_model
        kept = []
        hook = projector.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        expected = handle.anatomy.encode_images(pixels)
        hook.remove()
        with pytest.raises((ValueError, RuntimeError)):
            vision(pixels[..., :28, :28], output_hidden_states=True)
        assert torch.equal(projector(kept[0]), expected)


# --- inputs that would not be routed ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [
    "pixel_values_videos", "image_features", "image_embeds", "mm_encoder_outputs", "encoder_outputs",
    "image_hidden_states", "video_features", "vision_outputs",
])  # fmt: skip
def test_videos_and_encoded_images_are_refused(host, name):
    batch = host.batch([(2, IMAGE, 5)])
    text = {"input_ids": batch.inputs["input_ids"]}
    value = torch.zeros(1, 16, 64)
    with patch(host.model, **ALL["lf"]):
        for inputs in (batch.inputs, text):
            ids = {k: v for k, v in inputs.items() if k != "input_ids"}
            for call in (
                lambda: host.model(**inputs, **{name: value}),
                lambda: host.model.generate(inputs["input_ids"], **ids, **{name: value}, max_new_tokens=1),
            ):
                with pytest.raises(InputError, match=f"{name} is not routed on .*give still images as"):
                    call()
        host.model(**batch.inputs, **{name: None} if host.name == "hf" else {})
    if host.name == "hf":
        taken = name in inspect.signature(host.model.forward).parameters  # as the stock model has it
        with patch(host.model, routing=Routing(split=LAYERS)):
            with pytest.raises(ValueError, match="at the same time") if taken else contextlib.nullcontext():
                host.model(**batch.inputs, **{name: value})


UNKNOWN = "cannot know where images are in them.*image_positions"


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda x: x.clone(), lambda x: x[:, 3:], lambda x: torch.cat([x, x], 1), lambda x: x[:, 4:5],
    lambda x: x.double().float(),
], ids=["clone", "slice", "cat", "one", "cast"])  # fmt: skip
@pytest.mark.parametrize("seen", ["nothing", "text", "image"])
def test_embeddings_that_nobody_vouches_for(host, change, seen):
    """Whatever they were made of, alone or behind a cache, through the model or its decoder."""
    batch = host.batch([(2, IMAGE, 5)])
    embeds = embeddings(host, batch)
    if host.name == "llava":
        i = batch.inputs
    with patch(host.model, **ALL["lf"]) as handle:
        if host.name == "llava":  # marked until somebody touches them
            embeds = host.model.prepare_inputs_labels_for_multimodal(
                i["input_ids"], None, i["attention_mask"], None, None, i["images"]
            )[4]
        changed = change(embeds)

        def given():
            if seen == "nothing":
                return {"inputs_embeds": changed}
            inputs = batch.inputs if seen == "image" else {"input_ids": torch.tensor([[5, 6, 7]])}
            cache = host.model(**inputs, use_cache=True).past_key_values
            return {"inputs_embeds": changed, "past_key_values": cache, "use_cache": True}

        for call in (host.model, host.decoder):
            with pytest.raises(InputError, match=UNKNOWN):
                call(**given())
        vouched = given()
        with handle.image_positions(torch.zeros(1, changed.shape[1], dtype=torch.bool)):
            host.model(**vouched)


@torch.no_grad()
def test_embeddings_that_come_in_the_middle_of_a_generation(host):
    """The host's own are trusted, those of somebody who calls the model in between are not."""
    from transformers import LogitsProcessor, LogitsProcessorList

    batch = host.batch([(2, IMAGE, 5)])
    embeds = embeddings(host, batch).clone()
    seen = []

    class Asking(LogitsProcessor):
        def __call__(self, input_ids, scores):
            with pytest.raises(InputError, match=UNKNOWN):
                host.model(inputs_embeds=embeds, use_cache=False)
            seen.append(True)
            return scores

    with patch(host.model, **ALL["lf"]):
        for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
            _generate(host, batch, logits_processor=LogitsProcessorList([Asking()]), **options)
        text = host.batch([(7,)])
        text.inputs.pop("images", None)
        _generate(host, text, logits_processor=LogitsProcessorList([Asking()]))
    assert len(seen) == 12
