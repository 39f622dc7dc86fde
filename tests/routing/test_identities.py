"""What DPVR-LF must equal, whatever the weights."""

import pytest
import torch
from models import IMAGE, LAYERS, close, silence_side_branch

from llava_patch import Routing, patch
from llava_patch.errors import InputError

RAGGED = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,), (1, IMAGE, 9)]


@torch.no_grad()
def test_split_at_the_end_routes_nothing(host):
    batch = host.batch(RAGGED)
    stock = host.logits(batch)
    before = set(vars(host.decoder))
    with patch(host.model, routing=Routing(split=LAYERS)):
        assert set(vars(host.decoder)) == before
        assert not hasattr(host.decoder, "side_branch")
        assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
def test_batch_without_image_is_stock(host):
    batch = host.batch([(9,), (4,)])
    stock = host.logits(batch)
    with patch(host.model, routing=Routing(split=2)):
        assert torch.equal(host.logits(batch), stock)
        assert not torch.equal(host.logits(host.batch(RAGGED)), stock)  # and with images it does something


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
def test_layers_below_the_split_are_stock(host):
    batch = host.batch(RAGGED)
    stock = host.model(**batch.inputs, output_hidden_states=True).hidden_states
    with patch(host.model, routing=Routing(split=3)):
        routed = host.model(**batch.inputs, output_hidden_states=True).hidden_states
    assert len(routed) == len(stock) == LAYERS + 1
    for layer in range(4):
        assert torch.equal(routed[layer], stock[layer])
    assert not torch.equal(routed[4][batch.valid & ~batch.image], stock[4][batch.valid & ~batch.image])


@torch.no_grad()
def test_hidden_states_of_absent_positions_are_nan(host):
    batch = host.batch(RAGGED)
    with patch(host.model, routing=Routing(split=3)):
        routed = host.model(**batch.inputs, output_hidden_states=True).hidden_states
    for layer in (4, 5):
        assert routed[layer][batch.image].isnan().all()
        assert not routed[layer][batch.valid & ~batch.image].isnan().any()
    assert not routed[LAYERS][batch.valid].isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_gives_each_sample_what_it_gets_alone(host, padding, attention):
    host.model.set_attn_implementation(attention)
    with patch(host.model, routing=Routing(split=2, side_layers=2)):
        together = host.logits(host.batch(RAGGED, padding))
        valid = host.batch(RAGGED, padding).valid
        for i, sample in enumerate(RAGGED):
            alone = _alone(host, i, sample)
            assert close(together[i][valid[i]], host.logits(alone)[0])


def _alone(host, i, sample):
    """The same tokens and pixels as row i of the ragged batch."""
    whole = host.batch(RAGGED, "right")
    length = int(whole.inputs["attention_mask"][i].sum())
    single = host.batch([sample])
    single.inputs["input_ids"] = whole.inputs["input_ids"][i : i + 1, :length]
    key = "pixel_values" if host.name == "hf" else "images"
    if host.name == "hf":
        counts = [sum(p == IMAGE for p in s) for s in RAGGED]
        single.inputs.pop(key, None)
        if counts[i]:
            single.inputs[key] = whole.inputs[key][sum(counts[:i]) : sum(counts[: i + 1])]
    else:
        counts = [max(1, sum(p == IMAGE for p in s)) for s in RAGGED]
        single.inputs[key] = whole.inputs[key][sum(counts[:i]) : sum(counts[: i + 1])]
    return single


@torch.no_grad()
def test_sdpa_and_eager_agree(host):
    batch = host.batch(RAGGED, "left")
    with patch(host.model, routing=Routing(split=2)):
        sdpa = host.logits(batch)
        host.model.set_attn_implementation("eager")
        assert close(host.logits(batch)[batch.valid], sdpa[batch.valid])


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
        i = batch.inputs
        _, positions, mask, _, embeds, _ = host.model.prepare_inputs_labels_for_multimodal(
            i["input_ids"], None, i["attention_mask"], None, None, i["images"]
        )
        by_hand = host.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(by_hand, expected)


@torch.no_grad()
@pytest.mark.parametrize("where", ["argument", "config"])
def test_attention_tensors_are_refused(host, where):
    batch = host.batch(RAGGED)
    host.model.set_attn_implementation("eager")
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
