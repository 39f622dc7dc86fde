"""The KV cache of every variant: what it gives equals recomputing the whole context, however the context came in."""

import itertools

import pytest
import torch

from llava_patch import patch
from llava_patch.core.errors import InputError
from tests.support.models import HF_IMAGE_TOKEN, IMAGE, TOKENS, close, set_attention
from tests.support.routings import ALL, RAGGED, VARIANTS, again, embeddings, extend, places

STEPS = 4
SOME = ["lf", "lf-sparse", "kv", "ideal", "fastv", "kv+fastv", "pc+fastv-deep", "lf+fastv"]


def _random(rows, columns, seed=5):
    return torch.randint(3, 90, (rows, columns), generator=torch.Generator().manual_seed(seed))


def _step(host, tokens, mask, cache):
    extra = {"position_ids": places(mask)[:, -tokens.shape[1] :]} if host.name == "hf" else {}
    return host.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)


def _whole(host, handle, inputs, mask, cache):
    """A plain forward over everything, with the choice that pruning made on the way."""
    extra = {"position_ids": places(mask)} if host.name == "hf" else {}
    with again(handle, cache):
        return host.model(**inputs, use_cache=False, **extra).logits


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ALL)
def test_cached_decode_is_recomputation_under_teacher_forcing(host, case, attention):
    set_attention(host.model, attention)
    batch = host.batch(RAGGED, "left")
    _teacher_force(host, batch, ALL[case])


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)  # llava takes padding out when it recomputes
@pytest.mark.parametrize("case", SOME)
def test_right_padded_generation_is_recomputation_too(host, case):
    _teacher_force(host, host.batch(RAGGED, "right"), ALL[case])


def _teacher_force(host, batch, settings):
    tokens = _random(len(RAGGED), STEPS)
    mask = torch.cat([batch.valid.long(), torch.ones_like(tokens)], 1)
    n = batch.valid.shape[1]
    with patch(host.model, **settings) as handle:
        first = {"position_ids": places(batch.valid)} if host.name == "hf" else {}
        out = host.model(**batch.inputs, use_cache=True, **first)
        seen = [out.logits[:, -1]]
        for step in range(STEPS):
            out = _step(host, tokens[:, step : step + 1], mask[:, : n + step + 1], out.past_key_values)
            seen.append(out.logits[:, -1])
        whole = _whole(host, handle, extend(batch, tokens), mask, out.past_key_values)
    for step, logits in enumerate(seen[1:]):
        assert close(logits, whole[:, n + step]), step
    assert close(seen[0][batch.valid[:, -1]], whole[:, n - 1][batch.valid[:, -1]])


@torch.no_grad()
@pytest.mark.parametrize("options", ["greedy", "beams", "sampling"])
@pytest.mark.parametrize("case", SOME)
def test_generation_with_and_without_cache_agrees(host, case, options):
    """Unequal prompts; beams and several sequences expand and reorder what the cache knows."""
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 9), (1, IMAGE, 2)], "left", seed=4)
    kinds = {
        "greedy": {"do_sample": False},
        "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "output_scores": True},
        "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
    }
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")
    results = []
    with patch(host.model, **ALL[case]):
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(
                host.model.generate(
                    ids,
                    **inputs,
                    use_cache=use_cache,
                    max_new_tokens=5,
                    return_dict_in_generate=True,
                    pad_token_id=0,
                    suppress_tokens=[HF_IMAGE_TOKEN],
                    **kinds[options],
                )
            )
    cached, full = results
    assert torch.equal(cached.sequences, full.sequences)
    if options == "beams":
        assert cached.sequences.shape[0] == 6
        assert torch.allclose(cached.sequences_scores, full.sequences_scores, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", SOME)
def test_generations_may_interleave(host, case):
    first, second = host.batch([(2, IMAGE, 5)], seed=1), host.batch([(4, IMAGE, 2)], seed=2)
    step = torch.tensor([[7]])
    with patch(host.model, **ALL[case]):
        alone = host.model(**first.inputs, use_cache=True).past_key_values
        expected = host.model(input_ids=step, past_key_values=alone, use_cache=True).logits
        a = host.model(**first.inputs, use_cache=True).past_key_values
        b = host.model(**second.inputs, use_cache=True).past_key_values
        host.model(input_ids=step, past_key_values=b, use_cache=True)
        again = host.model(input_ids=step, past_key_values=a, use_cache=True).logits
    assert torch.equal(again, expected)


@torch.no_grad()
@pytest.mark.parametrize("turn", [(3, IMAGE, 4), (IMAGE,), (1, IMAGE)], ids=["between", "alone", "at-the-end"])
@pytest.mark.parametrize("case", ALL)
def test_an_image_in_a_later_turn(host, case, turn):
    """Batch of two; the second turn's image sees the first one, in the decoder and in the side branch."""
    if host.name == "llava" and turn == (IMAGE,):
        pytest.skip("llava takes a turn of one placeholder for a decoding step")
    one, two = [(2, IMAGE, 5), (2, IMAGE, 5)], [turn, turn]
    both = [(*one[0], *turn)] * 2
    first, second, whole = host.batch(one, seed=1), host.batch(two, seed=2), host.batch(both)
    key = "pixel_values" if host.name == "hf" else "images"
    whole.inputs["input_ids"] = torch.cat([first.inputs["input_ids"], second.inputs["input_ids"]], 1)
    pixels = torch.stack([first.inputs[key], second.inputs[key]], 1).flatten(0, 1)
    whole.inputs[key] = pixels
    tokens = _random(2, 2)
    with patch(host.model, **ALL[case]) as handle:
        cache = host.model(**first.inputs, use_cache=True).past_key_values
        mask = (
            whole.valid.long() if host.name == "hf" else second.valid.long()[:, : second.inputs["input_ids"].shape[1]]
        )
        again = {**second.inputs, "attention_mask": mask}
        out = host.model(**again, past_key_values=cache, use_cache=True)
        step = host.model(input_ids=tokens, past_key_values=out.past_key_values, use_cache=True)
        full = _whole(
            host, handle, extend(whole, tokens), torch.ones(2, whole.valid.shape[1] + 2), step.past_key_values
        )
    n = whole.valid.shape[1]
    assert close(out.logits[:, -1], full[:, n - 1])
    assert close(step.logits, full[:, n:])


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False], ids=["before-the-patch", "patched"])
@pytest.mark.parametrize("case", ["lf", "kv", "vtw", "lf+fastv"])
def test_an_image_joins_a_conversation_that_began_with_text(host, case, before):
    """The cache was built by the stock forward, patched or not."""
    first, second, whole = host.batch([(6,)], seed=1), host.batch([(3, IMAGE, 4)], seed=2), host.batch([(9, IMAGE, 4)])
    key = "pixel_values" if host.name == "hf" else "images"
    whole.inputs["input_ids"] = torch.cat([first.inputs["input_ids"], second.inputs["input_ids"]], 1)
    whole.inputs[key] = second.inputs[key]
    if before:
        cache = host.model(**first.inputs, use_cache=True).past_key_values
    with patch(host.model, **ALL[case]) as handle:
        if not before:
            cache = host.model(**first.inputs, use_cache=True).past_key_values
        inputs = {k: v for k, v in second.inputs.items() if k != "attention_mask"}
        out = host.model(**inputs, past_key_values=cache, use_cache=True)
        full = _whole(host, handle, whole.inputs, whole.valid, out.past_key_values)
    assert close(out.logits[:, -1], full[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,), (10,), (10, 12), (18,), (5, 11, 20)], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_chunked_prefill_is_the_whole_prefill(host, case, cuts):
    """Chunks of embeddings, cut anywhere: in the text, inside an image, after it."""
    samples = [(2, IMAGE, 5), (4, IMAGE, 3)]
    batch = host.batch(samples, "left")
    embeds = embeddings(host, batch)
    edges = [0, *cuts, embeds.shape[1]]
    step = _random(2, 1)
    with patch(host.model, **ALL[case]) as handle:
        cache = None
        for start, stop in itertools.pairwise(edges):
            with handle.image_positions(batch.image[:, start:stop]):
                out = host.model(inputs_embeds=embeds[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        after = host.model(input_ids=step, past_key_values=cache, use_cache=True).logits
        full = _whole(host, handle, extend(batch, step), torch.ones(2, embeds.shape[1] + 1), cache)
    assert close(out.logits[:, -1], full[:, -2])
    assert close(after[:, -1], full[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)  # llava generates from embeddings, which the host cannot chunk
@pytest.mark.parametrize("case", [case for case in SOME if "fastv" not in case])  # there the image's chunk chooses
def test_generate_with_a_chunk_size(host, case):
    batch = host.batch([(2, IMAGE, 9)])
    inputs = dict(batch.inputs)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [HF_IMAGE_TOKEN]}
    with patch(host.model, **ALL[case]):
        whole = host.model.generate(**inputs, **options)
        if hasattr(host.model, "_supports_mm_encoder_outputs"):  # where chunks are of images encoded before
            with pytest.raises(ValueError, match="pass `prefill_chunk_size=None`"):
                host.model.generate(**inputs, **options, prefill_chunk_size=TOKENS + 4)
            return
        chunked = host.model.generate(**inputs, **options, prefill_chunk_size=TOKENS + 4)
    assert torch.equal(whole, chunked)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)  # llava generates from embeddings, where a lookup finds nothing
@pytest.mark.parametrize("case", SOME)
def test_assisted_decoding_crops_the_cache(host, case):
    batch = host.batch([(2, IMAGE, 9)])
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")
    ids[0, -6:] = torch.tensor([5, 6, 7, 5, 6, 7])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [HF_IMAGE_TOKEN]}
    with patch(host.model, **ALL[case]):
        plain = host.model.generate(ids, **inputs, **options)
        assisted = host.model.generate(ids, **inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, assisted)


@torch.no_grad()
@pytest.mark.parametrize("case", SOME)
def test_a_cropped_cache_goes_on_as_if_nothing_had_been(host, case):
    batch = host.batch([(2, IMAGE, 5), (4, IMAGE, 1)], "left")
    tokens = _random(2, 3)
    with patch(host.model, **ALL[case]):
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        mask = torch.cat([batch.valid.long(), torch.ones(2, 1, dtype=torch.long)], 1)
        expected = _step(host, tokens[:, :1], mask, cache).logits
        longer = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
        _step(host, tokens[:, 1:], longer, cache)
        cache.crop(batch.valid.shape[1])
        assert close(_step(host, tokens[:, :1], mask, cache).logits, expected)
        cache.crop(-1)
        assert close(_step(host, tokens[:, :1], mask, cache).logits, expected)
        with pytest.raises(InputError, match="its last image ends at"):
            cache.crop(5)


@torch.no_grad()
def test_each_kind_of_layer_holds_its_own_positions(host):
    batch = host.batch([(2, IMAGE, 5)])
    n, t = 7 + TOKENS, 7
    half = 7 + TOKENS // 2
    expected = {
        "lf": [n, n, t, t, t, n],
        "lf-sparse": [n, t, n, t, n, t],
        "pc": [n] * 6,
        "kv": [n] * 6,
        "ideal": [n, n, t, t, t, t],
        "vtw": [n, n, t, t, t, t],
        "fastv": [n, n, half, half, half, half],
        "lf+fastv": [n, 11, 11, t, t, 11],
        "kv+fastv-deep": [n, n, n, n, half, half],
    }
    for case, lengths in expected.items():
        with patch(host.model, **ALL[case]):
            cache = host.model(**batch.inputs, use_cache=True).past_key_values
        assert [cache.get_seq_length(i) for i in range(6)] == lengths, case
        assert cache.get_seq_length() == n
        side = 0 if case in ("vtw", "fastv") else (4 if case == "lf+fastv" else TOKENS) * (64 * 4 + 8)
        assert cache.nbytes() == sum(lengths) * 2 * 64 * 4 + side, case


@torch.no_grad()
@pytest.mark.parametrize("case", VARIANTS)
def test_a_routed_cache_is_empty_of_the_model(host, case):
    """Two models share nothing through it: a cache made by one patch goes on under another patch of the same kind."""
    batch = host.batch([(2, IMAGE, 5)])
    step = torch.tensor([[7]])
    with patch(host.model, **VARIANTS[case]):
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        expected = host.model(input_ids=step, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
    with patch(host.model, **VARIANTS[case]):
        assert torch.equal(host.model(input_ids=step, past_key_values=cache, use_cache=True).logits, expected)
