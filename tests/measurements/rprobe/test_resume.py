import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_patch.core.errors import CheckpointError
from llava_patch.core.locks import folder_lock
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe import train
from llava_patch.measurements.rprobe.fit import run_rprobe
from llava_patch.measurements.rprobe.keys import difference, fresh_answer, make_key
from llava_patch.measurements.rprobe.resume import DECODER_FILE, STATE_FILE, TrainingFolder, load_decoder
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.train import choose_trained, train_probe
from llava_patch.probe.decoder import ProbeDecoder, trained_parameters
from tests.support.paths import ROOT
from tests.support.probes import Characters, made_up, processor, tiny_model

SETTINGS = RProbe(steps=12, batch_size=8, save_every=4)


class Interrupted(Exception):
    pass


class Stopping:
    """Frozen data that fail at one batch."""

    def __init__(self, data, after: int) -> None:
        self.data, self.left = data, after

    def __len__(self):
        return len(self.data)

    @property
    def counts(self):
        return self.data.counts

    def batch(self, index, device="cpu"):
        if not self.left:
            raise Interrupted
        self.left -= 1
        return self.data.batch(index, device)


def fresh(settings=SETTINGS, model=None, data_key="data", embeddings=1.0):
    data = made_up(24, 1, "true")
    decoder = ProbeDecoder(find(model or tiny_model()), data.grid)
    choose_trained(decoder, settings)
    return decoder, data, make_key(decoder, data_key, embeddings * data.text.table, settings, 1e-2)


@pytest.mark.parametrize("trained", ["all", "lora", "head"])
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, trained, capsys):
    settings = dataclasses.replace(SETTINGS, trained=trained)
    whole, data, _ = fresh(settings)
    expected = train_probe(whole, data, settings, 1e-2)
    for after in (6, 3, 5):  # the second start is stopped before it has written anything
        decoder, data, key = fresh(settings)
        work = TrainingFolder(tmp_path, key)
        with pytest.raises(Interrupted):
            train_probe(decoder, Stopping(data, after), settings, 1e-2, work=work)
        assert work.state.is_file() and not work.decoder.exists()
    decoder, data, key = fresh(settings)
    found = train_probe(decoder, Stopping(data, 4), settings, 1e-2, work=TrainingFolder(tmp_path, key))
    assert "goes on after step 8 of 12" in capsys.readouterr().err
    assert found == expected and len(expected) == 12
    for (name, one), other in zip(whole.named_parameters(), decoder.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert [path.name for path in tmp_path.iterdir()] == [DECODER_FILE]
    again, _, key = fresh(settings)
    assert TrainingFolder(tmp_path, key).load_finished(again).losses == expected
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_killed_process_goes_on_and_leaves_no_litter(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.measurements.rprobe.test_resume import *\n"
        "import llava_patch.measurements.rprobe.train as t, time; torch.set_num_threads(1)\n"
        "decoder, data, key = fresh()\n"
        "slow = Stopping(data, 99)\n"
        "slow.batch = lambda i, d='cpu': (time.sleep(float(sys.argv[2])), data.batch(i, d))[1]\n"
        "print(train_probe(decoder, slow, SETTINGS, 1e-2, work=TrainingFolder(Path(sys.argv[1]), key)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def start(seconds):
        command = [sys.executable, "-c", script, str(tmp_path), str(seconds)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start(0.3)
    for _ in range(600):
        if (tmp_path / STATE_FILE).exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / f".{Path(STATE_FILE).stem}-half.safetensors").write_bytes(b"half")  # what a kill during a write leaves
    out, err = start(0).communicate()
    assert "goes on after step" in err, err
    whole, data, _ = fresh()
    assert json.loads(out) == train_probe(whole, data, SETTINGS, 1e-2)
    weights = load_file(tmp_path / DECODER_FILE)
    assert all(torch.equal(weights[name], value) for name, value in trained_parameters(whole).items())
    assert [path.name for path in tmp_path.iterdir()] == [DECODER_FILE]


def interrupted(folder, **kwargs):
    decoder, data, key = fresh(**kwargs)
    with pytest.raises(Interrupted):
        train_probe(decoder, Stopping(data, 6), SETTINGS, 1e-2, work=TrainingFolder(folder, key))


def other_model():
    model = tiny_model()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.001)
    return model


def other_epsilon():
    """Set on the modules, where neither weights nor configuration tell of it."""
    model = tiny_model()
    for layer in model.model.language_model.layers:
        layer.input_layernorm.variance_epsilon = 0.5
    return model


def other_frequencies():
    model = tiny_model()
    model.model.language_model.rotary_emb.inv_freq.mul_(0.01)
    return model


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"model": other_epsilon()}, "before training it answers otherwise"),
        ({"model": other_frequencies()}, "before training it answers otherwise"),
        ({"model": tiny_model(max_position_embeddings=4096)}, "the configuration of its language model"),
        ({"embeddings": 2.0}, "the token embeddings of the training texts are others"),
        ({"model": other_model()}, "the decoder belongs to another model"),
        ({"data_key": "others"}, "the frozen training data are others"),
        ({"settings": dataclasses.replace(SETTINGS, clip=2.0)}, r"RProbe.clip was 1.0 there and is 2.0 here"),
    ],
)
def test_a_state_of_another_run_is_refused_and_kept(tmp_path, changed, words):
    interrupted(tmp_path)
    before = (tmp_path / STATE_FILE).read_bytes()
    decoder, data, key = fresh(**changed)
    with pytest.raises(CheckpointError, match=words):
        train_probe(decoder, data, changed.get("settings", SETTINGS), 1e-2, work=TrainingFolder(tmp_path, key))
    assert (tmp_path / STATE_FILE).read_bytes() == before


@pytest.mark.parametrize("changed", [{"model": other_epsilon()}, {"embeddings": 2.0}])
def test_a_finished_decoder_of_another_model_is_not_taken(tmp_path, changed, capsys):
    decoder, data, key = fresh()
    train_probe(decoder, data, SETTINGS, 1e-2, work=TrainingFolder(tmp_path, key))
    again, _, key = fresh()
    assert TrainingFolder(tmp_path, key).load_finished(again) is not None
    other, _, key = fresh(**changed)
    assert TrainingFolder(tmp_path, key).load_finished(other) is None
    assert "is not used and will be replaced" in capsys.readouterr().err


def test_an_answer_may_differ_by_rounding_and_by_no_more():
    decoder, _, _ = fresh()
    key = {"answer": fresh_answer(decoder)}
    size = torch.tensor(key["answer"]).norm().item()
    assert size > 0.1
    assert difference({"answer": [n + 1e-6 * size for n in key["answer"]]}, key) == ""
    assert "answers otherwise" in difference({"answer": [key["answer"][0] + 1e-3 * size, *key["answer"][1:]]}, key)
    assert "answers otherwise" in difference({}, key)


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path):
    folder = tmp_path / "out"
    program = (
        "import sys; from pathlib import Path; from llava_patch.core.locks import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n    print('in', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"in\n"
        settings = RProbe(steps=2, batch_size=4, train_pages=4, heldout_pages=2, store=False)

        def run():
            return run_rprobe(tiny_model(), processor(), Characters(), settings, progress=False, work=folder)

        half = folder / f".{Path(STATE_FILE).stem}-half.safetensors"
        half.write_bytes(b"of the other run")
        with pytest.raises(CheckpointError, match=r"another run works in .*: wait for it or give another --output"):
            run()
        assert half.exists()
    finally:
        other.kill()
        other.wait()
    with folder_lock(folder), folder_lock(folder):  # the command holds it around the run and the writing of its files
        run()
    assert not half.exists() and (folder / DECODER_FILE).is_file()


def test_a_failed_run_leaves_no_empty_folder(tmp_path):
    with pytest.raises(Interrupted), folder_lock(tmp_path / "a" / "b"):
        raise Interrupted
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path):
        pass
    assert tmp_path.is_dir()


def test_what_does_not_change_training_may_change(tmp_path):
    interrupted(tmp_path)
    settings = dataclasses.replace(SETTINGS, threshold=0.1, save_every=5, examples=1, minutes=30.0)
    decoder, data, key = fresh(settings)
    assert len(train_probe(decoder, data, settings, 1e-2, work=TrainingFolder(tmp_path, key))) == 12


def test_a_decoder_of_another_model_or_a_broken_file_is_an_error(tmp_path):
    decoder, data, key = fresh()
    train_probe(decoder, data, SETTINGS, 1e-2, work=TrainingFolder(tmp_path, key))
    path = tmp_path / DECODER_FILE
    again, _, key = fresh()
    load_decoder(again, path, key)
    assert torch.equal(again.head[0].weight, decoder.head[0].weight)
    wrong, _, other = fresh(model=other_model())
    start = wrong.head[0].weight.clone()
    with pytest.raises(CheckpointError, match=rf"{DECODER_FILE}: the decoder belongs to another model"):
        load_decoder(wrong, path, other)
    assert torch.equal(wrong.head[0].weight, start)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cannot be read as a whole safetensors file.*delete it"):
        load_decoder(again, path, key)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot be read as a whole safetensors file.*delete it"):
        TrainingFolder(tmp_path, key).load_finished(again)


def test_difference_names_one_field_on_either_side():
    assert difference({"a": 1}, {"a": 1}) == ""
    assert difference({"a": 1}, {"a": 1, "b": 2}) == "b was None there and is 2 here"
    assert difference({"a": 1, "b": 2}, {"a": 1}) == "b was 2 there and is None here"


def test_time_that_is_over_ends_training_and_more_time_goes_on(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))  # a step takes 10 s
    settings = dataclasses.replace(SETTINGS, minutes=0.4)
    decoder, data, key = fresh(settings)
    losses = train_probe(decoder, data, settings, 1e-2, work=TrainingFolder(tmp_path, key))
    assert len(losses) == 3
    decoder, data, key = fresh(settings)  # no time is left
    assert train_probe(decoder, Stopping(data, 0), settings, 1e-2, work=TrainingFolder(tmp_path, key)) == losses
    decoder, data, key = fresh()
    whole, _, _ = fresh()
    assert train_probe(decoder, data, SETTINGS, 1e-2, work=TrainingFolder(tmp_path, key)) == train_probe(
        whole, data, SETTINGS, 1e-2
    )
    assert torch.equal(decoder.head[0].weight, whole.head[0].weight)


def test_a_finished_run_is_measured_again_without_training(tmp_path, monkeypatch, capsys):
    settings = RProbe(steps=4, batch_size=4, train_pages=8, heldout_pages=4, threshold=1e-6)
    model = tiny_model()

    def run(settings):
        return run_rprobe(model, processor(), Characters(), settings, progress=False, work=tmp_path)

    first = run(settings)
    with monkeypatch.context() as patch:
        patch.setattr(train, "batches", lambda *a: pytest.fail("it trained again"))
        again = run(dataclasses.replace(settings, threshold=1e-7))
    assert (again.mse, again.losses, again.documents) == (first.mse, first.losses, first.documents)
    assert first.facts["comparable"] and not first.facts["cut"] and first.facts["steps_done"] == 4
    other = run(dataclasses.replace(settings, seed=1))
    assert "is not used and will be replaced: RProbe.seed was 0 there and is 1 here" in capsys.readouterr().err
    assert other.losses != first.losses
    cut = dataclasses.replace(settings, minutes=1e-9, seed=2)
    with pytest.warns(UserWarning, match="RProbe.minutes = 1e-09 ended training after step 1 of 4"):
        result = run(cut)
    assert result.summary().startswith("R-Probe (not comparable: cut at step 1 of 4): held-out MSE")
    assert result.facts["cut"] and len(result.losses) == result.facts["steps_done"] == 1
