"""Image positions on both hosts, and llava's labels recovered from the detour."""

import pytest
import torch

from llava_patch.core.errors import HostError, InputError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import anatomy, call_context, wrappers
from llava_patch.hosts.wrappers import llava_prepare
from tests.support.models import IMAGE, Host

SAMPLES = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,)]


@pytest.fixture
def llava(tower_folder):
    from tests.support import models

    return Host("llava", models.llava_model(tower_folder))


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("masked", [True, False])
def test_what_prepare_returns_is_what_the_stock_method_returns(llava, padding, limit, masked):
    """Also where the length limit cuts through an image."""
    batch = llava.batch(SAMPLES if masked else [SAMPLES[0], SAMPLES[0]], padding, labels=True)
    llava.model.config.tokenizer_model_max_length = limit
    i = batch.inputs
    mask = i["attention_mask"].bool() if masked else None
    arguments = (i["input_ids"], None, mask, None, i["labels"], i["images"])
    stock = llava.model.prepare_inputs_labels_for_multimodal(*arguments)
    ours, image_mask = llava_prepare(llava.model.prepare_inputs_labels_for_multimodal, -200, *arguments)
    for a, b in zip(stock, ours, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    if limit is None:
        assert torch.equal(image_mask, batch.image)
    else:
        assert image_mask.shape[1] == limit and image_mask[0].sum() == limit - 2


@torch.no_grad()
def test_the_decoder_is_told_the_positions_once(host):
    batch = host.batch(SAMPLES[:2])
    seen = []
    undo = UndoStack()
    found = anatomy.find(host.model)
    wrappers.attach(found, undo)
    forward = host.decoder.forward

    def listen(*args, **kwargs):
        embeds = kwargs["inputs_embeds"]
        seen.extend(call_context.take(found, given).image_mask for given in (embeds, embeds.clone()))
        return forward(*args, **kwargs)

    undo.set_attribute(host.decoder, "forward", listen)
    host.logits(batch)
    assert torch.equal(seen[0], batch.image) and seen[1] is None
    assert call_context.take(found).image_mask is None  # nothing is left behind between calls
    undo.unwind()


@pytest.mark.parametrize("images", [1, 4])
def test_image_tokens_and_images_that_disagree_are_named(llava, images):
    batch = llava.batch(SAMPLES[:2])
    batch.inputs["images"] = torch.zeros(images, 3, 56, 56)
    from llava_patch import Routing, patch

    with (
        patch(llava.model, routing=Routing(split=2)),
        pytest.raises(InputError, match=f"3 image tokens in 2 samples need 3 images.*got {images}"),
    ):
        llava.logits(batch)


def test_the_hf_host_itself_names_a_mismatch(host):
    if host.name == "llava":
        pytest.skip("llava has no check of its own; ours is tested above")
    from llava_patch import Routing, patch

    batch = host.batch(SAMPLES[:2])
    batch.inputs["pixel_values"] = batch.inputs["pixel_values"][:2]
    with patch(host.model, routing=Routing(split=2)), pytest.raises(ValueError, match=r"do not match:?,? tokens: 48"):
        host.logits(batch)


def test_the_features_stay_when_the_decoder_is_asked_for_its_states(host):
    """llava's tower is inside its decoder, and transformers 5 hooks what is inside a model that reports its states."""
    inputs = host.batch([(2, IMAGE, 3)]).inputs
    with torch.no_grad():
        before = host.model(**inputs).logits
        host.model(**inputs, output_hidden_states=True)
        assert torch.equal(host.model(**inputs).logits, before)


def test_anatomy_of_both_hosts(host):
    found = anatomy.find(host.model)
    assert (found.host, found.n_blocks, found.main_block, len(found.layers)) == (host.name, 8, 7, 6)
    assert found.grid == (4, 4) and found.patch_size == 14 and found.drops_cls
    assert found.first_linear()[2].in_features == 32
    assert found.encode_images(torch.zeros(2, 3, 56, 56)).shape == (2, 16, 64)
    tower = found.vision_parts()
    before, blocks, after = tower.before, tower.blocks, tower.after
    assert len(blocks) == 8 and len(before) == 2 and len(after) == 1


def test_wrappers_are_seen_through(host):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(host.model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert anatomy.find(wrapped).model is host.model


def test_unknown_models_are_refused():
    with pytest.raises(HostError, match="Linear is not a model that llava_patch knows"):
        anatomy.find(torch.nn.Linear(1, 1))


def test_a_llava_model_without_vision_is_refused():
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    from tests.support import models

    with pytest.raises(HostError, match="no vision tower"):
        anatomy.find(LlavaLlamaForCausalLM(LlavaConfig(**models.TEXT)))
