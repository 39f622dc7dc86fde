"""The main job, from an empty folder to one table; every step is skipped when its result is already there.

`python -m quickstart.run OUT`: a small LLaVA-1.5 is trained until it reads; LLaVA's own train.py trains Detached
Skip-Links (stage 1) and DPVR-LF (stage 2) through appended gin flags; exact match, R-Probe, saturation, POPE and MME
judge the stock and the patched checkpoint, and a report draws every diagnostic of the patched one.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from . import table
from .fileset import write_atomically

SCRIPTS = Path(__file__).resolve().parent
STAGE1_FLAGS = ["--gin_param", "SkipLinks.stride = 2"]
STAGE2_FLAGS = [*STAGE1_FLAGS, "--gin_file", "dpvr_lf_small.gin"]
PINNED = ("torch", "transformers", "llava-torch", "lmms_eval", "llava_patch")
TASKS = "rprobe,saturation,pope,mme"
console = Console()


class Steps:
    """Runs the steps of one output folder, each at most once for the same inputs."""

    def __init__(self, out: Path, inputs: object) -> None:
        """Start.

        Args:
            out: the folder.
            inputs: JSON values; when they change every step is run again.
        """
        self.out = out
        self.key = json.dumps(inputs, sort_keys=True, default=str)
        self.started = time.time()
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, name: str, title: str, work: Callable[[], None], makes: Path) -> None:
        """Run a step unless it is done.

        Args:
            name: of its marker and log.
            title: shown to the user.
            work: does it, and raises when it fails.
            makes: a file that the step leaves; without it the step is run again.
        """
        marker = self.out / f"{name}.done"
        self.key = hashlib.sha256(f"{self.key} {name}".encode()).hexdigest()
        if marker.is_file() and marker.read_text() == self.key and makes.exists():
            console.print(f"[green]done before[/] {title}")
            return
        marker.unlink(missing_ok=True)
        start = time.time()
        console.print(f"[bold]{title}[/]")
        work()
        write_atomically(marker, self.key.encode())
        console.print(f"  [green]{time.time() - start:.0f} s[/] (in all {(time.time() - self.started) / 60:.1f} min)")

    def command(self, name: str, command: list[str], cwd: Path | None = None, **env: object) -> None:
        """Run a command with its output in logs/NAME.log and its last line on the screen; raise when it fails."""
        log = self.out / "logs" / f"{name}.log"
        environment = {**os.environ, **{k: str(v) for k, v in env.items()}}
        with log.open("w") as stream, console.status("  starting") as status:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment,
                bufsize=1, errors="replace",
            )  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                stream.write(line)
                if line.strip():
                    status.update("  " + line.strip().split("\r")[-1][: console.width - 8].replace("[", r"\["))
            code = process.wait()
        if code != 0:
            tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
            raise SystemExit(f"{name} failed (exit {code}); the end of {log}:\n{tail}")


def _fresh(folder: Path) -> Path:
    # LLaVA resumes from whatever an interrupted run left; a step starts from nothing.
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows for exact match")
    args = parser.parse_args()
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
        subprocess.run([python, "-m", "quickstart.base", str(base)], check=True, cwd=SCRIPTS.parent)
        subprocess.run([python, "-m", "quickstart.evaldata", str(out / "data")], check=True, cwd=SCRIPTS.parent)

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
        measured = max((out / "eval_patched").glob("*/rprobe/rprobe.json")).parent  # lmms-eval has just run R-Probe
        command = [
            python,
            "-m",
            "llava_patch.cli",
            "report",
            str(patched),
            f"{base / 'v1.json'}?images={base / 'images'}",
        ]
        command += ["--base", str(stock), "--rprobe", str(measured), "--output", str(out / "report")]
        steps.command("report", command)

    steps.run("base", "1/8 small LLaVA-1.5 that reads three digits, and its data", base_model, base / "base.json")
    steps.run(
        "stage1", "2/8 stage 1, train.py: projector with Detached Skip-Links",
        lambda: train("stage1", "pretrain.sh", stage1, STAGE1_FLAGS), stage1 / "mm_projector.bin",
    )  # fmt: skip
    steps.run(
        "stage2", "3/8 stage 2, train.py: DPVR-LF side branch",
        lambda: train("stage2", "finetune.sh", patched, STAGE2_FLAGS), patched / "model.safetensors",
    )  # fmt: skip
    steps.run(
        "read_stock", "4/8 exact match, stock", lambda: read("read_stock", stock, "--prefill"), out / "read_stock.json"
    )
    steps.run(
        "read_patched", "5/8 exact match, patched", lambda: read("read_patched", patched), out / "read_patched.json"
    )
    steps.run("eval_stock", f"6/8 lmms-eval {TASKS}, stock", lambda: evaluate("eval_stock", stock), out / "eval_stock")
    steps.run("eval_patched", "7/8 the same, patched", lambda: evaluate("eval_patched", patched), out / "eval_patched")
    page = out / "report" / "report.html"
    steps.run("report", "8/8 llava-patch report: every diagnostic of the patched checkpoint", report, page)
    console.print(table.build(out, base, stage1, patched))
    for line in table.closing(out, patched, page):
        console.print(line, soft_wrap=True)
    console.print(f"{(time.time() - steps.started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
