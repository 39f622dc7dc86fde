import dataclasses
import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from llava_patch.core.errors import HostError, InputError, LlavaPatchError
from llava_patch.data.pages import Pages
from llava_patch.data.readers import Samples
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe import fit
from llava_patch.measurements.rprobe.bootstrap import FEW
from llava_patch.measurements.rprobe.evaluate import answer
from llava_patch.measurements.rprobe.fit import first_under, run_rprobe, running_mean
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.train import batches, rate, token_errors, train_probe
from llava_patch.probe.decoder import ProbeDecoder
from llava_patch.probe.sample import Sample
from tests.support.probes import Characters, made_up, processor, samples, targets_of, tiny_model

QUICK = RProbe(steps=6, batch_size=4, train_pages=12, heldout_pages=5, examples=2, threshold=1e-6)


def run(model, settings=QUICK, **kwargs):
    return run_rprobe(model, processor(), Characters(), settings, progress=False, **kwargs)


def fvu(model, kind: str) -> float:
    """Held-out fraction of variance unexplained after a short training on made-up tokens."""
    train, held = made_up(512, 1, kind), made_up(128, 2, kind)
    decoder = ProbeDecoder(find(model), train.grid, seed=0)
    train_probe(decoder, train, RProbe(steps=160, batch_size=32), lr=3e-3)
    errors = token_errors(answer(decoder, held.batch(torch.arange(len(held)))), targets_of(held))
    return float(errors.mean() / held.target_variance)


def test_the_probe_reads_what_is_in_the_tokens_and_nothing_else():
    model = tiny_model()
    true, shuffled, constant = (fvu(model, kind) for kind in ("true", "shuffled", "constant"))
    assert true < 0.1  # the constant baseline is 1
    assert 0.9 < constant < 1.15
    assert shuffled > 2 * true


def coloured(count: int, seed: int) -> list[Sample]:
    """Grey pages with one bar whose colour the text names."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(7).integers(0, 256, (8, 3))
    found = []
    for i in range(count):
        name, top = int(rng.integers(8)), 14 * int(rng.integers(4))
        page = rng.integers(120, 136, (56, 56, 3), dtype=np.uint8)
        page[top : top + 14] = colours[name]
        box = (0.0, float(top), 56.0, top + 14.0)
        found.append(Sample(Image.fromarray(page), "abcdefgh"[name], (box,), id=f"{seed}-{i}"))
    return found


@pytest.mark.parametrize("text", [True, False])
def test_what_only_the_text_tells_is_rebuilt_with_it_alone(text):
    """The bar is blacked out: its colour can come from nowhere but the text."""
    settings = RProbe(steps=150, batch_size=16, masked=True, text=text, maps=0, examples=0, resamples=10)
    found = run(tiny_model(), settings, samples=coloured(96, 1), heldout=coloured(32, 2)).fvu
    assert found < 0.02 if text else 0.9 < found < 1.2


def test_training_needs_no_gradient_mode_of_the_caller():
    data = made_up(8, 1, "true")
    decoder = ProbeDecoder(find(tiny_model()), data.grid)
    with torch.no_grad():
        losses = train_probe(decoder, data, RProbe(steps=3, batch_size=8), lr=1e-2)
    assert losses[2] < losses[0]


def test_result_holds_what_the_report_needs():
    result = run(tiny_model(), dataclasses.replace(QUICK, threshold=0.2))
    assert len(result.losses) == len(result.running) == 6
    assert len(result.documents) == 5
    assert {"id", "document", "text", "tokens", "mse", "psnr"} <= set(result.documents[0])
    weighted = sum(d["mse"] * d["tokens"] for d in result.documents) / sum(d["tokens"] for d in result.documents)
    assert result.mse == pytest.approx(weighted)
    assert result.psnr == pytest.approx(np.mean([d["psnr"] for d in result.documents]))
    assert result.fvu == pytest.approx(result.mse / result.target_variance)
    assert result.facts["decoder_layers"] == 1
    assert result.facts["heldout_target_tokens"] == sum(d["tokens"] for d in result.documents)
    assert len(result.examples) == 2
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["settings"]["steps"] == 6
    assert "held-out MSE" in result.summary()


def test_same_seed_same_numbers_and_the_callers_random_state_is_left_alone():
    model = tiny_model()
    torch.manual_seed(1)
    np.random.seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = run(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(2)
    again, other = run(model), run(model, dataclasses.replace(QUICK, seed=1))
    assert first.losses == again.losses
    assert first.documents == again.documents
    assert first.losses != other.losses


def test_nothing_frozen_changes_by_a_bit():
    model = tiny_model()
    model.train()
    model.model.multi_modal_projector.eval()
    model.model.vision_tower.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    keys = [set(vars(m)) for m in model.modules()]
    result = run(model)
    assert result.losses[-1] != result.losses[0]  # it did train something
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == flags
    assert all(p.grad is None for p in model.parameters())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == keys


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_works_from_within_an_evaluation(context):
    model = tiny_model()
    expected = run(model)
    with context():
        assert run(model).losses == expected.losses


def test_works_on_weights_made_under_inference_mode():
    expected = run(tiny_model())
    with torch.inference_mode():
        assert run(tiny_model()).losses == expected.losses


def test_half_default_dtype_and_half_model():
    model = tiny_model(dtype=torch.bfloat16)
    expected = run(model)
    torch.set_default_dtype(torch.float16)  # what loading a checkpoint may leave behind
    try:
        assert run(model).losses == expected.losses
    finally:
        torch.set_default_dtype(torch.float32)


def test_both_forms_of_rotary_and_the_ablations_run():
    model = tiny_model()
    options = [{}, {"rope": "embedding"}, {"masked": True}, {"text": False}, {"masked": True, "text": False}]
    losses = [tuple(run(model, dataclasses.replace(QUICK, **o)).losses) for o in options]
    assert len(set(losses)) == len(options)  # each of them does something


def test_one_held_out_document_has_no_interval_and_that_is_said():
    with pytest.warns(UserWarning, match=FEW):
        few = run_rprobe(tiny_model(), processor(), Characters(), QUICK, samples(6), samples(9)[8:], progress=False)
    assert few.mse_interval is None and FEW in few.warnings
    assert FEW not in run(tiny_model()).warnings


def test_vacuous_threshold_warns_and_says_so():
    with pytest.warns(UserWarning, match=r"RProbe.threshold = 1000 is not under the MSE of a constant patch"):
        result = run(tiny_model(), dataclasses.replace(QUICK, threshold=1000))
    assert result.threshold_is_vacuous
    assert result.warnings
    assert result.steps_to_threshold == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RProbe.threshold")
        result = run(tiny_model())
    assert not result.threshold_is_vacuous and not any("RProbe.threshold" in note for note in result.warnings)
    assert result.steps_to_threshold is None


def test_a_threshold_above_the_training_variance_alone_is_vacuous():
    """Steps are counted on the training curve, which starts at the training targets' variance."""
    dim = [dataclasses.replace(s, image=s.image.point(lambda value: value // 2)) for s in samples(9)[:6]]
    with pytest.warns(
        UserWarning, match=r"on held-out, 0\.\d+ on training samples\): steps to the threshold say nothing"
    ):
        result = run(tiny_model(), dataclasses.replace(QUICK, threshold=0.6), samples=dim, heldout=samples(9)[6:])
    assert result.running[0] < result.threshold < result.constant_mse
    assert result.threshold_is_vacuous


def test_what_is_left_out_is_counted_and_kept_with_the_result():
    empty = dataclasses.replace(samples(1)[0], boxes=((3.0, 3.0, 3.0, 9.0),), id="empty")
    train = Samples([*samples(9)[:6], empty, empty], ["a.jsonl:3: not JSON"], 4)
    held = Samples([*samples(9)[6:], empty], ["b.jsonl:1: lacks box", "b.jsonl:2: lacks box"], 1)
    settings = dataclasses.replace(QUICK, broken="skip", max_text_tokens=5)
    with pytest.warns(UserWarning) as told:
        result = run(tiny_model(), settings, samples=train, heldout=held)
    counts = {"skipped_by_reader": 3, "unread": 5, "skipped_train": 2, "skipped_heldout": 1, "texts_cut": 9}
    assert counts.items() <= result.facts.items()
    for words in (
        "3 things could not be used and were skipped; the first: a.jsonl:3: not JSON",
        "leaves out 2 of 8 training samples; the first: empty: empty box",
        "leaves out 1 of 4 held-out samples",
        "cuts the texts of 6 of 6 training samples",
        "cuts the texts of 3 of 3 held-out samples",
    ):
        assert sum(words in note for note in result.warnings) == 1
        assert sum(words in str(warning.message) for warning in told) == 1
    whole = run(tiny_model(), samples=samples(8))
    assert not any(whole.facts[name] for name in counts)


def test_held_out_documents_that_are_trained_on_are_told_and_all_of_them_refused(tmp_path):
    data = samples(9)
    copies = []
    for number, sample in enumerate(data):
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            sample.image.save(tmp_path / folder / f"{folder}{number}.png")
        copies.append(
            [
                dataclasses.replace(sample, image=tmp_path / f / f"{f}{number}.png", id=f"{f}{number}")
                for f in ("one", "two")
            ]
        )
    one, two = zip(*copies, strict=True)
    with pytest.warns(UserWarning, match="2 of 5 held-out documents are trained on, such as two4"):
        result = run(tiny_model(), samples=one[:6], heldout=two[4:])
    assert result.facts["heldout_documents_trained_on"] == 2
    assert any("held-out documents are trained on" in note for note in result.warnings)
    with pytest.raises(InputError, match="all 2 held-out documents are trained on, such as two4"):
        run(tiny_model(), samples=one[:6], heldout=two[4:6])
    with pytest.raises(InputError, match="all 9 held-out documents are trained on"):
        run(tiny_model(), samples=data, heldout=data)
    with pytest.raises(InputError, match="the held-out samples are the training samples"):
        run(tiny_model(), samples=Pages(4, 56), heldout=Pages(4, 56))
    apart = run(tiny_model(), samples=one[:6], heldout=two[6:])
    assert apart.facts["heldout_documents_trained_on"] == 0
    assert not any("trained on" in note for note in apart.warnings)


def test_few_documents_and_a_probe_that_learned_nothing_are_told():
    noise = run(tiny_model(), samples=samples(8), heldout=samples(12)[8:])
    assert sum("learned nothing: its held-out MSE" in note for note in noise.warnings) == 1
    assert sum("drawn over 4 held-out documents only" in note for note in noise.warnings) == 1
    settings = RProbe(steps=150, batch_size=16, masked=True, maps=0, examples=0, resamples=10)
    learned = run(tiny_model(), settings, samples=coloured(96, 1), heldout=coloured(12, 2))
    assert not any("learned nothing" in note or "documents only" in note for note in learned.warnings)


def test_one_target_token_is_called_what_it_is():
    one = [dataclasses.replace(samples(9)[8], boxes=((20.0, 20.0, 22.0, 22.0),))]
    with pytest.raises(InputError, match="held-out samples: there is one target token: hold out more"):
        run(tiny_model(), samples=samples(8), heldout=one)
    with pytest.raises(InputError, match="training samples: there is one target token: train on more"):
        run(tiny_model(), samples=one, heldout=samples(8))


def test_probe_that_only_learns_its_training_samples_by_heart_warns():
    settings = dataclasses.replace(QUICK, steps=150, batch_size=6)
    with pytest.warns(UserWarning, match="6 samples are few for 150 steps"):
        result = run(tiny_model(), settings, samples=samples(9)[:6], heldout=samples(9)[6:])
    assert result.facts["train_fvu"] < 0.8 < result.fvu


def test_own_samples_are_split_or_taken_as_given():
    data = samples(10)
    result = run(tiny_model(), samples=data)
    assert len(result.documents) == 2
    assert result.facts["train_samples"] == 8
    result = run(tiny_model(), samples=data[:7], heldout=data[7:])
    assert [d["id"] for d in result.documents] == [s.id for s in data[7:]]
    with pytest.raises(LlavaPatchError, match="heldout was given without samples"):
        run(tiny_model(), heldout=data)
    with pytest.raises(InputError, match="at least two documents"):
        run(tiny_model(), samples=data[:1])


def test_samples_of_one_colour_are_refused():
    white = [dataclasses.replace(s, image=Image.new("RGB", (56, 56), "white")) for s in samples(4)]
    with pytest.raises(InputError, match="held-out samples all show the same patch"):
        run(tiny_model(), samples=samples(4), heldout=white)


def test_too_small_an_llm_is_refused_before_any_page_is_drawn(monkeypatch):
    monkeypatch.setattr(fit, "freeze_samples", lambda *a, **k: pytest.fail("the long part began"))
    with pytest.raises(HostError, match="at least 4 decoder layers"):
        run(tiny_model(layers=3))


def test_divergence_is_an_error():
    with pytest.raises(LlavaPatchError, match=r"loss is (nan|inf) at step \d+: lower RProbe.lr"):
        run(tiny_model(), dataclasses.replace(QUICK, lr=1e30, steps=20, warmup=0.0))


def test_the_tower_runs_once_over_the_data():
    model = tiny_model()
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else ()))),
        with_kwargs=True,
    )
    run(model, dataclasses.replace(QUICK, steps=12, maps=0))
    assert sum(seen) == 12 + 5 + 2  # and the image by which each store's key tells models apart


def test_every_sample_comes_once_before_any_comes_again():
    drawn = batches(10, 4, seed=0)
    epochs = torch.cat([next(drawn) for _ in range(10)]).reshape(4, 10)
    assert epochs.sort(1).values.tolist() == [list(range(10))] * 4
    assert len(set(map(tuple, epochs.tolist()))) == 4
    assert len(next(batches(3, 8, seed=0))) == 8


def test_schedule_rises_and_falls():
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == 1.0 == rates[10]
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert rate(0, 1, 0.0) == 1.0


def test_the_running_mean_starts_at_the_variance_of_the_training_targets(monkeypatch):
    """Neither at the first loss nor at the held-out constant's MSE: a first batch counts for a twentieth."""
    kept, freeze = [], fit.freeze_samples
    monkeypatch.setattr(fit, "freeze_samples", lambda *a: kept.append(freeze(*a)) or kept[-1])
    result = run(tiny_model())
    train, held = (targets_of(part).double() for part in kept)
    start, other = (float((part - part.mean(0)).square().mean()) for part in (train, held))
    assert result.running[0] == pytest.approx(0.95 * start + 0.05 * result.losses[0], rel=1e-5)
    for wrong in (other, result.constant_mse, result.losses[0]):
        assert abs(0.95 * (wrong - start)) > 1e-3 * result.running[0]  # they differ here
    assert result.facts["train_fvu"] == pytest.approx(result.running[-1] / start, rel=1e-5)


def test_running_mean_and_first_step_under():
    assert running_mean([2.0, 2.0, 2.0], 2.0) == pytest.approx([2.0, 2.0, 2.0])
    running = running_mean([0.0] * 100, 1.0)
    assert running[0] == pytest.approx(0.95)  # one lucky batch counts for little
    assert all(a > b for a, b in itertools.pairwise(running))
    assert running[-1] < 0.01
    assert first_under([3, 2, 1], 2.5) == 2
    assert first_under([3, 2, 1], 1) is None


def test_progress_works_without_a_terminal(capsys):
    run_rprobe(tiny_model(), processor(), Characters(), QUICK, progress=True)
    assert "R-Probe: train" in capsys.readouterr().err


def test_a_run_on_windows_reads_lines_that_are_lower_than_a_token():
    """On pages four times the tower's size a line is 3.5 of 14 pixels high; a window shows it as 21."""
    small = [
        dataclasses.replace(
            sample,
            image=sample.image.resize((224, 224), Image.Resampling.NEAREST),
            boxes=((20.0, 60.0, 60.0, 74.0), ),
            all_boxes=(),
        )
        for sample in samples(10)
    ]  # fmt: skip
    settings = dataclasses.replace(QUICK, image_mode="window", maps=1)
    with pytest.warns(UserWarning, match="only the beginning"):
        result = run(tiny_model(), settings, samples=small)
    assert len(result.maps) == 1 and result.settings["text_height"] == 1.5
    assert result.facts["regions_cut"] == 10 and any("only the beginning" in note for note in result.warnings)
    assert {document["tokens"] for document in result.documents} == {8}  # 2 of 4 rows
    wider = run(tiny_model(), dataclasses.replace(settings, text_height=1), samples=small)
    assert wider.facts["regions_cut"] == 0
