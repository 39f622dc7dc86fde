"""Static caches: the same tokens as with a dynamic one, and a step of decoding that compiles as one graph."""

import logging

import pytest
import torch

from llava_patch import Routing, VisionZip, patch
from llava_patch.core.errors import InputError
from llava_patch.hosts.compat.static_cache import has_static_layers
from tests.support.models import HF_IMAGE_TOKEN, IMAGE, close
from tests.support.routings import ALL, RAGGED

if not has_static_layers():
    pytest.skip("here static caches are refused whole", allow_module_level=True)

from transformers.cache_utils import StaticCache

pytestmark = pytest.mark.parametrize("host", ["hf"], indirect=True)
PAIR = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)]
LONGEST = 64


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest would keep all that it says
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def _generate(host, batch, steps=6, **options):
    inputs = dict(batch.inputs)
    asked = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "suppress_tokens": [HF_IMAGE_TOKEN]}
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    return host.model.generate(inputs.pop("input_ids"), **inputs, **{**asked, **options})


def _same(got, wanted):
    return torch.equal(got.sequences, wanted.sequences) and close(torch.stack(got.logits), torch.stack(wanted.logits))


def _static(host, longest=LONGEST):
    return StaticCache(config=host.decoder.config, max_cache_len=longest)


def _prefill(host, batch, cache=None):
    return host.model(**batch.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def _steps(forward, batch, cache, tokens, made=False):
    """Logits of one token after the other; the masks as a caller has them, or as `generate` makes them."""
    mask, found = batch.inputs["attention_mask"], []
    for token in tokens.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        given = torch.nn.functional.pad(mask, (0, LONGEST - mask.shape[1]))[:, None, None].bool() if made else mask
        places = (mask.cumsum(1) - 1)[:, -1:].contiguous()
        out = forward(input_ids=token, attention_mask=given, position_ids=places, past_key_values=cache, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


CASES = {**ALL, "lf+vision-zip": {"routing": Routing(split=2), "pruning": VisionZip(dominant=4, contextual=3)}}


@torch.no_grad()
@pytest.mark.parametrize("case", list(CASES))
def test_tokens_are_those_of_a_dynamic_cache(host, case):
    batch = host.batch(RAGGED, "left", seed=3)
    with patch(host.model, **CASES[case]):
        dynamic, static = _generate(host, batch), _generate(host, batch, cache_implementation="static")
    assert _same(static, dynamic)
    expected = [layer.keys.shape[2] for layer in dynamic.past_key_values.layers]
    assert [layer.keys.shape[2] for layer in static.past_key_values.layers] == expected  # full at the end, and no wider


@torch.no_grad()
def test_generate_uses_a_cache_again_whatever_came_before(host):
    """It keeps one on the model: for another prompt, for text alone, and for the stock model after `remove()`."""
    prompts = [PAIR, [(9,), (4,)], [(2, IMAGE, 3), (5,)], PAIR]
    batches = [host.batch(samples, "left", seed) for seed, samples in enumerate(prompts)]
    stock = [_generate(host, batch) for batch in batches]
    with patch(host.model, **ALL["lf"]):
        for batch in batches:
            static = _generate(host, batch, cache_implementation="static")
            assert _same(static, _generate(host, batch))
            kept = static.past_key_values
        assert kept is host.model._cache
    assert _same(_generate(host, batches[2], cache_implementation="static"), stock[2])
    assert host.model._cache is kept and type(kept) is StaticCache


@torch.no_grad()
@pytest.mark.parametrize("case", ["lf", "kv+fastv", "vtw"])
def test_a_step_is_one_graph_that_is_made_once(host, case):
    batches = [host.batch(PAIR, "left", seed) for seed in range(2)]
    tokens = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(1))
    with patch(host.model, **ALL[case]):
        expected = [_steps(host.model, batch, _prefill(host, batch), tokens) for batch in batches]
        cache = _static(host)
        forward = torch.compile(host.model.__call__, backend="eager", fullgraph=True)
        for batch, wanted in zip(batches, expected, strict=True):
            cache.reset()
            _prefill(host, batch, cache)
            assert close(_steps(forward, batch, cache, tokens, made=True), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_generate_compiles_steps_by_itself(host):
    """As it does on a GPU whenever the cache allows it."""
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    batches = [host.batch(PAIR, "left", seed) for seed in range(2)]
    with patch(host.model, **ALL["lf+fastv"]):
        for batch in batches:
            got = _generate(host, batch, cache_implementation="static", compile_config=config)
            assert _same(got, _generate(host, batch))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
@pytest.mark.parametrize("case", ["lf", "kv+fastv"])
def test_a_conversation_goes_on_with_text_and_another_image(host, case):
    batch = host.batch(PAIR, "left")
    generator = torch.Generator().manual_seed(1)
    tokens, chunk = torch.randint(3, 90, (2, 2), generator=generator), torch.randn(2, 6, 64, generator=generator)
    image = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0]]).bool()

    def talk(handle, cache):
        cache = _prefill(host, batch, cache)
        found = [_steps(host.model, batch, cache, tokens)]
        mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 2), value=1)
        later = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # the first sample's turn is shorter
        mask = torch.cat([mask, later], 1)
        with handle.image_positions(image & later.bool()):
            out = host.model(inputs_embeds=chunk, attention_mask=mask, past_key_values=cache, use_cache=True)
        found.append(out.logits[:, -1:])
        turn = host.batch(PAIR, "left")
        turn.inputs["attention_mask"] = mask
        return torch.cat([*found, _steps(host.model, turn, cache, tokens)], 1), cache.kept()

    with patch(host.model, **ALL[case]) as handle:
        (dynamic, kept), (static, also_kept) = talk(handle, None), talk(handle, _static(host))
    assert close(static, dynamic) and torch.equal(kept, also_kept)


@torch.no_grad()
def test_a_token_that_is_padding_is_not_seen_later(host):
    batch = host.batch(PAIR, "left")
    tokens = torch.tensor([[7, 9], [7, 9]])

    def logits(cache):
        cache, mask, found = _prefill(host, batch, cache), batch.inputs["attention_mask"], []
        for token, valid in zip(tokens.split(1, 1), ([[0], [1]], [[1], [1]]), strict=True):
            mask = torch.cat([mask, torch.tensor(valid)], 1)
            out = host.model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            found.append(out.logits)
        return found[1]

    with patch(host.model, **ALL["lf"]):
        assert close(logits(_static(host)), logits(None))


@torch.no_grad()
def test_beams_are_reordered(host):
    batch = host.batch(PAIR, "left")
    with patch(host.model, **ALL["lf+fastv"]):
        dynamic, static = (_generate(host, batch, num_beams=3, **o) for o in ({}, {"cache_implementation": "static"}))
    assert torch.equal(static.sequences, dynamic.sequences)


@torch.no_grad()
def test_what_a_static_cache_cannot_be(host):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, routing=Routing(split=2)) as handle:
        with pytest.raises(InputError, match="takes 8 positions"):
            _prefill(host, batch, _static(host, 8))
        with torch.enable_grad(), pytest.raises(InputError, match="no_grad"):
            _prefill(host, batch, _static(host))
        host.decoder.config.sliding_window = 32  # the class does not read it, its caches do
        with pytest.raises(InputError, match="sliding window of 32 positions"):
            _prefill(host, batch, _static(host))
        host.decoder.config.sliding_window = None
        cache = _prefill(host, batch, _static(host))
        with torch.enable_grad(), pytest.raises(InputError, match="no_grad"):  # nor may a step have gradients
            host.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert cache.nbytes() < 2 * 6 * LONGEST * 64 * 4  # bytes of a stock one: layers, positions, width, float32
        handle.remove()
        with pytest.raises(InputError, match="not routed"):
            host.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    with patch(host.model, routing=Routing(split=3)), pytest.raises(InputError, match="other routing"):
        host.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
