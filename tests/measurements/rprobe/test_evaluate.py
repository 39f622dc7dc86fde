import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.evaluate import evaluate, spread_over_ranks
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.freeze import Encoder, freeze_samples
from llava_patch.probe.sample import Sample
from llava_patch.probe.view import make_transform
from tests.support.probes import Characters, processor, samples, targets_of, tiny_model


class Offset(torch.nn.Module):
    """Answers with the true pixels plus a known error for each sample, told apart by their number of targets."""

    def __init__(self, data, errors):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        true = targets_of(data).split(data.counts.tolist())
        self.answers = {len(pixels): pixels + error for pixels, error in zip(true, errors, strict=True)}

    def forward(self, image_tokens, text_tokens, sequence, injections=None):
        return torch.cat([self.answers[int(targets.sum())] for targets in sequence.target])


def figures(*args):
    return SimpleNamespace(**evaluate(*args))


@pytest.fixture(scope="module")
def frozen():
    anatomy = find(tiny_model())
    transform = make_transform(anatomy, processor(), "resize")
    page = samples(1)[0].image
    data = [Sample(page, f"t{i}", ((0, 0, 14 * (i + 1), 14),), id=f"s{i}", document="page") for i in range(3)]
    return freeze_samples(Encoder(anatomy, transform, Characters()), data, RProbe()), transform


def test_figures_of_a_probe_whose_error_is_known(frozen):
    data, transform = frozen
    constant = torch.zeros(588)
    found = figures(Offset(data, [0.0, 0.1, 0.3]), data, constant, transform, RProbe(batch_size=2))
    assert [d["tokens"] for d in found.documents] == [1, 2, 3]
    assert [d["mse"] for d in found.documents] == pytest.approx([0.0, 0.01, 0.09], abs=1e-6)
    assert found.mse == pytest.approx((2 * 0.01 + 3 * 0.09) / 6, rel=1e-4)  # over tokens, not over samples
    assert found.constant_mse == pytest.approx(float(targets_of(data).square().mean()))
    assert found.target_variance == pytest.approx(float(targets_of(data).var(0, correction=0).mean()))
    assert [(d["id"], d["document"], d["text"]) for d in found.documents][1] == ("s1", "page", "t1")


def test_psnr_is_on_denormalised_clipped_pixels(frozen):
    data, transform = frozen
    found = figures(Offset(data, [0.0, 0.05, 100.0]), data, torch.zeros(588), transform, RProbe())
    psnr = [d["psnr"] for d in found.documents]
    assert psnr[0] == pytest.approx(100)
    _, std = transform.statistics()
    assert psnr[1] == pytest.approx(-10 * math.log10(float((0.05 * std).square().mean())), abs=0.2)
    # However wrong the answer, a clipped pixel is off by less than 1: uniform noise against white is at 1/3.
    assert psnr[2] == pytest.approx(-10 * math.log10(1 / 3), abs=0.5)


def test_figures_do_not_depend_on_the_batches(frozen):
    data, transform = frozen
    probe = Offset(data, [0.0, 0.1, 0.3])
    one, all_ = (figures(probe, data, torch.zeros(588), transform, RProbe(batch_size=n)) for n in (1, 3))
    # Sums of a sample are taken inside a batch, sums over samples afterwards: only the order of additions can differ.
    assert one.mse == pytest.approx(all_.mse, rel=1e-12)
    assert one.documents == all_.documents
    assert (one.mse_interval, one.inside, one.outside) == (all_.mse_interval, all_.inside, all_.outside)


def test_error_inside_and_outside_text_is_counted_by_hand():
    page = samples(1)[0].image
    # Ten columns of the first cell are text; the error is 2 there and 1 beside it.
    anatomy = find(tiny_model())
    transform = make_transform(anatomy, processor(), "resize")
    data = [
        Sample(page, "t", ((0, 0, 10, 14),), id="a", document="a"),
        Sample(page, "t", ((0, 0, 10, 14), (14, 0, 20, 14)), id="b", document="b"),
    ]
    data = freeze_samples(Encoder(anatomy, transform, Characters()), data, RProbe(store=False))
    true = targets_of(data)
    inside = torch.zeros(3, 14, 14, dtype=torch.bool)
    inside[:2, :, :10] = True
    inside[2, :, :6] = True
    flat = inside.flatten(1)[..., None].expand(-1, -1, 3).flatten(1)

    class Known(Offset):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.anchor = torch.nn.Parameter(torch.zeros(1))
            answers = true + torch.where(flat, 2.0, 1.0)
            self.answers = {1: answers[:1], 2: answers[1:]}

    found = figures(Known(), data, true.mean(0), transform, RProbe(examples=0))
    assert (found.inside.mse, found.outside.mse) == (pytest.approx(4.0), pytest.approx(1.0))
    assert found.inside.share == pytest.approx((10 + 10 + 6) / (3 * 14))
    for part, chosen_ in ((found.inside, inside), (found.outside, ~inside)):
        values = true.unflatten(1, (14, 14, 3))[chosen_].double()
        assert part.variance == pytest.approx(float(values.var(0, correction=0).mean()))
        assert part.fvu == pytest.approx(part.mse / part.variance)
    # Each part weighs by its share of the pixels.
    assert found.mse == pytest.approx(4 * found.inside.share + found.outside.mse * (1 - found.inside.share))
    first, second = found.documents
    assert (first["inside_pixels"], first["outside_pixels"]) == (140, 56)
    assert (second["inside_pixels"], second["outside_pixels"]) == (224, 168)
    assert first["inside_mse"] == pytest.approx(4.0)
    spread = sum(d["variance"] * d["tokens"] for d in found.documents) / 3
    assert spread == pytest.approx(found.target_variance)
    assert found.target_variance == pytest.approx(float(true.double().var(0, correction=0).mean()))


def test_intervals_stand_around_their_values_and_need_two_documents(frozen):
    data, transform = frozen
    found = figures(Offset(data, [0.0, 0.1, 0.3]), data, torch.zeros(588), transform, RProbe())
    assert (found.mse_interval, found.fvu_interval) == (None, None)  # one page
    apart = dataclasses.replace(data, labels=[(name, name, text) for name, _, text in data.labels])
    found = figures(Offset(data, [0.0, 0.1, 0.3]), apart, torch.zeros(588), transform, RProbe())
    low, high = found.mse_interval
    # The middle 95 % of the 27 draws of three documents reach from all-best to all-worst.
    assert (low, high) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.09, abs=1e-6))
    assert found.fvu_interval[0] < found.mse / found.target_variance < found.fvu_interval[1]


@pytest.mark.parametrize(
    "count, shown", [(0, []), (1, [4]), (2, [0, 8]), (3, [0, 4, 8]), (5, [0, 2, 4, 6, 8]), (99, list(range(9)))]
)
def test_chosen_examples_are_spread_over_the_errors(count, shown):
    mse = [3.0, 1.0, 2.0, 0.5, 8.0, 9.0, 4.0, 5.0, 6.0]
    order = sorted(range(9), key=mse.__getitem__)
    assert spread_over_ranks(mse, count) == [order[rank] for rank in shown]
    assert spread_over_ranks([1.0], 6) == [0]


def test_examples_show_the_pixels_that_were_rebuilt(frozen):
    data, transform = frozen
    found = figures(Offset(data, [0.0, 0.0, 100.0]), data, torch.zeros(588), transform, RProbe(examples=2))
    first, last = found.examples
    assert (first.id, last.id) == ("s0", "s2")
    assert (first.original == first.rebuilt).all()
    assert (last.rebuilt[last.target] == 255).all()
    assert (last.rebuilt[~last.target] == last.original[~last.target]).all()
    assert last.target.nonzero()[0].max() == 13
    assert last.target.nonzero()[1].max() == 41
    assert last.boxes[0] == pytest.approx((0, 0, 42, 14))
    assert figures(Offset(data, [0.0] * 3), data, torch.zeros(588), transform, RProbe(examples=0)).examples == []


def test_examples_of_windows_show_the_window():
    from tests.support.probes import unique_page

    page, box, crop = unique_page(200, 300), (30.0, 100.0, 50.0, 112.0), (24, 90, 56, 122)
    own = Sample(page.crop(crop), "t", ((6.0, 10.0, 26.0, 22.0),), id="a")
    anatomy, found = find(tiny_model()), []
    for mode, sample in (("window", Sample(page, "t", (box,), id="a")), ("pad", own)):
        transform = make_transform(anatomy, processor(), mode)
        data = freeze_samples(Encoder(anatomy, transform, Characters()), [sample], RProbe(store=False))
        probe = Offset(data, [0.5])
        found.append(figures(probe, data, torch.zeros(588), transform, RProbe(examples=1)).examples[0])
    for name in ("original", "rebuilt", "target"):
        assert (getattr(found[0], name) == getattr(found[1], name)).all()
    assert (found[0].boxes, found[0].stretch) == (found[1].boxes, found[1].stretch)
