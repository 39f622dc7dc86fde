import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llava_patch.core.errors import InputError
from llava_patch.hosts.projections import rotate
from llava_patch.probe.sequence import frequencies, rotary_1d, rotary_2d

HEAD = 16


def scores(query_at: tuple[float, float], key_at: tuple[float, float], dtype=torch.float64) -> torch.Tensor:
    """Attention scores of 8 fixed random query-key pairs, rotated by transformers' own function."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, 1, HEAD, generator=generator, dtype=dtype)
    rotated = []
    for x, position in ((q, query_at), (k, key_at)):
        cos, sin = rotary_2d(torch.tensor([[position]]), frequencies(HEAD))
        rotated.append(apply_rotary_pos_emb(x, x, cos.to(dtype), sin.to(dtype))[0])
    return (rotated[0] * rotated[1]).sum(-1).flatten()


def test_scores_depend_on_differences_only():
    for shift_row, shift_column in ((5, 0), (0, 7), (11, 3), (2.375, 0.5)):
        for query, key in (((9, 4), (2, 6)), ((9.25, 4), (2.5, 6.625))):  # an overview's tokens sit between the others
            moved = scores((query[0] + shift_row, query[1] + shift_column), (key[0] + shift_row, key[1] + shift_column))
            torch.testing.assert_close(moved, scores(query, key), atol=1e-5, rtol=0)
    assert (scores((9.25, 4), (2.5, 6.625)) - scores((9, 4), (2, 6))).abs().min() > 1e-4


def test_scores_depend_on_row_and_on_column():
    base = scores((9, 4), (2, 6))
    assert (scores((10, 4), (2, 6)) - base).abs().min() > 1e-4
    assert (scores((9, 5), (2, 6)) - base).abs().min() > 1e-4
    assert (scores((10, 3), (2, 6)) - base).abs().min() > 1e-4


def test_each_axis_turns_one_half_of_the_head_dimension():
    still = rotary_2d(torch.tensor([[0, 0]]), frequencies(HEAD))[0]
    by_row = rotary_2d(torch.tensor([[3, 0]]), frequencies(HEAD))[0] != still
    by_column = rotary_2d(torch.tensor([[0, 3]]), frequencies(HEAD))[0] != still
    assert by_row.sum() == by_column.sum() == HEAD // 2
    assert not (by_row & by_column).any()
    assert torch.equal(by_row[0, : HEAD // 2], by_row[0, HEAD // 2 :])  # both dimensions of every pair


def test_even_pairs_turn_by_the_row_and_odd_ones_by_the_column():
    """Pair i has the model's own frequency i; row 3 and column 5 are not to be mistaken for one another."""
    inv_freq = frequencies(HEAD)
    cos, sin = rotary_2d(torch.tensor([[3, 5]]), inv_freq)
    angles = torch.tensor([place * inv_freq[pair] for pair, place in enumerate([3, 5] * (HEAD // 4))]).repeat(2)
    assert torch.equal(cos[0], angles.cos()) and torch.equal(sin[0], angles.sin())


def test_each_axis_has_fast_and_slow_pairs():
    inv_freq = frequencies(HEAD)
    for position in ([1, 0], [0, 1]):
        cos = rotary_2d(torch.tensor([position]), inv_freq)[0][0, : HEAD // 2]
        turned = torch.acos(cos.double())[cos != 1]
        assert turned.max() / turned.min() > 0.3 * inv_freq.max() / inv_freq.min() / (inv_freq[0] / inv_freq[1])


def test_text_is_rotated_as_the_model_itself_does():
    config = LlamaConfig(hidden_size=4 * HEAD, num_attention_heads=4, rope_theta=5000.0)
    host = LlamaRotaryEmbedding(config)
    cos, sin = host(torch.zeros(1, 6, 1), torch.arange(6)[None])
    torch.testing.assert_close(rotary_1d(6, host.inv_freq), (cos, sin))


def test_rotate_agrees_with_transformers():
    x = torch.randn(2, 5, HEAD)
    cos, sin = rotary_2d(torch.randint(0, 9, (2, 5, 2)), frequencies(HEAD))
    torch.testing.assert_close(rotate(x, cos, sin), apply_rotary_pos_emb(x[:, None], x[:, None], cos, sin)[0][:, 0])


def test_dimension_that_cannot_be_shared_out():
    with pytest.raises(InputError, match="multiple of 4, got 6"):
        rotary_2d(torch.zeros(1, 1, 2, dtype=torch.int64), frequencies(6))
