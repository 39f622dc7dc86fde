"""The command line end to end, in processes of its own; each start costs a quarter of a minute."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llava_patch.core.paths import eval_tasks_dir
from tests.support import fileset, llava_tree
from tests.support.paths import ROOT
from tests.support.release import write_fileset
from tests.support.tiny_train import TEXT, VISION

# The start-up hook comes with an installed package; importing llava_patch first does the same.
START = (
    "import runpy, sys, llava_patch\n{before}\nsys.argv[0] = 'lmms_eval'\n"
    "runpy.run_module('lmms_eval', run_name='__main__', alter_sys=True)\n"
)
TWO_RANKS = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "lmms_eval"]
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


IS_NEXT = llava_tree.is_next()
MORE_WORDS = {"llava_onevision": ",conv_template=vicuna_v1,attn_implementation=sdpa"}
LIMIT = 3  # of two processes one gets an example more


def lmms_eval(
    root: Path, tasks: str, model: str, before: str = "pass", host: str = "llava_hf", ranks: int = 1, **environment: str
) -> Any:
    out, device = f"out-{host}-{ranks}", "cpu" if host == "llava_hf" else "auto"  # their "cpu" is a GPU on llava
    words = f"pretrained={root / model},device_map={device}" + MORE_WORDS.get(host, "")
    start = root / "start.py"
    start.write_text(START.format(before=before))
    launch = [sys.executable] if ranks == 1 else TWO_RANKS[:-2]
    command = [
        *launch, str(start), "--model", host, "--device", "cpu", "--batch_size", "1",
        "--model_args", words, "--tasks", tasks, "--include_path", "fast",
        "--gen_kwargs", "max_new_tokens=2", "--limit", str(LIMIT), "--output_path", out, "--log_samples",
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": paths, **offline, **environment}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def _llava(folder: Path) -> str:
    files = write_fileset(folder / "set", vision=VISION, text={**TEXT, "num_hidden_layers": 4}, vocab_size=512)
    return str(files.llava)


TASKS, PATCHED = "saturation,rprobe_fast,pope", {"LLAVA_PATCH_GIN_PARAM": "Routing.split=2"}


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Any:
    return lmms_eval(folder, TASKS, "model", **PATCHED)


def _results(folder: Path, host: str, ranks: int = 1) -> tuple[Path, dict[str, Any]]:
    (written,) = (folder / f"out-{host}-{ranks}").glob("*/*_results.json")
    return written, json.loads(written.read_text())["results"]


@pytest.mark.parametrize("host", ["hf", "llava"])
def test_our_tasks_beside_a_stock_one_on_a_patched_model(host: str, folder: Path, request: Any) -> None:
    name = "llava_hf" if host == "hf" else "llava_onevision" if IS_NEXT else "llava"
    if host == "hf":
        done = request.getfixturevalue("one_process")
    else:
        done = lmms_eval(folder, TASKS, _llava(folder), host=name, **PATCHED)
    assert done.returncode == 0, done.stdout + done.stderr
    written, table = _results(folder, name)
    assert table["rprobe_fast"]["rprobe_mse,none"] > 0 and table["saturation"]["attention_mass_final,none"] > 0
    assert "pope_accuracy,none" in table["pope"]
    for name in TASKS.split(","):
        (samples,) = written.parent.glob(f"*_samples_{name}.jsonl")
        assert len(samples.read_text().splitlines()) == (2 if name == "pope" else LIMIT)  # POPE here has two
    saturation = json.loads((written.parent / "saturation" / "saturation.json").read_text())
    assert "routed (lf, split 2), and layers 2..2 have no image states" in saturation["reason"]
    assert saturation["patch"]["split"] == 2
    assert (written.parent / "rprobe_fast" / "rprobe.png").is_file()
    for metric in ("rprobe_psnr", "recommended_split", "pope_accuracy"):
        assert metric in done.stdout


def test_two_processes_give_the_numbers_of_one(folder: Path, one_process: Any) -> None:
    """R-Probe's gradients are means of the ranks': sums in another order."""
    done = lmms_eval(folder, TASKS, "model", ranks=2, ACCELERATE_USE_CPU="true", **PATCHED)
    assert done.returncode == 0 and one_process.returncode == 0, done.stdout + done.stderr
    (_, expected), (_, found) = _results(folder, "llava_hf"), _results(folder, "llava_hf", ranks=2)
    for task in TASKS.split(","):
        numbers = {name: value for name, value in expected[task].items() if isinstance(value, float)}
        assert numbers and {name: found[task][name] for name in numbers} == pytest.approx(
            numbers, rel=1e-6, nan_ok=True
        )


# Appended to every start of Python in the runs below: the start-up hook, as an installed package has it, and faults.
SITE = """
import os, sys
import llava_patch
if "module" in os.environ["FAULTS"]:  # as with a release of filelock that lmms-eval does not know
    import filelock
    sys.modules["filelock._api"] = None
if "generate" in os.environ["FAULTS"]:
    class Late:
        def find_spec(self, name, path=None, target=None):
            if name == "transformers.models.llava.modeling_llava":
                from transformers import GenerationMixin
                GenerationMixin.generate = lambda *args, **kwargs: 1 / 0
    sys.meta_path.insert(0, Late())
"""
SCRIPT, MODULE = ["lmms-eval"], [sys.executable, "-m", "lmms_eval"]
OWN = [sys.executable, "-c", "from lmms_eval.__main__ import cli_evaluate as run; run()"]
LAUNCHED = ["accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "lmms_eval"]
# name: (how it is started, --tasks, checkpoint, other arguments, environment, exit status, the end of the last line)
FAILING: dict[str, tuple[list[str], str, str, list[str], dict[str, str], int, str]] = {
    "our task": (SCRIPT, "saturation", "model", [], {"FAULTS": "module"}, 1, "filelock._api"),
    "our group": (LAUNCHED, "rprobe_ablation", "model", [], {"FAULTS": "module"}, 1, "filelock._api"),
    "patched checkpoint": (MODULE, "pope", "patched", [], {"FAULTS": "module"}, 1, "filelock._api"),
    "configured patch": (SCRIPT, "pope", "model", [], {"FAULTS": "module", **PATCHED}, 1, "filelock._api"),
    "flag": (MODULE, "pope", "model", ["--gin_param", "Routing.split=2"], {"FAULTS": "module"}, 1, "filelock._api"),
    "two ranks": (TWO_RANKS, "saturation", "model", [], {"FAULTS": "module", "ACCELERATE_USE_CPU": "true"}, 1, ""),
    "neither": (SCRIPT, "pope", "model", [], {"FAULTS": "module"}, 0, ""),
    "a device that is not there": (SCRIPT, "pope", "patched", ["--device", "cuda:99"], {}, 1, "Error: "),
    "a program of one's own": (OWN, "pope", "patched", [], {"FAULTS": "module"}, 1, "filelock._api"),
    "before the evaluation": (SCRIPT, "saturation", "model", ["--log_samples"], {}, 1, "no table of results came out"),
    "swallowed in generate": (SCRIPT, "saturation,pope", "model", [], {"FAULTS": "generate"}, 1, "ZeroDivisionError"),
    "results not written": (SCRIPT, "pope", "patched", ["--output_path", "a_file/x"], {}, 1, "no results file"),
}  # fmt: skip


def _start(root: Path, name: str) -> Any:
    start, tasks, model, more, environment, _, _ = FAILING[name]
    arguments = ["--model", "llava_hf", "--model_args", f"pretrained={root / model},device_map=cpu", "--device", "cpu"]
    arguments += ["--tasks", tasks, "--limit", "2", "--gen_kwargs", "max_new_tokens=2", *more]
    found = os.pathsep.join([str(root / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PATH": here, "PYTHONPATH": found, "FAULTS": "", **offline, **environment}
    return subprocess.run(
        [*start, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, Any]:
    """All of them, two at a time."""
    from llava_patch import Routing, patch

    model = fileset.hf_model()
    patch(model, routing=Routing(split=2))
    model.save_pretrained(folder / "patched")
    fileset.processor().save_pretrained(folder / "patched")
    (folder / "a_file").touch()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAILING, pool.map(lambda name: _start(folder, name), FAILING), strict=True))


@pytest.mark.parametrize("name", FAILING)
def test_a_command_that_failed_anywhere_exits_non_zero_where_llava_patch_takes_part(
    name: str, ended: dict[str, Any]
) -> None:
    start, tasks, *_, status, message = FAILING[name]
    done = ended[name]
    assert done.returncode == status, done.stdout + done.stderr
    opening = "llava_patch: this evaluation failed: "
    if start is OWN:
        opening = f"llava_patch.integrations.lmms_eval.command.EvaluationFailure: {opening}"
    said = [line for line in done.stderr.splitlines() if line.startswith(opening)]
    if status == 0:  # as lmms-eval does it
        assert "filelock._api" in done.stderr and not said
        return
    assert (
        message in said[0]
        and f"the command was: {'python -m lmms_eval' if '-m' in start else '-c' if start is OWN else 'lmms-eval'} --"
        in said[0]
    )
    assert f"--tasks {tasks}" in said[0]
    if start in (SCRIPT, MODULE, OWN):  # launchers have last words of their own
        assert done.stderr.splitlines()[-1] == said[0] and len(said) == 1


@pytest.mark.parametrize(
    "tasks, model, before, environment, message",
    [
        ("pope", "model", BREAK, {"LLAVA_PATCH_GIN_PARAM": "Routing.split=2"}, "patched model .* failed: ZeroDivision"),
        (
            "rprobe_fast",
            "shallow",
            "pass",
            {},
            "this evaluation failed: HostError.*the command was: lmms-eval --model llava_hf .*--tasks rprobe_fast",
        ),
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
