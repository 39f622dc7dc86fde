import types

import pytest
import torch

from llava_patch.core.errors import HostError
from llava_patch.hosts.anatomy import find
from llava_patch.probe.decoder import ProbeDecoder, quarter
from llava_patch.probe.sequence import TokenGrid
from tests.support.probes import HIDDEN, random_batch, tiny_model

GRID = TokenGrid(4, 4, 2)


def targets(*rows: list[int]) -> torch.Tensor:
    mask = torch.zeros(len(rows), GRID.tokens, dtype=torch.bool)
    for i, tokens in enumerate(rows):
        mask[i, tokens] = True
    return mask


def run(decoder: ProbeDecoder, batch) -> torch.Tensor:
    with torch.no_grad():
        return decoder(batch.image_tokens, batch.text_tokens, batch.sequence)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=8)


@pytest.fixture(params=["attention", "embedding"])
def decoder(model, request):
    return ProbeDecoder(find(model), GRID, rope=request.param)


def test_first_quarter_rounded_up():
    assert [quarter(n) for n in (4, 5, 8, 9, 32, 40)] == [1, 2, 2, 3, 8, 10]
    with pytest.raises(HostError, match="at least 4 decoder layers, this one has 3"):
        ProbeDecoder(find(tiny_model(layers=3)), GRID)


def test_copies_start_equal_and_share_nothing(model, decoder):
    anatomy = find(model)
    assert len(decoder.layers) == 2
    for copied, own in zip([*decoder.layers, decoder.norm], [*anatomy.layers[:2], anatomy.norm], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), own.parameters(), strict=True))
    mine = {p.untyped_storage().data_ptr() for p in (*decoder.parameters(), *decoder.buffers())}
    assert not mine & {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert all(p.requires_grad for p in decoder.parameters())


def test_later_target_never_changes_an_earlier_output(decoder):
    batch = random_batch(GRID, targets([1, 4, 6, 7, 12]), [3])
    before = run(decoder, batch)
    for place, token in enumerate([1, 4, 6, 7, 12]):
        batch.image_tokens[0, token] += 1.0
        after = run(decoder, batch)
        batch.image_tokens[0, token] -= 1.0
        torch.testing.assert_close(after[:place], before[:place], atol=1e-5, rtol=0)
        assert (after[place:] - before[place:]).abs().amax(1).min() > 1e-4  # itself and every later one do change


def test_target_sees_all_context_and_all_text(decoder):
    batch = random_batch(GRID, targets([0, 1]), [3])  # the first tokens in raster order: all context is "later"
    before = run(decoder, batch)
    for tokens, index in [(batch.image_tokens, 15), (batch.image_tokens, 2), (batch.text_tokens, 0)]:
        tokens[0, index] += 1.0
        assert (run(decoder, batch) - before).abs().amax(1).min() > 1e-4
        tokens[0, index] -= 1.0


def test_padding_changes_nothing(decoder):
    mask = targets([1, 4, 6], [0, 2, 3, 5, 8, 9])
    batch = random_batch(GRID, mask, [2, 5])
    together = run(decoder, batch)
    for i, text in enumerate([2, 5]):
        alone = random_batch(GRID, mask[i : i + 1], [text])
        alone.image_tokens.copy_(batch.image_tokens[i : i + 1])
        alone.text_tokens.copy_(batch.text_tokens[i : i + 1, :text])
        rows = slice(0, 3) if i == 0 else slice(3, 9)
        torch.testing.assert_close(run(decoder, alone), together[rows], atol=1e-5, rtol=1e-5)


def test_attention_form_depends_on_distances_only(model):
    """Moving the whole image by one place changes nothing when there is no text to measure against."""
    decoder = ProbeDecoder(find(model), GRID)
    batch = random_batch(GRID, targets([5, 6]), [0])
    before = run(decoder, batch)
    batch.sequence.positions.add_(torch.tensor([7, 2]))
    torch.testing.assert_close(run(decoder, batch), before, atol=1e-4, rtol=1e-4)
    batch.sequence.positions[..., 0].mul_(2)
    assert (run(decoder, batch) - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_whatever_the_model_and_the_default_are(dtype):
    torch.set_default_dtype(torch.float16)
    try:
        decoder = ProbeDecoder(find(tiny_model(dtype=dtype)), GRID)
        assert {t.dtype for t in (*decoder.parameters(), *decoder.buffers())} == {torch.float32}
        out = run(decoder, random_batch_float32())
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32
    assert out.shape == (3, GRID.pixels)


def random_batch_float32():
    batch = random_batch(GRID, targets([1, 4, 6]), [2])
    batch.image_tokens.data = batch.image_tokens.float()
    batch.text_tokens.data = batch.text_tokens.float()
    return batch


class HoldsTheModel:
    """Stands for what a patch or a dispatcher leaves on a layer: following it would copy the whole model."""

    def __deepcopy__(self, memo):
        raise AssertionError("the copy followed what was put on the layer")


def test_what_a_patch_put_on_the_layers_stays_behind():
    model = tiny_model()
    layer = find(model).layers[0]
    batch = random_batch(GRID, targets([3, 4]), [2])
    expected = run(ProbeDecoder(find(model), GRID), batch)

    def refuse(self, *args, **kwargs):
        raise AssertionError("the probe ran a patched forward")

    layer.forward = types.MethodType(refuse, layer)
    layer.mlp.forward = lambda x: refuse(None)
    layer._hf_hook = HoldsTheModel()
    layer.register_forward_hook(refuse)
    layer.self_attn.register_forward_pre_hook(refuse)
    decoder = ProbeDecoder(find(model), GRID)
    assert torch.equal(run(decoder, batch), expected)
    assert "forward" in vars(layer)
    assert len(layer._forward_hooks) == 1  # the model keeps its own
    assert not decoder.layers[0]._forward_hooks


def test_head_comes_from_the_seed_and_leaves_the_callers_random_state():
    anatomy = find(tiny_model())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b, other = (ProbeDecoder(anatomy, GRID, seed=s).head[0].weight for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert a.shape == (2 * HIDDEN, HIDDEN)


def test_quantised_or_offloaded_weights_are_refused():
    model = tiny_model()
    find(model).layers[0].mlp.to("meta")
    with pytest.raises(HostError, match=r"decoder layer 0, but its mlp\.gate_proj\.weight is not in memory"):
        ProbeDecoder(find(model), GRID)
    model = tiny_model()
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    find(model).layers[0].mlp.up_proj.weight = weight
    with pytest.raises(HostError, match="quantised"):
        ProbeDecoder(find(model), GRID)
