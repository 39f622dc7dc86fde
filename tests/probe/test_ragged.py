"""Batches of images with different numbers of tokens, and DeepStack's features in the probe's layers."""

import warnings

import pytest
import torch

from llava_patch import DeepStack, patch
from llava_patch.core.errors import InputError
from llava_patch.hosts.anatomy import find
from llava_patch.hosts.compat import call_layer, causal_mask
from llava_patch.hosts.projections import rotate
from llava_patch.probe.decoder import ProbeDecoder, injection_layers
from llava_patch.probe.sequence import TokenGrid, arrange, build_sequence, rotary_1d, rotary_2d
from tests.support.probes import HIDDEN, tiny_model

GRID = TokenGrid(4, 4, 2)  # the pixel head's; positions are each sample's own
COUNTS = [9, 20, 14]
TEXTS = [4, 1, 3]
STARTS = [3, 8, 5]


class Ragged:
    """Three samples with random tokens, places and targets, together or one alone."""

    def __init__(self, layers: int = 0) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        self.tokens = [random(n, HIDDEN) for n in COUNTS]
        self.text = [random(n, HIDDEN) for n in TEXTS]
        self.places = [3 * random(n, 2).abs() for n in COUNTS]
        self.target = [torch.rand(n, generator=generator) < 0.4 for n in COUNTS]
        self.injections = [random(layers, n, HIDDEN) for n in COUNTS]
        self.layers = layers

    def run(self, decoder, *samples: int, width: int = 0, fill: float = 0.0) -> torch.Tensor:
        """What a probe answers for these samples, padded to at least `width` tokens and filled with `fill`."""

        def padded(rows, length):
            return torch.stack([torch.nn.functional.pad(r, (0, 0, 0, length - r.shape[-2]), value=fill) for r in rows])

        width = max(width, *(COUNTS[i] for i in samples))
        valid = torch.stack([torch.arange(width) < COUNTS[i] for i in samples])
        target = torch.zeros_like(valid)
        target[valid] = torch.cat([self.target[i] for i in samples])
        sequence = build_sequence(
            target,
            valid,
            padded([self.places[i] for i in samples], width),
            torch.tensor([TEXTS[i] for i in samples]),
            torch.tensor([STARTS[i] for i in samples]),
        )
        text = padded([self.text[i] for i in samples], max(TEXTS[i] for i in samples))
        injections = padded([self.injections[i] for i in samples], width) if self.layers else None
        with torch.no_grad():
            return decoder(padded([self.tokens[i] for i in samples], width), text, sequence, injections)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=8)


@pytest.fixture(params=["attention", "embedding"])
def rope(request):
    return request.param


@pytest.fixture(params=[0, 2], ids=["stock", "stack"])
def decoder(request, rope):
    model = tiny_model(layers=8)
    if request.param:
        patch(model, fusion=DeepStack(taps=(1, 2), start=0, interval=1))
    return ProbeDecoder(find(model), GRID, rope=rope)


def test_order_of_a_ragged_batch():
    target = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    places = torch.tensor([[[0.0, 0.5], [1, 0], [1, 1], [2, 2]], [[0.25, 0.0], [0, 1], [9, 9], [9, 9]]])
    sequence = build_sequence(target, valid, places, torch.tensor([1, 2]), torch.tensor([3, 2]))
    assert sequence.order.tolist() == [[0, 2, 3, 4, 1, 5], [1, 4, 5, 0, 2, 3]]
    assert sequence.valid.tolist() == [[True] * 5 + [False], [True] * 4 + [False] * 2]
    assert sequence.target.nonzero().tolist() == [[0, 4], [1, 3]]
    assert sequence.positions.dtype == torch.float32
    assert sequence.positions[0].tolist()[:5] == [[0, 0.5], [1, 1], [2, 2], [3, 3], [1, 0]]
    assert sequence.positions[1].tolist()[:4] == [[0, 1], [2, 2], [3, 3], [0.25, 0]]


def test_a_sample_alone_and_in_a_batch_answer_alike(decoder):
    data = Ragged(len(decoder.injection_layers))
    together = data.run(decoder, 0, 1, 2).split([int(t.sum()) for t in data.target])
    for i, answer in enumerate(together):
        # Other shapes of the same matrix products sum in another order.
        torch.testing.assert_close(data.run(decoder, i), answer, atol=1e-5, rtol=1e-5)


def test_padding_is_never_read(decoder):
    """Whatever stands there, bit for bit."""
    data = Ragged(len(decoder.injection_layers))
    expected = data.run(decoder, 0, 1, 2, width=24)
    assert torch.equal(data.run(decoder, 0, 1, 2, width=24, fill=7.0), expected)
    data.tokens[0][data.target[0].logical_not().nonzero()[-1]] = 7.0  # the last token of the context is read
    assert not torch.equal(data.run(decoder, 0, 1, 2, width=24), expected)


def test_a_later_target_never_changes_an_earlier_output(decoder):
    data = Ragged(len(decoder.injection_layers))
    before = data.run(decoder, 0, 1, 2)
    ends = torch.tensor([int(t.sum()) for t in data.target]).cumsum(0).tolist()
    for sample in range(3):
        start = ends[sample] - int(data.target[sample].sum())
        for place, token in enumerate(data.target[sample].nonzero().flatten().tolist()):
            changes = [data.tokens[sample][token], *data.injections[sample][:, token]]
            for change in changes:
                change += 1.0
                after = data.run(decoder, 0, 1, 2)
                change -= 1.0
                at = start + place
                assert torch.equal(after[:at], before[:at])
                assert torch.equal(after[ends[sample] :], before[ends[sample] :])
                assert (after[at : ends[sample]] - before[at : ends[sample]]).abs().amax(1).min() > 1e-5
            before = data.run(decoder, 0, 1, 2)  # adding and taking away leaves a rounding error


def test_scores_depend_on_distances_only(model):
    """Moving image and text by a fraction of a place changes nothing; stretching one axis does."""
    decoder = ProbeDecoder(find(model), GRID)
    data = Ragged()
    expected = data.run(decoder, 1)
    moved = torch.tensor([7.25, 7.25])
    data.places[1] += moved
    STARTS[1] += 7
    try:
        whole = data.run(decoder, 1)
        data.places[1] -= 0.25
        torch.testing.assert_close(data.run(decoder, 1), expected, atol=1e-4, rtol=1e-4)
        assert (whole - expected).abs().max() > 1e-4
        data.places[1][:, 0] *= 2
        assert (data.run(decoder, 1) - expected).abs().max() > 1e-3
    finally:
        STARTS[1] -= 7


def test_injections_enter_their_layers_at_their_tokens(rope):
    """Against the layers called one by one, with features added slot by slot."""
    model = tiny_model(layers=8)
    patch(model, fusion=DeepStack(taps=(1, 2), start=0, interval=1))
    anatomy = find(model)
    decoder = ProbeDecoder(anatomy, GRID, rope=rope)
    assert decoder.injection_layers == injection_layers(anatomy) == (0, 1)
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(1, 5, HIDDEN, generator=generator), torch.randn(1, 2, HIDDEN, generator=generator)
    injections = torch.randn(1, 2, 5, HIDDEN, generator=generator)
    target = torch.tensor([[False, True, True, False, False]])
    places = torch.tensor([[[0.0, 0], [0, 1], [0, 2], [1, 0], [1, 0.5]]])
    sequence = build_sequence(target, torch.ones_like(target), places, torch.tensor([2]), torch.tensor([3]))
    with torch.no_grad():
        if rope == "embedding":
            turn = rotary_2d(places, decoder.embedding_freq)
            rotary = rotary_1d(7, decoder.inv_freq)
            image_states, added = rotate(image, *turn), [rotate(injections[:, k], *turn) for k in (0, 1)]
        else:
            rotary = rotary_2d(sequence.positions, decoder.inv_freq)
            image_states, added = image, [injections[:, k] for k in (0, 1)]
        hidden = arrange(image_states, text, sequence.order)
        mask = causal_mask(decoder.config, hidden)
        for layer, features in zip(decoder.layers, added, strict=True):
            for slot, token in enumerate(sequence.order[0].tolist()):
                if token < 5:
                    hidden[0, slot] += features[0, token]
            hidden = call_layer(layer, hidden, attention_mask=mask, position_embeddings=rotary)
        expected = decoder.norm(hidden)
        found = decoder.hidden_states(image, text, sequence, injections)
        assert torch.equal(found, expected)
        zero = decoder.hidden_states(image, text, sequence, torch.zeros_like(injections))
        assert (found - zero).abs().max() > 1e-2
        for wrong in (None, injections[:, :1]):
            with pytest.raises(InputError, match=r"features for layers \[0, 1\], got those of [01] layers"):
                decoder(image, text, sequence, wrong)


def test_layers_out_of_reach_are_named_once():
    model = tiny_model(layers=8)
    for stack, message in [
        (DeepStack(taps=(1, 2), start=2, interval=3), "sees none of .* out of reach is what enters layer 2, 5"),
        (DeepStack(taps=(1, 2), start=1, interval=3), "sees only some of .* what enters layer 4"),
    ]:
        with patch(model, fusion=stack), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            decoder = ProbeDecoder(find(model), GRID)
        assert decoder.injection_layers == ((1,) if stack.start == 1 else ())
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match=message):
            warnings.warn_explicit(caught[0].message, UserWarning, "x", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProbeDecoder(find(model), GRID)


def test_a_sliding_window_that_hides_context_is_refused(model):
    decoder = ProbeDecoder(find(model), GRID)
    decoder.config.sliding_window = 24
    assert len(Ragged().run(decoder, 1))  # 21 slots
    decoder.config.sliding_window = 20
    with pytest.raises(InputError, match=r"attends 20 positions back \(sliding_window\), an image and its text are 21"):
        Ragged().run(decoder, 1)
