import math

import pytest
import torch

from llava_patch.hosts.anatomy import find
from llava_patch.probe.evaluate import evaluate
from llava_patch.probe.sample import Sample
from llava_patch.probe.settings import RProbe
from llava_patch.probe.store import freeze_samples, make_transform

from .tiny import Characters, processor, samples, tiny_model


class Offset(torch.nn.Module):
    """Answers with the true pixels plus a known error for each sample."""

    def __init__(self, data, errors):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        added = torch.tensor(errors).repeat_interleave(data.counts)[:, None]
        self.answers = (data.pixels + added).split(data.counts.tolist())
        self.at = 0

    def forward(self, image_tokens, text_tokens, sequence, injections=None):
        self.at += len(image_tokens)
        return torch.cat(self.answers[self.at - len(image_tokens) : self.at])


@pytest.fixture(scope="module")
def frozen():
    anatomy = find(tiny_model())
    transform = make_transform(anatomy, processor(), "resize")
    page = samples(1)[0].image
    data = [Sample(page, f"t{i}", ((0, 0, 14 * (i + 1), 14),), id=f"s{i}", document="page") for i in range(3)]
    return freeze_samples(anatomy, transform, Characters(), data, RProbe()), transform


def test_figures_of_a_probe_whose_error_is_known(frozen):
    data, transform = frozen
    constant = torch.zeros(588)
    found = evaluate(Offset(data, [0.0, 0.1, 0.3]), data, constant, transform, RProbe(batch_size=2))
    assert [d["tokens"] for d in found.documents] == [1, 2, 3]
    assert [d["mse"] for d in found.documents] == pytest.approx([0.0, 0.01, 0.09], abs=1e-6)
    assert found.mse == pytest.approx((2 * 0.01 + 3 * 0.09) / 6, rel=1e-4)  # over tokens, not over samples
    assert found.constant_mse == pytest.approx(float(data.pixels.square().mean()))
    assert found.variance == pytest.approx(float(data.pixels.var(0, correction=0).mean()))
    assert [(d["id"], d["document"], d["text"]) for d in found.documents][1] == ("s1", "page", "t1")


def test_psnr_is_on_denormalised_clipped_pixels(frozen):
    data, transform = frozen
    found = evaluate(Offset(data, [0.0, 0.05, 100.0]), data, torch.zeros(588), transform, RProbe())
    psnr = [d["psnr"] for d in found.documents]
    assert psnr[0] == pytest.approx(100)
    _, std = transform.statistics()
    assert psnr[1] == pytest.approx(-10 * math.log10(float((0.05 * std).square().mean())), abs=0.2)
    # However wrong the answer, a clipped pixel is off by less than 1: uniform noise against white is at 1/3.
    assert psnr[2] == pytest.approx(-10 * math.log10(1 / 3), abs=0.5)


def test_examples_show_the_pixels_that_were_rebuilt(frozen):
    data, transform = frozen
    found = evaluate(Offset(data, [0.0, 0.0, 100.0]), data, torch.zeros(588), transform, RProbe(examples=2))
    first, last = found.examples
    assert (first.id, last.id) == ("s0", "s2")
    assert (first.original == first.rebuilt).all()
    assert (last.rebuilt[last.target] == 255).all()
    assert (last.rebuilt[~last.target] == last.original[~last.target]).all()
    assert last.target.nonzero()[0].max() == 13
    assert last.target.nonzero()[1].max() == 41
    assert last.boxes[0] == pytest.approx((0, 0, 42, 14))
    assert evaluate(Offset(data, [0.0] * 3), data, torch.zeros(588), transform, RProbe(examples=0)).examples == []
