"""Interrupted measurements go on bit for bit; memory does not grow with samples or with T x T."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from llava_patch.core.errors import CheckpointError
from llava_patch.data.examples import Example
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.saturation.measure import (
    RunningMean,
    State,
    make_key,
    measure_sample,
    measure_saturation,
)
from llava_patch.measurements.saturation.result import Saturation
from tests.support import tiny
from tests.support.paths import ROOT

EVERY = Saturation(save_every=2)


def samples(count: int = 7) -> list[dict[str, Any]]:
    made = [tiny.hf_sample(seed=i, after=3 + i % 3) for i in range(count)]
    made[1] = tiny.hf_sample(seed=1, after=0)  # left out: it must be counted once
    return made


def state(folder: Path) -> State:
    return State(folder / "run" / "state.safetensors", {"model": "m", "data": "d"})


def killed(folder: str, at: int) -> None:
    """Run in a process of its own: it is killed while it makes sample `at`."""

    def stream() -> Iterator[dict[str, Any]]:
        for i, sample in enumerate(samples()):
            if i == at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield sample

    measure_saturation(tiny.hf_model(), stream(), EVERY, progress=False, state=state(Path(folder)))


def test_a_killed_measurement_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    code = f"from tests.measurements.saturation.test_saturation_state import killed; killed({str(tmp_path)!r}, 5)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    kept = state(tmp_path).load()
    assert kept is not None and kept.seen == 4 and kept.samples == 3
    model = tiny.hf_model()
    expected = measure_saturation(model, samples(), EVERY, progress=False)
    seen: list[int] = []

    class Lazy(list):
        def __getitem__(self, index: Any) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    got = measure_saturation(model, Lazy(samples()), EVERY, progress=False, state=state(tmp_path))
    assert seen == [slice(4, None)]  # what is done is not made again
    assert got == expected and got.skipped["no text after the image"] == 1
    again = measure_saturation(model, iter(samples()), EVERY, progress=False, state=state(tmp_path))
    assert again == expected
    state(tmp_path).remove()
    assert not list((tmp_path / "run").iterdir())


def test_ctrl_c_keeps_every_finished_sample(tmp_path: Path) -> None:
    def interrupted() -> Iterator[dict[str, Any]]:
        yield from samples()[:3]
        raise KeyboardInterrupt

    model, kept = tiny.hf_model(), state(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        measure_saturation(model, interrupted(), Saturation(save_every=100), progress=False, state=kept)
    assert kept.load().seen == 3
    expected = measure_saturation(model, samples(), progress=False).curves
    assert measure_saturation(model, samples(), progress=False, state=kept).curves == expected


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    kept = state(tmp_path)
    kept.save(RunningMean().without("no image"))
    with pytest.raises(CheckpointError, match="the model is another one"):
        State(kept.path, {**kept.key, "model": "n"}).load()
    with pytest.raises(CheckpointError, match="the samples are others"):
        State(kept.path, {**kept.key, "data": "n"}).load()
    with pytest.raises(CheckpointError, match="dtype was None there and is 'x' here"):
        State(kept.path, {**kept.key, "dtype": "x"}).load()
    kept.path.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"state.safetensors: cannot be read as a whole .*: delete it"):
        kept.load()


def test_the_key_tells_models_samples_and_settings_apart(tmp_path: Path) -> None:
    from PIL import Image

    model = tiny.hf_model()
    anatomy, examples = find(model), [Example(Image.new("RGB", (4, 4)), "What?", id="a")]
    key = make_key(anatomy, examples, EVERY)
    assert make_key(anatomy, examples, Saturation(save_every=9)) == key
    assert make_key(anatomy, examples, Saturation(chunk=9)) != key
    assert make_key(anatomy, [Example(Image.new("RGB", (4, 4), "red"), "What?", id="a")], EVERY)["data"] != key["data"]
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    on_disk = [Example(tmp_path / "a.png", "What?", id="a")]
    first = make_key(anatomy, on_disk, EVERY)["data"]
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert make_key(anatomy, on_disk, EVERY)["data"] != first
    with torch.no_grad():
        anatomy.layers[2].mlp.down_proj.weight.mul_(2)
    assert make_key(anatomy, examples, EVERY)["model"] != key["model"]


class Live(TorchDispatchMode):
    """Follows every tensor that an operation makes: bytes alive at a time, and the largest one's elements."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_memory_does_not_grow_with_samples() -> None:
    model = tiny.hf_model(layers=3)
    peaks = []
    for count in (4, 24):
        with Live() as live:
            stream = (tiny.hf_sample(seed=i, after=20) for i in range(count))
            assert measure_saturation(model, stream, progress=False).samples == count
        peaks.append(live.peak)
    # A sample's own inputs are 10 kB, its hidden states 3 layers x 26 positions x 32 channels x 4 bytes.
    assert peaks[1] <= peaks[0] + 1000


def test_nothing_grows_with_the_square_of_the_length(host: Any) -> None:
    make_model, make_sample = host
    model, text, chunk = make_model(layers=2), 500, 16
    with Live() as live:
        measure_sample(find(model), make_sample(after=text), Saturation(chunk=chunk))
    tokens = text + 2 + tiny.PATCHES
    assert live.largest < tokens * tokens / 4  # rows of 4 heads x 16 queries, and T x 64 words of the vocabulary
