"""What DPVR-LF must equal, whatever the weights."""

import pytest
import torch

from llava_patch import Routing, patch
from llava_patch.core.errors import InputError
from tests.support.models import IMAGE, LAYERS, close, set_attention, silence_side_branch

RAGGED = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,), (1, IMAGE, 9)]


@torch.no_grad()
@pytest.mark.parametrize("fusion_layers", [1, 2, 4])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_silent_side_branch_without_text_only_layers_is_stock(host, fusion_layers, padding):
    batch = host.batch(RAGGED, padding)
    stock = host.logits(batch)
    with patch(host.model, routing=Routing(split=LAYERS - fusion_layers, fusion_layers=fusion_layers)):
        assert not close(host.logits(batch)[batch.valid], stock[batch.valid])
        silence_side_branch(host.decoder)
        assert close(host.logits(batch)[batch.valid], stock[batch.valid])


@torch.no_grad()
def test_the_image_reaches_the_answer_only_through_the_side_branch(host):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, routing=Routing(split=1)):
        here = host.logits(batch)
        host.decoder.side_branch[0].mlp.down_proj.weight.add_(0.1)
        assert not torch.equal(host.logits(batch), here)


@torch.no_grad()
def test_a_prompt_that_is_nothing_but_an_image(host):
    if host.name == "llava":
        pytest.skip("llava itself takes a prompt of one token for a decoding step")
    batch = host.batch([(IMAGE,)])
    stock = host.logits(batch)
    with patch(host.model, routing=Routing(split=LAYERS - 1)):
        silence_side_branch(host.decoder)
        assert close(host.logits(batch), stock)
    with patch(host.model, routing=Routing(split=2)):
        assert host.logits(batch).isfinite().all()


@torch.no_grad()
def test_embeddings_prepared_by_hand_are_routed_too(host):
    if host.name == "hf":
        pytest.skip("HF has no method that prepares embeddings")
    batch = host.batch(RAGGED)
    with patch(host.model, routing=Routing(split=2)):
        expected = host.logits(batch)
        i, more = batch.inputs, {k: v for k, v in batch.inputs.items() if k == "modalities"}  # LLaVA-NeXT's
        _, positions, mask, _, embeds, _ = host.model.prepare_inputs_labels_for_multimodal(
            i["input_ids"], None, i["attention_mask"], None, None, i["images"], **more
        )
        by_hand = host.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(by_hand, expected)


@torch.no_grad()
@pytest.mark.parametrize("where", ["argument", "config"])
def test_attention_tensors_are_refused(host, where):
    batch = host.batch(RAGGED)
    set_attention(host.model, "eager")
    with patch(host.model, routing=Routing(split=2)), pytest.raises(InputError, match="output_attentions"):
        if where == "config":
            host.model.config.output_attentions = True
        host.model(**batch.inputs, **({"output_attentions": True} if where == "argument" else {}))


@torch.no_grad()
def test_labels_and_loss_survive_the_detour(host):
    batch = host.batch(RAGGED, labels=True)
    stock = host.model(**batch.inputs).loss
    with patch(host.model, routing=Routing(split=LAYERS - 1)):
        silence_side_branch(host.decoder)
        assert torch.allclose(host.model(**batch.inputs).loss, stock, rtol=1e-5)
