"""Decode with the KV cache equals recomputing the whole context."""

import re

import pytest
import torch

from llava_patch import Routing, patch
from llava_patch.core.errors import InputError
from llava_patch.hosts.compat import parameters_of
from llava_patch.hosts.compat.static_cache import has_static_layers
from tests.support.models import HF_IMAGE_TOKEN, IMAGE, close
from tests.support.routings import ALL

PROMPTS = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,), (1, IMAGE, 9)]
STEPS = 5


def _extend(host, batch, tokens):
    inputs = dict(batch.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    return inputs


@torch.no_grad()
def test_greedy_generation_picks_what_recomputation_picks(host):
    batch = host.batch([(2, IMAGE, 5), (2, IMAGE, 5)], seed=3)
    with patch(host.model, routing=Routing(split=2)):
        inputs = dict(batch.inputs)
        ids = inputs.pop("input_ids")
        options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "use_cache": True}
        options["suppress_tokens"] = [HF_IMAGE_TOKEN]
        answer = host.model.generate(ids, **inputs, **options)
        answer = answer[:, -STEPS:]
        tokens = torch.empty(2, 0, dtype=torch.long)
        for _ in range(STEPS):
            logits = host.model(**_extend(host, batch, tokens), use_cache=False).logits[:, -1]
            logits[:, [2, HF_IMAGE_TOKEN]] = -torch.inf  # min_new_tokens forbids the end token
            top = logits.topk(2).values
            assert (top[:, 0] - top[:, 1] > 1e-3).all()
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(answer, tokens)


@torch.no_grad()
@pytest.mark.parametrize("change", ["reorder", "repeat", "select"])
@pytest.mark.parametrize("case", ["lf", "lf-k2", "kv", "fastv", "lf+fastv"])
def test_what_the_cache_knows_moves_with_its_samples(host, case, change):
    """Across samples of unequal length, which beams of one prompt never cross: a token, a token, another image."""
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 9)], "left")
    order = {"reorder": [1, 0], "repeat": [0, 0, 1, 1], "select": [1]}[change]
    tokens = torch.tensor([[7], [11]])
    chunk = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    image = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0]]).bool()

    def decode(handle, rows, change_cache=None):
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        if change_cache is not None:
            change_cache(cache)
        mask = torch.cat([batch.valid[rows].long(), torch.ones(len(rows), 1, dtype=torch.long)], 1)
        # Two steps: the second one's mask is made from what the first one left in the cache.
        for _ in range(2):
            one = host.model(input_ids=tokens[rows], attention_mask=mask, past_key_values=cache, use_cache=True)
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
        mask = torch.cat([mask, torch.ones(len(rows), 5, dtype=torch.long)], 1)
        with handle.image_positions(image[rows]):
            many = host.model(inputs_embeds=chunk[rows], attention_mask=mask, past_key_values=cache, use_cache=True)
        return one.logits, many.logits

    changes = {
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    }
    with patch(host.model, **ALL[case]) as handle:
        expected = decode(handle, [0, 1])
        for got, wanted in zip(decode(handle, order, changes[change]), expected, strict=True):
            assert close(got, wanted[order])
        assert not close(expected[0][0], expected[0][1])


def _generate(host, batch, **options):
    inputs = dict(batch.inputs)
    return host.model.generate(inputs.pop("input_ids"), **inputs, **options)


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache(host):
    """A second turn of text only, several tokens at once."""
    for layer in host.decoder.layers:
        layer.self_attn.past_key_value = None  # as a static generation leaves it behind from 4.38 to 4.40
    batch = host.batch([(2, IMAGE, 5)])
    more = torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(7))
    with patch(host.model, routing=Routing(split=2)):
        full = host.model(**_extend(host, batch, more), use_cache=False).logits
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        again = host.model(input_ids=more, past_key_values=cache, use_cache=True).logits
    assert close(again, full[:, -4:])


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
    StaticCache = pytest.importorskip("transformers.cache_utils").__dict__.get("StaticCache")
    if StaticCache is None:
        pytest.skip("the only caches here are dynamic, or drop positions")
    if host.name == "hf" and has_static_layers():
        pytest.skip("static caches are routed here: test_static_cache")

    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, routing=Routing(split=2)):
        asked = {"max_batch_size": 1, "device": "cpu", "config": host.decoder.config, "max_cache_len": 64}
        named = parameters_of(StaticCache.__init__)
        static = StaticCache(**{k: v for k, v in asked.items() if k in named or "kwargs" in named})
        with pytest.raises(InputError, match="cache_implementation"):
            host.model(**batch.inputs, past_key_values=static, use_cache=True)
        with pytest.raises((InputError, RuntimeError)) as raised:
            _generate(host, batch, max_new_tokens=2, cache_implementation="static")
        if isinstance(raised.value, InputError):
            assert raised.match(r"StaticCache.*cache_implementation")
            assert _generate(host, batch, max_new_tokens=2) is not None  # nothing is left of it in the model
    if not isinstance(raised.value, InputError):  # from 4.39 to 4.45 no model takes a static cache beside embeddings
        with pytest.raises(RuntimeError, match=re.escape(str(raised.value))):
            _generate(host, batch, max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_offloaded_caches_are_refused(host):
    from transformers import DynamicCache

    if "offloading" not in parameters_of(DynamicCache.__init__):
        pytest.skip("no dynamic cache is offloaded here")
    with patch(host.model, routing=Routing(split=2)), pytest.raises(InputError, match="offloaded"):
        cache = DynamicCache(offloading=True)
        host.model(**host.batch([(2, IMAGE, 5)]).inputs, past_key_values=cache, use_cache=True)
