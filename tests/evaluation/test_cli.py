"""The command line end to end, in processes of its own; each start costs a quarter of a minute."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_patch.resources import eval_tasks_dir

from . import fileset

# The start-up hook comes with an installed package; importing llava_patch first does the same.
START = (
    "import runpy, sys, llava_patch; {before}; sys.argv[0] = 'lmms_eval'; "
    "runpy.run_module('lmms_eval', run_name='__main__', alter_sys=True)"
)
BREAK = "from transformers.models.llama import modeling_llama as l; l.LlamaMLP.forward = lambda *a: 1 / 0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    pytest.importorskip("decord")  # lmms-eval's llava_hf imports it
    root = tmp_path_factory.mktemp("lmms_eval")
    fileset.write_hf(root / "model")
    fileset.write_hf(root / "shallow", layers=3)
    fileset.write_pope(root)
    fast = root / "fast"
    fast.mkdir()
    (fast / "rprobe_fast.yaml").write_text(
        f"include: {eval_tasks_dir() / 'rprobe' / 'rprobe.yaml'}\ntask: rprobe_fast\nmetadata:\n  version: 1.0\n"
        "  settings: {steps: 3, train_pages: 6, heldout_pages: 4, batch_size: 4}\n"
    )
    return root


def lmms_eval(root: Path, tasks: str, model: str, before: str = "pass", **environment: str) -> Any:
    command = [
        sys.executable, "-c", START.format(before=before), "--model", "llava_hf", "--device", "cpu",
        "--batch_size", "1",
        "--model_args", f"pretrained={root / model},device_map=cpu", "--tasks", tasks, "--include_path", "fast",
        "--gen_kwargs", "max_new_tokens=2", "--limit", "2", "--output_path", "out", "--log_samples",
    ]  # fmt: skip
    own = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(own), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": paths, **offline, **environment}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def test_our_tasks_beside_a_stock_one_on_a_patched_model(folder: Path) -> None:
    done = lmms_eval(folder, "saturation,rprobe_fast,pope", "model", LLAVA_PATCH_GIN_PARAM="Routing.split=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (folder / "out").glob("*/*_results.json")
    table = json.loads(written.read_text())["results"]
    assert table["rprobe_fast"]["rprobe_mse,none"] > 0 and table["saturation"]["attention_mass_final,none"] > 0
    assert "pope_accuracy,none" in table["pope"]
    for name in ("rprobe_fast", "saturation", "pope"):
        (samples,) = written.parent.glob(f"*_samples_{name}.jsonl")
        assert len(samples.read_text().splitlines()) == 2
    saturation = json.loads((written.parent / "saturation" / "saturation.json").read_text())
    assert "routed (lf, split 2), and layers 2..2 have no image states" in saturation["reason"]
    assert saturation["patch"]["split"] == 2
    assert (written.parent / "rprobe_fast" / "rprobe.png").is_file()
    for metric in ("rprobe_psnr", "recommended_split", "pope_accuracy"):
        assert metric in done.stdout


@pytest.mark.parametrize(
    "tasks, model, before, environment, message",
    [
        ("pope", "model", BREAK, {"LLAVA_PATCH_GIN_PARAM": "Routing.split=2"}, "patched model .* failed: ZeroDivision"),
        ("rprobe_fast", "shallow", "pass", {}, "llava_patch task failed: HostError"),
    ],
    ids=["broken patch", "our task"],
)
def test_failures_end_with_a_non_zero_status(
    folder: Path, tasks: str, model: str, before: str, environment: dict[str, str], message: str
) -> None:
    done = lmms_eval(folder, tasks, model, before, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "|Tasks|" not in done.stdout.replace(" ", "")
