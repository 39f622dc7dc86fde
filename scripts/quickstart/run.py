"""The main job, from an empty folder to one table; every step is skipped when its result is already there.

`python -m quickstart.run OUT`: a small LLaVA-1.5 is trained until it reads; LLaVA's own train.py trains Detached
Skip-Links (stage 1) and DPVR-LF (stage 2) through appended gin flags; exact match, R-Probe, saturation, POPE and MME
judge the stock and the patched checkpoint, and a report draws every diagnostic of the patched one.
"""

import argparse
import importlib.metadata
import importlib.util
import shutil
import sys
import time
from pathlib import Path

from . import table
from .base import RECORD
from .data import TrainingData
from .evaldata import shards
from .fileset import FileSet
from .steps import Lacking, Steps, console, found, json_with, lmms_results, losses, metric

SCRIPTS = Path(__file__).resolve().parent
STAGE1_FLAGS = ["--gin_param", "SkipLinks.stride = 2"]
STAGE2_FLAGS = [*STAGE1_FLAGS, "--gin_file", "dpvr_lf_small.gin"]
PINNED = ("torch", "transformers", "llava-torch", "lmms_eval", "llava_patch")
TASKS = "rprobe,saturation,pope,mme"
READ = ("exact_match", "exact_match_other_image")  # what read_*.json must hold; and beside it, of either checkpoint:
READ_OF = {"stock": ("prefill",), "patched": ("trainable", "exact_match_side_other_image")}


def _fresh(folder: Path) -> Path:
    # LLaVA resumes from whatever an interrupted run left; a step starts from nothing.
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def trained(run: Path) -> None:
    """A training stage: every step has a finite loss, and the run's own records are there.

    Raises:
        Lacking: what is not there.
    """
    losses(run)
    json_with(run / "config.json", "llava_patch")
    json_with(run / "llava_patch.json")


def evaluated(folder: Path) -> None:
    """An evaluation: each number of the closing table, and the samples, results and figures of its tasks.

    Raises:
        Lacking: what is not there.
    """
    results = lmms_results(folder, TASKS.split(","))
    for _, task, name, _ in table.METRICS:
        metric(results, task, name)
    for task in TASKS.split(","):
        found(folder, f"*/*_samples_{task}.jsonl")
    for task in ("rprobe", "saturation"):
        json_with(found(folder, f"*/{task}/{task}.json"))
        found(folder, f"*/{task}/{task}.png")


def reported(page: Path) -> None:
    """A report: it is whole, and none of its sections failed.

    Raises:
        Lacking: what is not there.
    """
    sections = json_with(page.with_name("report.json"), "sections")["sections"]
    failed = [section["name"] for section in sections if section["state"] == "failed"]
    if failed or not sections or not page.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise Lacking(f"{page} is not whole" + (f": {', '.join(failed)} failed" if failed else ""))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows for exact match")
    args = parser.parse_args()
    if args.rows < 2:
        parser.error(f"--rows {args.rows}: at least 2 are needed, one for the other's image")
    out = args.out.resolve()
    sources = [p.read_text() for p in sorted(SCRIPTS.glob("*.*")) if p.suffix in (".py", ".sh")]
    versions = [f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name in PINNED]
    steps = Steps(out, [sources, sorted(versions), STAGE1_FLAGS, STAGE2_FLAGS, args.rows])
    base, stage1, patched = out / "base", out / "stage1", out / "llava-v1.5-small-patched"
    stock = base / "llava-v1.5-small"
    spec = importlib.util.find_spec("llava")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the llava package is not installed: run scripts/quickstart.sh, which installs it")
    env = {"LLAVA": spec.submodule_search_locations[0], "BASE": base, "STAGE1": stage1}
    python = sys.executable

    def base_model() -> None:
        # Its own progress bars; it skips itself when it has finished before.
        steps.shown([python, "-m", "quickstart.base", str(base)], cwd=SCRIPTS.parent)
        steps.shown([python, "-m", "quickstart.evaldata", str(out / "data")], cwd=SCRIPTS.parent)

    def train(name: str, script: str, folder: Path, flags: list[str]) -> None:
        _fresh(folder)
        steps.command(name, ["bash", str(SCRIPTS / script), *flags], **env, OUT=folder)

    def read(name: str, checkpoint: Path, *flags: str) -> None:
        command = [python, "-m", "quickstart.measure", str(checkpoint), str(base), str(out / f"{name}.json"), *flags]
        steps.command(name, [*command, "--rows", str(args.rows)], cwd=SCRIPTS.parent)

    def evaluate(name: str, checkpoint: Path) -> None:
        _fresh(out / name)
        command = [python, "-m", "lmms_eval", "--model", "llava", "--tasks", TASKS, "--device", "cpu"]
        command += ["--model_args", f"pretrained={checkpoint},device_map=auto", "--batch_size", "1"]
        steps.command(name, [*command, "--log_samples", "--output_path", str(out / name)], cwd=out / "data")

    def report() -> None:
        # What an interrupted run has finished is kept, so the folder is not emptied.
        measured = found(out / "eval_patched", "*/rprobe/rprobe.json").parent  # lmms-eval has just run R-Probe
        data = f"{base / 'v1.json'}?images={base / 'images'}"
        command = [python, "-m", "llava_patch.cli.main", "report", str(patched), data]
        command += ["--base", str(stock), "--rprobe", str(measured), "--output", str(out / "report")]
        steps.command("report", command)

    files, data = FileSet.at(base), TrainingData.at(base)
    steps.run(
        "base", "1/8 small LLaVA-1.5 that reads three digits, and its data", base_model,
        [base / RECORD, *files.paths(), data.images, data.plain, data.v1, data.read_test, *shards(out / "data")],
        lambda: json_with(base / RECORD, "parameters"),
    )  # fmt: skip
    steps.run(
        "stage1", "2/8 stage 1, train.py: projector with Detached Skip-Links",
        lambda: train("stage1", "pretrain.sh", stage1, STAGE1_FLAGS), [stage1 / "mm_projector.bin"],
        lambda: trained(stage1),
    )  # fmt: skip
    steps.run(
        "stage2", "3/8 stage 2, train.py: DPVR-LF side branch",
        lambda: train("stage2", "finetune.sh", patched, STAGE2_FLAGS),
        [patched / "model.safetensors", patched / "llava_patch_adapter" / "llava_patch.safetensors"],
        lambda: trained(patched),
    )  # fmt: skip
    for name, checkpoint, place, flag in (("stock", stock, 4, ["--prefill"]), ("patched", patched, 5, [])):
        record = out / f"read_{name}.json"
        steps.run(
            f"read_{name}", f"{place}/8 exact match, {name}",
            lambda n=name, c=checkpoint, f=flag: read(f"read_{n}", c, *f), [record],
            lambda n=name, r=record: json_with(r, *READ, *READ_OF[n]),
        )  # fmt: skip
    for name, checkpoint, title in (
        ("eval_stock", stock, f"6/8 lmms-eval {TASKS}, stock"),
        ("eval_patched", patched, "7/8 the same, patched"),
    ):
        steps.run(
            name, title, lambda n=name, c=checkpoint: evaluate(n, c), [out / name],
            lambda n=name: evaluated(out / n),
        )  # fmt: skip
    page = out / "report" / "report.html"
    steps.run(
        "report", "8/8 llava-patch report: every diagnostic of the patched checkpoint", report, [page],
        lambda: reported(page),
    )  # fmt: skip
    console.print(table.build(out, base, stage1, patched))
    for line in table.closing(out, patched, page):
        console.print(line, soft_wrap=True)
    console.print(f"{(time.time() - steps.started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
