"""flash_attention_2 without its kernel: a plain version of its two functions shows that it is called rightly.

Everything around the kernel is the real code of transformers: masks, unpadding, packing detection, window.
"""

import pytest
import torch

from llava_patch import patch
from tests.support.models import IMAGE, LAYERS, close
from tests.support.routings import ALL, RAGGED, again, embeddings, extend, places

flash = pytest.importorskip("transformers.modeling_flash_attention_utils", reason="flash attention is in each class")


def plain_attention(q, k, v, causal=False, softmax_scale=None, dropout_p=0.0, window_size=(-1, -1)):
    """[batch, queries, heads, d] and [batch, keys, kv_heads, d]; the causal triangle ends at the lower right."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    rows = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    columns = torch.arange(k.shape[1])[None]
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    if causal:
        hidden |= columns > rows
    if window_size[0] >= 0:
        hidden |= columns < rows - window_size[0]
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(), v)


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert q.shape[1] <= k.shape[1]
        seen.append("dense")
        return plain_attention(q, k, v, causal, softmax_scale, dropout_p, window_size)

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        seen.append("varlen")
        assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        out = torch.empty_like(q)
        for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
            part = plain_attention(q[None, a:b], k[None, c:d], v[None, c:d], causal, softmax_scale, 0, window_size)
            out[a:b] = part[0]
        return out

    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2", raising=False)
    monkeypatch.setattr(flash, "_flash_fn", func)
    monkeypatch.setattr(flash, "_flash_varlen_fn", varlen)
    monkeypatch.setattr(flash, "_pad_fn", flash._pad_input)
    monkeypatch.setattr(flash, "_unpad_fn", flash._unpad_input)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", flash._lazy_define_process_function(varlen))
    return seen


def _use(host, backend):
    host.decoder.config._attn_implementation = backend


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("case", ALL)
def test_flash_equals_eager(host, case, padding, calls):
    batch = host.batch(RAGGED, padding)
    with patch(host.model, **ALL[case]):
        _use(host, "eager")
        eager = host.logits(batch)
        assert not calls
        _use(host, "flash_attention_2")
        assert close(host.logits(batch)[batch.valid], eager[batch.valid])
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("case", ["lf", "kv"])
def test_flash_runs_wherever_it_can(host, case, calls):
    """In the KV variant text asks among keys that are not all before it, which flash attention cannot say."""
    batch = host.batch([(2, IMAGE, 5)])
    _use(host, "flash_attention_2")
    with patch(host.model, **ALL[case]):
        host.logits(batch)
    assert len(calls) == (LAYERS + 1 if case == "lf" else 2 + 1)  # with the side branch


@torch.no_grad()
@pytest.mark.parametrize("case", ALL)
def test_flash_decode_is_recomputation(host, case, calls):
    _use(host, "flash_attention_2")
    batch = host.batch(RAGGED, "left")
    tokens = torch.randint(3, 90, (len(RAGGED), 3), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([batch.valid.long(), torch.ones_like(tokens)], 1)
    n = batch.valid.shape[1]

    def ids(mask, last=None):
        return {"position_ids": places(mask)[:, -(last or 0) :]} if host.name == "hf" else {}

    with patch(host.model, **ALL[case]) as handle:
        out = host.model(**batch.inputs, use_cache=True, **ids(batch.valid))
        one = host.model(
            input_ids=tokens[:, :1], attention_mask=mask[:, : n + 1], past_key_values=out.past_key_values,
            use_cache=True, **ids(mask[:, : n + 1], 1),
        )  # fmt: skip
        two = host.model(
            input_ids=tokens[:, 1:], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True,
            **ids(mask, 2),
        )  # fmt: skip
        with again(handle, out.past_key_values):
            whole = host.model(**extend(batch, tokens), use_cache=False, **ids(mask)).logits
    assert close(one.logits[:, -1], whole[:, n])
    assert close(two.logits, whole[:, n + 1 :])


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize("case", ["lf", "lf-k2", "lf-sparse", "pc", "kv", "vtw", "fastv", "lf+fastv"])
def test_flash_on_the_last_positions_alone(host, case, keep, calls):
    _use(host, "flash_attention_2")
    batch = host.batch(RAGGED, "left")
    with patch(host.model, **ALL[case]):
        whole = host.logits(batch, use_cache=False)[:, -keep:]
        assert close(host.logits(batch, logits_to_keep=keep), whole)


@torch.no_grad()
@pytest.mark.parametrize("case", ["lf", "kv", "ideal", "lf+fastv"])
def test_flash_in_chunks(host, case, calls):
    _use(host, "flash_attention_2")
    batch = host.batch([(2, IMAGE, 5), (4, IMAGE, 3)], "left")
    embeds = embeddings(host, batch)
    with patch(host.model, **ALL[case]) as handle:
        cache = None
        for part in (slice(0, 10), slice(10, None)):
            with handle.image_positions(batch.image[:, part]):
                out = host.model(inputs_embeds=embeds[:, part], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        with again(handle, cache):
            whole = host.logits(batch, use_cache=False)
    assert close(out.logits[:, -1], whole[:, -1])
