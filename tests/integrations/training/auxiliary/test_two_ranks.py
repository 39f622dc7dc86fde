"""DDP on two processes, of which one has a region: what is logged, and that both take the same step."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import ROOT

from .two_ranks import RATE, prepared


@pytest.mark.timeout(120)
def test_ranks_log_means_over_all_and_take_the_mean_step(tmp_path):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integrations.training.auxiliary.two_ranks", str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(r)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-2000:] + errors[1][-2000:]

    model, handle, batches = prepared()
    logs, gradients = [], []
    for given in batches:
        model.zero_grad()
        model(**given).loss.backward()
        logs.append(handle.auxiliary.take_logs())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    first, second = (load_file(tmp_path / f"weights-{r}.safetensors") for r in (0, 1))
    for found in (json.loads((tmp_path / f"logs-{r}.json").read_text()) for r in (0, 1)):
        # Every batch counts alike for the model's own loss; rank 1 had no target token.
        assert found["ntp_loss"] == pytest.approx((logs[0]["ntp_loss"] + logs[1]["ntp_loss"]) / 2, rel=1e-6)
        assert found["rprobe_loss"] == pytest.approx(logs[0]["rprobe_loss"], rel=1e-6)
    assert abs(logs[0]["ntp_loss"] - logs[1]["ntp_loss"]) > 1e-3
    assert set(first) == set(second) == set(gradients[0]) == set(gradients[1])
    start = dict(model.named_parameters())
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        expected = start[name] - RATE * (gradients[0][name] + gradients[1][name]) / 2
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-6), name  # sums in DDP's order
    assert any(not torch.equal(first[n], start[n]) for n in first if "llava_patch_rprobe" in n)
