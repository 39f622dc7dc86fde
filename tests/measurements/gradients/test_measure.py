"""Gradient statistics of a fixed checkpoint: what a batch is, how it goes on, whose results it keeps."""

import dataclasses
import functools
import json

import pytest
import torch

from llava_patch import SkipLinks, patch
from llava_patch.core.errors import CheckpointError, InputError, SettingError
from llava_patch.measurements.gradients import measure as module
from llava_patch.measurements.gradients.decompose import decompose
from llava_patch.measurements.gradients.log import LOG, StepLog
from llava_patch.measurements.gradients.measure import measure_gradients
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.result import GradientsResult
from llava_patch.measurements.gradients.statistics import STATE, Window
from tests.support.fusions import randomise

SETTINGS = Gradients(window=2, full="attached")


@pytest.fixture
def patched(host):
    with patch(host.model, fusion=SkipLinks(stride=2)) as handle:
        randomise(handle)
        yield host


def example(host, length, seed):
    inputs = host.batch([[2, "image", length]], labels=True, seed=seed).inputs
    inputs["labels"][:, :3] = -100
    return inputs


def batches_of(host, count=6, size=2):
    return [
        [functools.partial(example, host, 3 + 4 * i, 10 * number + i) for i in range(size)] for number in range(count)
    ]


def test_a_batch_is_the_mean_over_its_scored_tokens(patched):
    """As one padded batch, whose loss is the mean over all of its tokens and not over examples."""
    host = patched
    rows = [[2, "image", 3], [2, "image", 11]]
    together = host.batch(rows, labels=True).inputs
    together["labels"][:, :3] = -100
    apart = [functools.partial(lambda i: slice_of(host, together, i, rows), i) for i in range(2)]
    main, full = module._gradients(host.model, apart, 2, "attached")
    whole = decompose(host.model, lambda: host.model(**together, use_cache=False).loss, 2, "attached")
    for ours, theirs in zip((main, full), whole, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()  # padded shapes sum in another order


def slice_of(host, batch, i, rows):
    tokens = int(batch["attention_mask"][i].sum())
    pixels = "images" if host.name == "llava" else "pixel_values"
    inputs = {k: v[i : i + 1, :tokens] for k, v in batch.items() if k != pixels}
    return {**inputs, pixels: batch[pixels][i : i + 1]}


def test_a_measurement_of_its_own(patched):
    flags = [p.requires_grad for p in patched.model.parameters()]
    state = torch.get_rng_state()
    result = measure_gradients(patched.model, batches_of(patched), SETTINGS, progress=False)
    assert [s.step for s in result.steps] == [1, 2, 3, 4, 5, 6]
    assert [(w.first, w.last) for w in result.windows] == [(1, 2), (3, 4), (5, 6)]
    assert result.facts["block"] == 2 and result.facts["batch"] == 2 and not result.trains
    assert result.transition is None  # nothing trains, so nothing passes
    assert not patched.model.training and [p.requires_grad for p in patched.model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    for step in result.steps:
        assert step.full == pytest.approx(step.main + step.skip + 2 * step.inner, rel=1e-5)
    assert "times as long as the main one" in result.summary() and "6 batches" in result.summary()


def test_it_goes_on_where_it_was_broken_off(patched, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    batches = batches_of(patched, count=7)
    settings = dataclasses.replace(SETTINGS, window=3)
    whole = measure_gradients(patched.model, batches, settings, tmp_path / "whole", progress=False)

    def breaks():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_gradients(
            patched.model, [*batches[:4], [breaks], *batches[5:]], settings, tmp_path / "cut", progress=False
        )
    seen = GradientsResult.read(tmp_path / "cut")
    assert [s.step for s in seen.steps] == [1, 2, 3, 4] and len(seen.windows) == 1
    assert (tmp_path / "cut" / STATE).exists()
    asked = []

    def counted(batch, number):
        return [lambda e=e: asked.append(number) or e() for e in batch]

    again = [counted(batch, number) for number, batch in enumerate(batches, 1)]
    rest = measure_gradients(patched.model, again, settings, tmp_path / "cut", progress=False)
    assert set(asked) == {5, 6, 7}
    assert rest == whole and not (tmp_path / "cut" / STATE).exists()
    asked.clear()
    assert measure_gradients(patched.model, again, settings, tmp_path / "cut", progress=False) == whole and not asked


def test_a_log_ahead_of_the_last_state_is_cut_back(patched, tmp_path, monkeypatch):
    """Killed, not interrupted: the state on disk is older than the log."""
    batches = batches_of(patched, count=6)
    write = Window.save
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(Window, "save", lambda window, path: write(window, path) if window.last <= 3 else path)
    whole = measure_gradients(patched.model, batches, SETTINGS, progress=False)

    def breaks():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_gradients(patched.model, [*batches[:5], [breaks]], SETTINGS, tmp_path, progress=False)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"kind": "step", "st')  # torn
    assert len(GradientsResult.read(tmp_path).steps) == 5
    rest = measure_gradients(patched.model, batches, SETTINGS, tmp_path, progress=False)
    assert rest.steps == whole.steps and rest.windows == whole.windows


def test_results_of_another_measurement_are_not_replaced(patched, tmp_path):
    batches = batches_of(patched, count=2)
    measure_gradients(patched.model, batches, SETTINGS, tmp_path, {"checkpoint": "a"}, progress=False)
    with pytest.raises(CheckpointError, match="checkpoint = 'a', not 'b'"):
        measure_gradients(patched.model, batches, SETTINGS, tmp_path, {"checkpoint": "b"}, progress=False)
    lines = (tmp_path / LOG).read_text().splitlines(keepends=True)
    before = "".join(lines[:2])  # one step of two: an unfinished measurement
    (tmp_path / LOG).write_text(before)
    other = dataclasses.replace(SETTINGS, window=3)
    Window(2).save(tmp_path / STATE)
    with pytest.raises(CheckpointError, match=r"its windows have 2 steps, but Gradients\.window = 3"):
        measure_gradients(patched.model, batches, other, tmp_path, {"checkpoint": "a"}, progress=False)
    with torch.no_grad():
        next(patched.model.lm_head.parameters()).mul_(2)  # trained on, under the same name
    with pytest.raises(CheckpointError, match=r"of another model \(weights, configuration or patch\): give another"):
        measure_gradients(patched.model, batches, SETTINGS, tmp_path, {"checkpoint": "a"}, progress=False)
    assert (tmp_path / LOG).read_text() == before


def test_a_finished_measurement_makes_way_for_other_settings(patched, tmp_path):
    batches, facts = batches_of(patched, count=4), {"checkpoint": "a"}
    measure_gradients(patched.model, batches[:2], SETTINGS, tmp_path, {**facts, "question": "?"}, progress=False)
    other = dataclasses.replace(SETTINGS, window=4)
    found = measure_gradients(patched.model, batches, other, tmp_path, facts, progress=False)
    fresh = measure_gradients(patched.model, batches, other, tmp_path / "fresh", facts, progress=False)
    assert found.to_dict() == fresh.to_dict() and len(found.steps) == 4 and found.settings.window == 4
    header, *steps = (tmp_path / LOG).read_text().splitlines()
    (tmp_path / LOG).write_text("\n".join([header.replace('"trains": false', '"trains": true'), *steps, ""]))
    before = (tmp_path / LOG).read_text()  # as a training run's, which is never replaced
    with pytest.raises(CheckpointError, match="give another folder"):
        measure_gradients(patched.model, batches[:2], SETTINGS, tmp_path, facts, progress=False)
    assert (tmp_path / LOG).read_text() == before


def test_a_measurement_that_found_nothing_makes_way(patched, tmp_path):
    """As one whose first image is missing; a training run's log that has only begun stays."""

    def missing():
        raise InputError("it is missing")

    with pytest.raises(InputError, match="it is missing"):
        measure_gradients(patched.model, [[missing]] * 2, SETTINGS, tmp_path, {"data": "wrong"}, progress=False)
    found = measure_gradients(patched.model, batches_of(patched, 2), SETTINGS, tmp_path, {"data": "a"}, progress=False)
    assert len(found.steps) == 2 and found.facts["data"] == "a"
    run = StepLog(tmp_path / "run", SETTINGS, {"trains": True}).path.read_text()
    with pytest.raises(CheckpointError, match="give another folder"):
        measure_gradients(patched.model, batches_of(patched, 2), SETTINGS, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / LOG).read_text() == run


def test_what_cannot_be_measured(patched, tmp_path):
    with pytest.raises(InputError, match="at least one batch"):
        measure_gradients(patched.model, [], SETTINGS, tmp_path / "none", progress=False)
    unanswered = example(patched, 4, 0)
    del unanswered["labels"]
    with pytest.raises(InputError, match="no labels"):
        measure_gradients(patched.model, [[lambda: unanswered]], SETTINGS, progress=False)
    high = dataclasses.replace(SETTINGS, block=8)
    with pytest.raises(SettingError, match="the main path ends at block 7"):
        measure_gradients(patched.model, batches_of(patched), high, tmp_path / "high", progress=False)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_batches(patched, tmp_path):
    """Two vectors are held for the window, whatever its length: the state has no more."""
    from safetensors import safe_open

    sizes = []
    for count in (3, 30):
        window = Window(100)
        for number in range(1, count + 1):
            window.add(number, torch.ones(50), torch.ones(50))
        with safe_open(str(window.save(tmp_path / STATE)), framework="pt") as file:
            sizes.append(sum(file.get_tensor(name).numel() for name in ("main", "skip")))
            assert json.loads(file.metadata()["window"])["count"] == count
    assert sizes == [100, 100]
