"""Decode with the KV cache equals recomputing the whole context."""

import pytest
import torch
from models import IMAGE, LAYERS, TOKENS, close

from llava_patch import Routing, patch
from llava_patch.errors import InputError

PROMPTS = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,), (1, IMAGE, 9)]
STEPS = 5


def _extend(host, batch, tokens):
    inputs = dict(batch.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    return inputs


def _positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("split", [0, 2, LAYERS - 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_decode_is_recomputation_under_teacher_forcing(host, attention, split):
    host.model.set_attn_implementation(attention)
    batch = host.batch(PROMPTS, "left")
    tokens = torch.randint(3, 90, (len(PROMPTS), STEPS), generator=torch.Generator().manual_seed(5))
    with patch(host.model, routing=Routing(split=split)):
        mask = torch.cat([batch.valid.long(), torch.ones_like(tokens)], 1)
        whole = _extend(host, batch, tokens)
        # a plain forward counts padding as positions; HF is given what its generate() would make
        extra = {"position_ids": _positions(mask)} if host.name == "hf" else {}
        full = host.model(**whole, use_cache=False, **extra).logits
        n = batch.valid.shape[1]
        first = {"position_ids": _positions(batch.valid.long())} if host.name == "hf" else {}
        out = host.model(**batch.inputs, use_cache=True, **first)
        assert close(out.logits[:, -1], full[:, n - 1])
        for step in range(STEPS):
            if host.name == "hf":
                extra = {"position_ids": _positions(mask[:, : n + step + 1])[:, -1:]}
            out = host.model(
                input_ids=tokens[:, step : step + 1], attention_mask=mask[:, : n + step + 1],
                past_key_values=out.past_key_values, use_cache=True, **extra,
            )  # fmt: skip
            assert close(out.logits[:, -1], full[:, n + step]), step


@torch.no_grad()
def test_cache_lengths_differ_by_layer(host):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, routing=Routing(split=2)):
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
    lengths = [cache.get_seq_length(i) for i in range(LAYERS)]
    assert lengths == [7 + TOKENS] * 2 + [7] * (LAYERS - 3) + [7 + TOKENS]
    assert cache.nbytes() == sum(lengths) * 2 * 64 * 4


@torch.no_grad()
def test_greedy_generation_picks_what_recomputation_picks(host):
    batch = host.batch([(2, IMAGE, 5), (2, IMAGE, 5)], seed=3)
    with patch(host.model, routing=Routing(split=2)):
        inputs = dict(batch.inputs)
        ids = inputs.pop("input_ids")
        options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "use_cache": True}
        answer = host.model.generate(ids, **inputs, **options)
        answer = answer[:, -STEPS:]
        tokens = torch.empty(2, 0, dtype=torch.long)
        for _ in range(STEPS):
            logits = host.model(**_extend(host, batch, tokens), use_cache=False).logits[:, -1]
            logits[:, 2] = -torch.inf  # min_new_tokens forbids the end token
            top = logits.topk(2).values
            assert (top[:, 0] - top[:, 1] > 1e-3).all()
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(answer, tokens)


@torch.no_grad()
def test_generations_may_interleave(host):
    first, second = host.batch([(2, IMAGE, 5)], seed=1), host.batch([(4, IMAGE, 2)], seed=2)
    step = torch.tensor([[7]])
    with patch(host.model, routing=Routing(split=2)):
        alone = host.model(**first.inputs, use_cache=True)
        expected = host.model(input_ids=step, past_key_values=alone.past_key_values, use_cache=True).logits
        a = host.model(**first.inputs, use_cache=True)
        b = host.model(**second.inputs, use_cache=True)
        host.model(input_ids=step, past_key_values=b.past_key_values, use_cache=True)
        again = host.model(input_ids=step, past_key_values=a.past_key_values, use_cache=True).logits
    assert torch.equal(again, expected)


@torch.no_grad()
@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 1}], ids=["beams", "greedy"]
)
def test_generation_with_and_without_cache_agrees(host, options, split):
    """Unequal prompts, padded on the left, with and without images; beams reorder what the cache knows of them."""
    # One image each: the hosts' own expansion for beams mixes up the images of a prompt that has several.
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 9), (1, IMAGE, 2)], "left", seed=4)
    options = {**options, "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_scores": True, "pad_token_id": 0, "suppress_tokens": [95]}  # HF's image token
    with patch(host.model, routing=Routing(split=split)):
        cached, full = (_generate(host, batch, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, full.sequences)
    if "num_return_sequences" in options:
        assert cached.sequences.shape[0] == 6
        assert torch.allclose(cached.sequences_scores, full.sequences_scores, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", ["reorder", "repeat", "select"])
def test_what_the_cache_knows_moves_with_its_samples(host, change):
    """Across samples of unequal length, which beams of one prompt never cross."""
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 9)], "left")
    step = torch.tensor([[7], [11]])
    order = {"reorder": [1, 0], "repeat": [0, 0, 1, 1], "select": [1]}[change]

    def decode(tokens, change_cache=None):
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        rows = list(range(2))
        if change_cache is not None:
            change_cache(cache)
            rows = order
        mask = torch.cat([batch.valid[rows].long(), torch.ones(len(rows), 1, dtype=torch.long)], 1)
        # Two steps: the second one's mask is made from what the first one left in the cache.
        for _ in range(2):
            out = host.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        return out.logits

    changes = {
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    }
    with patch(host.model, routing=Routing(split=2)):
        assert close(decode(step[order], changes[change]), decode(step)[order])


def _generate(host, batch, **options):
    inputs = dict(batch.inputs)
    return host.model.generate(inputs.pop("input_ids"), **inputs, **options)


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache(host):
    """A second turn of text only, several tokens at once."""
    batch = host.batch([(2, IMAGE, 5)])
    more = torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(7))
    with patch(host.model, routing=Routing(split=2)):
        full = host.model(**_extend(host, batch, more), use_cache=False).logits
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        again = host.model(input_ids=more, past_key_values=cache, use_cache=True).logits
    assert close(again, full[:, -4:])


@torch.no_grad()
def test_a_second_image_after_the_cache_was_built_is_refused(host):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, routing=Routing(split=2)):
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        again = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
        with pytest.raises(InputError, match="already built"):
            host.model(**again, past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_right_padded_prompts_are_warned_about_once(host, caplog):
    from llava_patch.routing import forward

    forward._warn_right_padding.cache_clear()
    with patch(host.model, routing=Routing(split=2)), caplog.at_level("WARNING", "llava_patch"):
        for _ in range(2):
            host.model(**host.batch(PROMPTS, "right").inputs, use_cache=True)
    assert sum("padded on the right" in r.message for r in caplog.records) == 1


@torch.no_grad()
def test_unsupported_caches_are_refused(host):
    from transformers import StaticCache

    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, routing=Routing(split=2)):
        static = StaticCache(config=host.decoder.config, max_cache_len=64)
        with pytest.raises(InputError, match="cache_implementation"):
            host.model(**batch.inputs, past_key_values=static, use_cache=True)
        with pytest.raises(InputError, match=r"StaticCache.*cache_implementation"):
            _generate(host, batch, max_new_tokens=2, cache_implementation="static")
        built = host.model(**batch.inputs, use_cache=True).past_key_values
        with pytest.raises(InputError, match="cropped"):
            built.crop(3)
