"""Calls that routing cannot follow are refused; none goes on as something else without a word."""

import contextlib
import copy

import pytest
import torch

from llava_patch import FastV, Routing, patch
from llava_patch.core.errors import InputError, LlavaPatchError, SettingError
from llava_patch.routing.pruning import choose_kept
from tests.support.models import IMAGE, close
from tests.support.routings import ALL, RAGGED, embeddings


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)  # llava makes position ids of its own
def test_samples_packed_into_one_sequence_are_refused(host):
    batch = host.batch([(2, IMAGE, 5)])
    ids = torch.cat([torch.arange(10), torch.arange(13)])[None]
    inputs = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
    with patch(host.model, **ALL["lf"]), pytest.raises(InputError, match="not samples packed into one"):
        host.model(**inputs, position_ids=ids, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
def test_masks_and_lengths_of_another_kind_are_refused(host):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, **ALL["lf"]):
        square = torch.ones(1, 1, 23, 23)
        with pytest.raises(InputError, match="2-D attention_mask"):
            host.model(**{**batch.inputs, "attention_mask": square})
        with pytest.raises(InputError, match="packed into one sequence"):
            host.model(**batch.inputs, cu_seq_lens_q=torch.tensor([0, 10, 23]))


@torch.no_grad()
def test_embeddings_of_unknown_content_are_refused(host):
    """Merged by hand, copied, cast: nobody knows where the images are in them, unless the caller says so."""
    batch = host.batch(RAGGED, "left")
    embeds = embeddings(host, batch).clone()
    given = {"inputs_embeds": embeds, "attention_mask": batch.valid.long(), "use_cache": False}
    with patch(host.model, **ALL["lf"]) as handle:
        expected = host.logits(batch, use_cache=False)
        with pytest.raises(InputError, match="cannot know where images are in them"):
            host.model(**given)
        with handle.image_positions(batch.image):
            assert close(host.model(**given).logits[batch.valid], expected[batch.valid])
        with handle.image_positions(torch.zeros_like(batch.image)):
            text = host.model(**given).logits
    assert torch.equal(text, host.model(**given).logits)


@torch.no_grad()
def test_positions_that_fit_no_call_are_refused(host):
    batch = host.batch([(2, IMAGE, 5)])
    embeds = embeddings(host, batch)
    with patch(host.model, **ALL["lf"]) as handle:
        with pytest.raises(InputError, match=r"expected a bool tensor \[batch, tokens\], got torch.float32"):
            with handle.image_positions(torch.zeros(1, 23)):
                pass
        with pytest.raises(InputError, match="was not called in this block"):
            with handle.image_positions(batch.image):
                pass
        with pytest.raises(InputError, match="image positions cover 5 tokens but the decoder got 23"):
            with handle.image_positions(batch.image[:, :5]):
                host.model(inputs_embeds=embeds)
        with pytest.raises(InputError, match="open a block of its own for every chunk"):
            with handle.image_positions(batch.image[:, :20]):
                out = host.model(inputs_embeds=embeds[:, :20], use_cache=True)
                host.model(inputs_embeds=embeds[:, 20:], past_key_values=out.past_key_values, use_cache=True)
        with pytest.raises(InputError, match="this model prunes nothing"):
            with handle.image_positions(batch.image, kept=batch.valid):
                host.model(inputs_embeds=embeds)


@torch.no_grad()
def test_a_model_that_nothing_is_routed_on_does_not_ask(host):
    batch = host.batch([(2, IMAGE, 5)])
    embeds = embeddings(host, batch)
    stock = host.logits(batch, use_cache=False)
    with patch(host.model, routing=Routing(split=6)) as handle, handle.image_positions(batch.image):
        assert torch.equal(host.model(inputs_embeds=embeds, use_cache=False).logits, stock)


@torch.no_grad()
def test_a_generation_inside_a_block_keeps_its_positions(host):
    """Also where each step recomputes the prompt."""
    if host.name == "llava":
        pytest.skip("llava's generate takes no embeddings")
    batch = host.batch([(2, IMAGE, 5), (4, IMAGE, 3)], "left")
    embeds = embeddings(host, batch)
    for case in ("lf", "fastv", "lf+fastv"):
        with patch(host.model, **ALL[case]) as handle:
            rows = []
            for use_cache in (True, False):
                with handle.image_positions(batch.image):
                    rows.append(
                        host.model.generate(
                            inputs_embeds=embeds,
                            attention_mask=batch.valid.long(),
                            use_cache=use_cache,
                            max_new_tokens=4,
                            do_sample=False,
                            suppress_tokens=[95],
                        )
                    )
            assert torch.equal(*rows), case


@torch.no_grad()
def test_a_cache_goes_on_under_its_own_settings_only(host):
    batch = host.batch([(2, IMAGE, 5)])
    step = torch.tensor([[7]])
    with patch(host.model, **ALL["lf"]):
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
    with pytest.raises(InputError, match="the model that goes on with it is not routed"):
        host.model(input_ids=step, past_key_values=cache, use_cache=True)
    with patch(host.model, **ALL["pc"]), pytest.raises(InputError, match="filled under other routing or pruning"):
        host.model(input_ids=step, past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("case", ["lf", "fastv"])
def test_a_forward_inside_a_generation_is_on_its_own(host, case):
    """As contrastive decoding does it, from a logits processor: another image, every logit."""
    from transformers import LogitsProcessor, LogitsProcessorList

    batch, other = host.batch([(2, IMAGE, 5)], seed=1), host.batch([(2, IMAGE, 5)], seed=2)
    seen = []

    class Contrast(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(host.model(**other.inputs, use_cache=False).logits)
            return scores

    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")
    with patch(host.model, **ALL[case]):
        expected = host.logits(other, use_cache=False)
        for use_cache in (True, False):
            processors = LogitsProcessorList([Contrast()])
            host.model.generate(ids, **inputs, max_new_tokens=2, logits_processor=processors, use_cache=use_cache)
    assert len(seen) == 4 and all(torch.equal(logits, expected) for logits in seen)


@torch.no_grad()
def test_two_models_do_not_hear_each_other(host, tower_folder):
    from tests.support import models

    other = (
        models.Host("hf", models.hf_model())
        if host.name == "llava"
        else models.Host("llava", models.llava_model(tower_folder))
    )
    batch, second = host.batch([(2, IMAGE, 5)]), other.batch([(3, IMAGE, 5)])
    with patch(host.model, **ALL["lf"]), patch(other.model, **ALL["kv"]):
        expected = other.logits(second)
        wanted = host.logits(batch)
        seen = []
        hook = host.decoder.register_forward_pre_hook(lambda m, a: seen.append(other.logits(second)))
        assert torch.equal(host.logits(batch), wanted)
        hook.remove()
    assert torch.equal(seen[0], expected)


def test_nested_blocks_take_off_what_is_theirs(host):
    batch = host.batch([(2, IMAGE, 5)])
    with torch.no_grad():
        stock = host.logits(batch)
        with patch(host.model, routing=Routing(split=3)) as outer:
            routed = host.logits(batch)
            flags = [p.requires_grad for p in host.model.parameters()]
            with patch(host.model, pruning=FastV(2, 0.5)) as inner:
                assert inner is outer and inner.pruning == FastV(2, 0.5)
                assert not torch.equal(host.logits(batch), routed)
            assert outer.pruning is None and host.model.config.llava_patch["pruning"] is None
            assert torch.equal(host.logits(batch), routed)
            with pytest.raises(SettingError, match=r"FastV.layer = 4 is outside 1\.\.3"):
                patch(host.model, pruning=FastV(4, 0.5))
            assert torch.equal(host.logits(batch), routed)  # a refused patch leaves the other one on
            assert [p.requires_grad for p in host.model.parameters()] == flags
        assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
def test_methods_may_be_added_in_any_order(host):
    batch = host.batch(RAGGED, "left")
    routing, pruning = Routing(variant="kv", split=3), FastV(2, 0.5)
    with patch(host.model, routing=routing, pruning=pruning):
        together = host.logits(batch)
    for first, second in (({"routing": routing}, {"pruning": pruning}), ({"pruning": pruning}, {"routing": routing})):
        handle = patch(host.model, **first)
        patch(host.model, **second)
        assert torch.equal(host.logits(batch), together)
        handle.remove()


def test_a_patched_model_cannot_be_copied_whatever_the_variant(host):
    for case in ("lf", "kv"):
        with patch(host.model, **ALL[case]):
            with pytest.raises(LlavaPatchError, match="a patched model cannot be copied"):
                copy.deepcopy(host.model)
            copy.deepcopy(host.decoder.layers[4])


def test_a_gradient_that_somebody_reads_is_kept(host):
    """A soft prompt: embeddings that are a leaf, also where gradient checkpointing has asked for input gradients."""
    batch = host.batch([(2, IMAGE, 5)])
    with torch.no_grad():
        embeds = embeddings(host, batch)
    for forced in (False, True):
        if forced:
            host.model.enable_input_require_grads()
        with patch(host.model, **ALL["lf"]) as handle:
            prompt = embeds.clone().requires_grad_()
            with handle.image_positions(batch.image):
                host.model(inputs_embeds=prompt, use_cache=False).logits.sum().backward()
            assert prompt.grad.abs().sum() > 0


@pytest.mark.parametrize("host", ["llava"], indirect=True)
def test_labels_that_come_with_prepared_embeddings_are_read(host):
    """Pruning everything keeps the image's last position when a label is right behind it."""
    batch = host.batch([(1, IMAGE, 3)], labels=True)
    batch.inputs["labels"][:, :1] = -100
    batch.inputs["labels"][:, -2:] = -100
    with patch(host.model, pruning=FastV(2, 1.0, training=True)) as handle:
        host.model.train()
        expected = host.model(**batch.inputs, use_cache=False).loss
        i = batch.inputs
        _, _, mask, _, embeds, labels = host.model.prepare_inputs_labels_for_multimodal(
            i["input_ids"], None, i["attention_mask"], None, i["labels"], i["images"]
        )
        by_hand = host.model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss
        with handle.image_positions(batch.image):
            placed = host.model(**batch.inputs, use_cache=False).loss
    assert torch.equal(by_hand, expected) and torch.equal(placed, expected)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize("keep", [1, 5, 10, 23])
def test_asking_for_fewer_logits_prunes_the_same(host, keep):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, pruning=FastV(2, 0.5)):
        whole = host.logits(batch, use_cache=False)
        assert close(host.logits(batch, logits_to_keep=keep, use_cache=False), whole[:, -keep:])


def test_which_tokens_pruning_keeps():
    assert FastV(ratio=0.7).keep_counts(0, (10, 10, 9, 576, 1), (0,) * 5) == (3, 3, 3, 173, 1)
    assert FastV(ratio=1 / 3).keep_counts(0, (9, 576), (0, 0)) == (6, 384)
    assert FastV(ratio=1.0).keep_counts(0, (4, 4), (0, 2)) == (0, 2)
    scores = torch.tensor([[0.1, 0.5, 0.5, 0.5, 0.9], [0.2, 0.2, 0.2, 0.2, 0.2]])
    image = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]]).bool()
    assert choose_kept(scores, image, (2, 3)).int().tolist() == [
        [0, 1, 0, 0, 1],
        [1, 1, 0, 1, 0],
    ]  # the lower one wins ties
    protected = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    assert choose_kept(scores, image, (2, 1), protected).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]


@torch.no_grad()
def test_two_turns_of_a_padded_batch(host):
    """An unequal first turn, then another image: each sample gets what it gets alone."""
    step = torch.tensor([[7], [9]])
    first, second = host.batch([(4, IMAGE, 2), (1, IMAGE, 2)], "left"), host.batch([(2, IMAGE, 4)] * 2, seed=3)
    key = "pixel_values" if host.name == "hf" else "images"
    mask = torch.cat([first.valid.long(), second.valid.long()], 1)
    # llava: of the turn's own tokens, placeholders not spread out
    own = mask if host.name == "hf" else second.inputs["attention_mask"]
    longer = torch.cat([mask, torch.ones_like(step)], 1)
    for case in ("lf", "kv", "fastv", "vtw"):
        with patch(host.model, **ALL[case]) as handle:
            host.batch([(1, IMAGE)], "left")  # llava pads as the last batch was made
            cache = host.model(**first.inputs, use_cache=True).past_key_values
            out = host.model(**{**second.inputs, "attention_mask": own}, past_key_values=cache, use_cache=True)
            last = host.model(input_ids=step, attention_mask=longer, past_key_values=cache, use_cache=True).logits
            for i in range(2):
                ids = first.inputs["input_ids"][i][first.inputs["attention_mask"][i].bool()]
                ids = torch.cat([ids, second.inputs["input_ids"][i], step[i]])[None]
                pixels = torch.stack([first.inputs[key][i], second.inputs[key][i]])
                single = {"input_ids": ids, "attention_mask": torch.ones_like(ids), key: pixels}
                kept = cache.kept()[i : i + 1, -int(longer[i].sum()) :]
                with handle.image_positions(kept=kept) if case == "fastv" else contextlib.nullcontext():
                    alone = host.model(**single, use_cache=False).logits
                assert close(last[i, -1], alone[0, -1]), (case, i)
                assert close(out.logits[i, -1], alone[0, -2]), (case, i)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)  # llava is told of a later turn's own padding only
@pytest.mark.parametrize("case", ["lf", "vtw", "fastv"])
def test_an_image_joins_a_padded_batch_that_began_with_text(host, case):
    """The stock cache does not know of the padding; the attention mask does."""
    first, second = host.batch([(6,), (3,)], "left"), host.batch([(2, IMAGE, 4)] * 2, seed=3)
    step = torch.tensor([[7], [9]])
    mask = torch.cat([first.valid.long(), second.valid.long()], 1)
    longer = torch.cat([mask, torch.ones_like(step)], 1)
    with patch(host.model, **ALL[case]) as handle:
        cache = host.model(**first.inputs, use_cache=True).past_key_values
        host.model(**{**second.inputs, "attention_mask": mask}, past_key_values=cache, use_cache=True)
        last = host.model(input_ids=step, attention_mask=longer, past_key_values=cache, use_cache=True).logits
        ids = torch.cat([first.inputs["input_ids"][1, -3:], second.inputs["input_ids"][1], step[1]])[None]
        single = {"input_ids": ids, "pixel_values": second.inputs["pixel_values"][1:]}
        kept = cache.kept()[1:, 3:]
        with handle.image_positions(kept=kept) if case == "fastv" else contextlib.nullcontext():
            alone = host.model(**single, use_cache=False).logits
    assert close(last[1, -1], alone[0, -1])


@torch.no_grad()
def test_cropping_stops_at_the_last_image_of_any_turn(host):
    first, second = host.batch([(2, IMAGE, 5)], seed=1), host.batch([(3, IMAGE, 4)], seed=2)
    turn = {k: v for k, v in second.inputs.items() if k != "attention_mask"}
    with patch(host.model, **ALL["lf"]):
        cache = host.model(**first.inputs, use_cache=True).past_key_values
        host.model(**turn, past_key_values=cache, use_cache=True)
        with pytest.raises(InputError, match="its last image ends at 42"):
            cache.crop(41)
        cache.crop(42)
        assert cache.get_seq_length() == 42 and cache.get_seq_length(3) == 2 + 5 + 3


def test_checkpointing_recomputes_the_layers_that_call_their_projections_apart(host):
    """The KV variant's layers are called with keys of other positions, past the layer's own checkpointing."""
    counts = []
    host.decoder.layers[3].mlp.register_forward_pre_hook(lambda m, a: counts.append(1))
    for on in (False, True):
        if on:
            host.model.gradient_checkpointing_enable({"use_reentrant": False})
        with patch(host.model, **ALL["kv"]):
            host.model.train()
            counts.clear()
            host.model(**host.batch([(2, IMAGE, 5)], labels=True).inputs, use_cache=False).loss.backward()
            assert len(counts) == (2 if on else 1)


def test_a_side_branch_that_pruning_left_nothing_gets_a_gradient_of_zero(host):
    batch = host.batch([(1, IMAGE, 4)], labels=True)
    batch.inputs["labels"][:, :-2] = -100  # no image position is read
    with patch(host.model, routing=Routing(split=3), pruning=FastV(2, 1.0, training=True)):
        host.model.train()
        host.model(**batch.inputs, use_cache=False).loss.backward()
        for parameter in host.decoder.side_branch.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("shape", [(1, 11), (1, 5), (1, 0), (2, 8), (8,), (1, 1, 8, 8)])
def test_a_mask_of_other_tokens_is_stocks_business_until_tokens_are_routed(shape):
    """Stock's answer is the measure: where nothing is routed it is the same, bit for bit or the same error."""
    from tests.reliability.place import open_stock
    from tests.reliability.rows_runtime import ids, pixels

    model, mask = open_stock(), torch.ones(shape, dtype=torch.long)

    def answer(**inputs):
        with torch.no_grad():
            try:
                return model(**inputs, attention_mask=mask).logits
            except (RuntimeError, ValueError, IndexError) as error:
                return str(error)

    inputs = {"input_ids": ids(), "pixel_values": pixels()}
    blind = {"input_ids": ids()[:, :1].expand(1, 8).contiguous()}
    stock, stock_blind = answer(**inputs), answer(**blind)
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # noqa: E731
    with patch(model, routing=Routing(split=model.config.text_config.num_hidden_layers)):
        assert same(answer(**inputs), stock)
    with patch(model, routing=Routing(split=2)):
        assert same(answer(**blind), stock_blind)
        with pytest.raises(InputError, match="attention_mask"):
            model(**inputs, attention_mask=mask)
