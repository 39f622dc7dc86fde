"""DDP on two processes: the run stays as it is, and what is measured is the mean over ranks."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llava_patch.measurements.gradients.result import GradientsResult
from tests.support.paths import ROOT

from .two_ranks import measured_run


@pytest.mark.timeout(180)
def test_ranks_train_the_same_and_measure_their_mean(tmp_path):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, "-m", "tests.integrations.training.gradients.two_ranks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    texts = [path.read_text() for path in sorted(tmp_path.glob("printed-*.txt"))]
    assert done.returncode == 0, "\n".join([done.stderr[-2000:], *(text[-2000:] for text in texts)])
    assert [text.count("gradient statistics of block 2 in") for text in texts] == [2, 0]  # both runs, first rank

    plain, measured = (load_file(tmp_path / f"{name}-0.safetensors") for name in ("plain", "measured"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in measured.items())
    other = load_file(tmp_path / "measured-1.safetensors")
    assert all(torch.equal(other[name], tensor) for name, tensor in measured.items())
    histories = [json.loads((tmp_path / f"{name}-0.json").read_text()) for name in ("plain", "measured")]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    assert len(GradientsResult.read(tmp_path / "measured" / "gradients").steps) == 3

    # The first two batches lie on the two ranks, or make up one batch of four on one.
    joint = GradientsResult.read(tmp_path / "joint" / "gradients").steps
    made, following = measured_run(tmp_path / "one", per_device_train_batch_size=4)
    made.train()
    for ours, theirs in zip(joint, following.result.steps, strict=True):
        for name in ("main", "skip", "full", "inner"):
            # float32 sums in another order; after a step of Adam, weights that differ by as much
            tolerance = 1e-5 if ours.step == 1 else 1e-3
            bound = tolerance * (ours.main * ours.skip) ** 0.5 if name == "inner" else 0.0
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=tolerance, abs=bound), name
