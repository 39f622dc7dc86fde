"""Long jobs that are killed: `python -m tests.reliability.kills [JOB...] --kills N --seed S`.

Each job is the real command. It runs once to its end; then, N times, in a new folder: it is killed by SIGKILL at a
random moment of its usual duration and started again until it ends. What it leaves must equal what the first run left
(tensors exactly, JSON but for times), or the second start must refuse and say what to delete, which is then deleted.
Every other kill falls beside a moment at which the first run changed its files, the others are spread over all of it.

The packages are imported once: jobs are forks of that process, each in a session of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core.errors import LlavaPatchError
from tests.support.paths import ROOT

OUT = "out"
STARTS = 60
"""Of one job, refused ones included; a folder may be busy for a while with what a killed sweep had started."""
TIMES = re.compile(r"time|seconds|per_second|flos|train_loss|duration|elapsed|created|run_id|uuid")
PASSED_OVER = re.compile(r"(^|/)(\.|unfinished-|checkpoint-|runs/|training_args\.bin|.*\.log$|.*\.png$|README\.md$)")


@dataclass
class Job:
    """A command that is killed."""

    prepare: Callable[[Path], None]  # writes what it reads into a folder
    run: Callable[[Path, Path], None]  # (that folder, the folder that it is run in): writes OUT there
    # (that folder, the folder that it was run in) right after a kill: why what lies there is wrong, or ""
    look: Callable[[Path, Path], str] | None = None


def command(*words: Any) -> None:
    """`llava-patch` with these words, in this process."""
    from llava_patch.cli.main import main

    sys.argv = ["llava-patch", *map(str, words)]
    main()


# --- the jobs ---------------------------------------------------------------------------------------------------------


def prepare_train(fixture: Path) -> None:
    from tests.support.tiny_train import make_data

    make_data(fixture)


def run_train(fixture: Path, place: Path) -> None:
    """LLaVA's own train.py, stage 2 with a fusion and a routing that gin configures; a checkpoint each step."""
    from llava.train.train import train

    from llava_patch.settings import active
    from tests.support import tiny_train
    from tests.support.release import FileSet

    names = ("clip-vit-small-56", "vicuna-small", "mm_projector.bin", "llava-v1.5-small", "llava-1.5-small-hf")
    data = fixture, FileSet(*(fixture / "set" / name for name in names))
    settings = {"save_steps": 1, "save_total_limit": 2, "warmup_ratio": None, "evaluation_strategy": None,
                "dataloader_num_workers": 0}  # fmt: skip
    sys.argv = ["train.py", *tiny_train.arguments(data, 2, OUT, steps=4, **settings)]
    os.environ["LLAVA_PATCH_GIN_PARAM"] = 'SkipLinks.stride = 2;Routing.split = 3;Routing.freeze = "none"'
    active.reset()
    active.begin_training()
    train()


def prepare_stock(fixture: Path) -> None:
    from tests.support import fileset

    fileset.write_hf(fixture / "model")


def run_rprobe(fixture: Path, place: Path) -> None:
    words = ("--steps", 24, "--train-pages", 8, "--heldout-pages", 4, "--batch-size", 4)
    command("rprobe", fixture / "model", *words, "--gin-param", "RProbe.save_every = 4", "--output", OUT)


def run_saturation(fixture: Path, place: Path) -> None:
    command("saturation", fixture / "model", "--samples", 12, "--output", OUT)


def prepare_convert(fixture: Path) -> None:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from llava_patch import Routing, patch
    from tests.support import tiny_train
    from tests.support.release import write_fileset

    sizes = {"vision": tiny_train.VISION, "text": tiny_train.TEXT}
    files = write_fileset(fixture / "set", **sizes, vocab_size=512)
    model = LlavaForConditionalGeneration.from_pretrained(files.hf)
    with patch(model, routing=Routing(split=2)) as handle:
        handle.save(fixture / "patched", form="full")
    LlavaProcessor.from_pretrained(files.hf).save_pretrained(fixture / "patched")


def run_convert(fixture: Path, place: Path) -> None:
    command("convert", fixture / "patched", "--to", "llava", "--output", OUT)


def prepare_sweep(fixture: Path) -> None:
    (fixture / "sweep.gin").write_text(
        'Sweep.gin_files = ("dpvr_lf_small.gin",)\nSweep.grid = {"Routing.split": (3, 5)}\nSweep.seeds = (1, 2)\n'
    )


def run_sweep(fixture: Path, place: Path) -> None:
    script = [sys.executable, "-S", str(Path(__file__).with_name("small_trainer.py"))]
    evaluation = " ".join([*script, "--evaluated {checkpoint}"])
    command("sweep", fixture / "sweep.gin", "--output", OUT, "--evaluate", evaluation, "--", *script)


SAVES = 12


def run_save(fixture: Path, place: Path) -> None:
    """One folder, saved into again and again; weights and settings of each save belong together."""
    import torch

    from llava_patch import Routing, patch

    model = _stock(fixture)
    for number in range(1, SAVES + 1):
        with patch(model, routing=Routing(split=1 + number % 2)) as handle:
            with torch.no_grad():
                for parameter in handle.methods["routing"].parameters():
                    parameter.fill_(number)
            handle.save(place / OUT)


def look_at_save(fixture: Path, place: Path) -> str:
    """What lies there is one save's, or is refused."""
    from llava_patch import load
    from llava_patch.core.errors import LlavaPatchError

    if not (place / OUT).is_dir() or not any(path for path in (place / OUT).iterdir() if path.name[0] != "."):
        return ""
    try:
        handle = load(_stock(fixture), place / OUT)
    except LlavaPatchError as error:
        print(f"refused: {error}")
        return ""
    found = {float(value) for p in handle.methods["routing"].parameters() for value in p.flatten()[:1]}
    numbers = {int(value) for value in found}
    if len(numbers) != 1 or {1 + number % 2 for number in numbers} != {handle.routing.split}:
        return f"loads with weights of save {sorted(numbers)} and split {handle.routing.split}"
    return ""


def _stock(fixture: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(fixture / "model")


JOBS = {
    "train": Job(prepare_train, run_train),
    "rprobe": Job(prepare_stock, run_rprobe),
    "saturation": Job(prepare_stock, run_saturation),
    "sweep": Job(prepare_sweep, run_sweep),
    "convert": Job(prepare_convert, run_convert),
    "save": Job(prepare_stock, run_save, look_at_save),
}


# --- processes --------------------------------------------------------------------------------------------------------


def import_everything() -> None:
    """What the jobs import, once."""
    import llava.train.train  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llava.modeling_llava  # noqa: F401

    import tests.support.fileset
    import tests.support.tiny_train  # noqa: F401


def start(work: Callable[[], Any], place: Path, log: Path) -> int:
    """Do something in a fork, in its own session and folder; returns its process number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(place)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        _seed_anew()
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except LlavaPatchError as error:
        print(f"llava-patch: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _seed_anew() -> None:
    """As in a new process, which no fork's is."""
    import numpy as np

    random.seed()
    np.random.seed()


def descendants(process: int) -> list[int]:
    """Processes that a process has started, and so on."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [process]
    while waiting:
        waiting += parents.get(one := waiting.pop(), [])
        found.append(one)
    return found[1:]


def wait(process: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def in_fork(work: Callable[[], Any], place: Path, log: Path) -> tuple[int, str]:
    """Do something to its end: exit code, what it wrote."""
    begins = log.stat().st_size if log.exists() else 0
    code = wait(start(work, place, log))
    return code, log.read_bytes()[begins:].decode(errors="replace") if log.exists() else ""


# --- what a job left --------------------------------------------------------------------------------------------------


def outputs(folder: Path) -> dict[str, Any]:
    """Every file of a result by name, as what is compared."""
    newest = _newest(folder)
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        inside = name.removeprefix(f"{newest}/") if newest else name
        if path.is_file() and not PASSED_OVER.search(inside) and not name.endswith("rng_state.pth"):
            found[re.sub(r"\d{15,}", "N", name)] = _content(path, folder)
    return found


def _newest(folder: Path) -> str:
    numbers = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]
    return f"checkpoint-{max(numbers)}" if numbers else ""


_TOY = 500
"""Bytes: the files of small_trainer, which torch does not read."""


def _content(path: Path, folder: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return path.read_bytes() if path.stat().st_size < _TOY else torch.load(path, weights_only=True)
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text().replace(str(folder), OUT)))
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not TIMES.search(str(key))}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def difference(one: Any, other: Any, where: str = "") -> str:
    """Where two results differ; "" where they are equal."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return "" if same else f"{where}: other values"
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(map(str, one.keys() ^ other.keys()))[:4]} on one side alone"
        return next((text for key in one if (text := difference(one[key], other[key], f"{where}/{key}"))), "")
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return next((text for i, (a, b) in pairs if (text := difference(a, b, f"{where}/{i}"))), "")
    return "" if type(one) is type(other) and one == other else f"{where}: {str(one)[:60]} and {str(other)[:60]}"


# --- killing ----------------------------------------------------------------------------------------------------------


@dataclass
class Usual:
    """The uninterrupted run."""

    seconds: float = 0.0
    writes: list[float] = field(default_factory=list)  # moments at which files changed
    left: dict[str, Any] = field(default_factory=dict)


def signature(folder: Path) -> tuple[tuple[str, int], ...]:
    """The files below a folder and their sizes."""
    found = []
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                found.append((f"{root}/{name}", os.stat(f"{root}/{name}").st_size))
    return tuple(found)


def usual_run(job: Job, fixture: Path, place: Path) -> Usual:
    """Run a job to its end, and note when it wrote."""
    place.mkdir()
    log = place.with_suffix(".log")
    began, usual, before = time.monotonic(), Usual(), ()
    child = start(lambda: job.run(fixture, place), place, log)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        now = signature(place)
        if now != before:
            usual.writes.append(time.monotonic() - began)
            before = now
        if done:
            break
        time.sleep(0.001)
    usual.seconds = time.monotonic() - began
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"the uninterrupted run failed: {log.read_text()[-2000:]}")
    usual.left = outputs(place / OUT)
    return usual


def moment(usual: Usual, number: int, kills: int, chance: random.Random) -> float:
    """When to kill, in seconds from the start."""
    if number % 2 and usual.writes:
        return max(0.0, chance.choice(usual.writes) + chance.uniform(-0.01, 0.004))
    return usual.seconds * (number + chance.random()) / kills


def break_off(job: Job, fixture: Path, place: Path, after: float, whole: bool) -> bool:
    """Start a job and kill it, with all that it has started (`whole`) or alone; whether it had not ended before."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    began = time.monotonic()
    child = start(lambda: job.run(fixture, place), place, place.with_suffix(".log"))
    while time.monotonic() - began < after:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.0005)
    for victim in (child, *(descendants(child) if whole else [])):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def one_kill(job: Job, fixture: Path, place: Path, usual: Usual, after: float, whole: bool) -> tuple[str, str]:
    """Kill a job once and start it until it ends: ("equal", "refused" or "wrong", what was seen)."""
    while not break_off(job, fixture, place, after, whole):  # it was faster this time
        after *= 0.9
    log = place.with_suffix(".log")
    note = f"at {after:6.3f} s, {len(signature(place))} files"
    if job.look is not None:
        code, said = in_fork(lambda: _looked(job, fixture, place), place, log)
        last = (said.strip().splitlines() or [f"exit code {code}"])[-1][:200]
        if code:
            return "wrong", f"{note}; {last}"
        note += f"; {last}" if last.startswith("refused: ") else ""
    kind = "equal"
    for _ in range(STARTS):
        code, said = in_fork(lambda: job.run(fixture, place), place, log)
        if code == 0:
            unlike = difference(usual.left, _safely(place / OUT))
            return ("wrong", f"{note}; {unlike}") if unlike else (kind, note)
        line = next((text for text in reversed(said.splitlines()) if text.startswith("llava-patch: ")), "")
        if "still runs there" in line:
            time.sleep(0.05)
        elif not line or "unexpected" in line or OUT not in line:
            return "wrong", f"{note}; exit code {code}: {' '.join((line or said).split())[-300:]}"
        elif not difference(usual.left, _safely(place / OUT)):
            return kind, f"{note}; it is there already"
        else:
            kind, note = "refused", f"{note}; {line[:200]}"
            shutil.rmtree(place / OUT)  # what the refusal says
    return "wrong", f"{note}; it did not end in {STARTS} starts"


def _safely(folder: Path) -> Any:
    try:
        return outputs(folder)
    except Exception as error:
        return f"cannot be read: {type(error).__name__}: {error}"


def _looked(job: Job, fixture: Path, place: Path) -> int:
    assert job.look is not None
    text = job.look(fixture, place)
    if text:
        print(text)
    return int(bool(text))


def kill(name: str, kills: int, seed: int, root: Path) -> dict[str, int]:
    """Kill one job so many times; prints a line each."""
    job, chance = JOBS[name], random.Random(f"{name} {seed}")
    fixture = root / name / "fixture"
    fixture.mkdir(parents=True)
    code, said = in_fork(lambda: job.prepare(fixture), fixture, root / name / "fixture.log")
    if code:
        raise SystemExit(f"{name}: cannot be prepared: {said[-2000:]}")
    usual = usual_run(job, fixture, root / name / "usual")
    print(
        f"{name}: {usual.seconds:.2f} s uninterrupted, {len(usual.left)} files, {len(usual.writes)} changes", flush=True
    )
    counts = dict.fromkeys(("equal", "refused", "wrong"), 0)
    for number in range(kills):
        after = moment(usual, number, kills, chance)
        place = root / name / f"kill{number}"
        kind, note = one_kill(job, fixture, place, usual, after, whole=bool(number // 2 % 2))
        counts[kind] += 1
        print(f"{name} {number + 1:3}: {kind:7} {note}", flush=True)
        if kind != "wrong":
            shutil.rmtree(place, ignore_errors=True)
    return counts


def main() -> int:
    """Kill the jobs that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = sorted(set(options.jobs) - set(JOBS))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}, only {', '.join(JOBS)}")
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=str(ROOT))
    import_everything()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    table, began = {}, time.monotonic()
    for name in options.jobs or JOBS:
        table[name] = kill(name, options.kills, options.seed, root)
    print(f"\n{'job':12}{'equal':>8}{'refused':>9}{'wrong':>8}")
    for name, counts in table.items():
        print(f"{name:12}{counts['equal']:8}{counts['refused']:9}{counts['wrong']:8}")
    wrong = sum(counts["wrong"] for counts in table.values())
    print(f"{time.monotonic() - began:.0f} s" + (f"; what was wrong is in {root}" if wrong else ""))
    if not wrong:
        shutil.rmtree(root)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
