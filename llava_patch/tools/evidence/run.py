"""Does the runs that are missing, several at a time, each in a process with one thread: the same command, same numbers.

A run's result is kept as soon as it is there, with a key of everything that decides it: its code, the versions, the
tier and the keys of the runs that it needs. The same command again goes on from there.
"""

import concurrent.futures
import datetime
import importlib.metadata
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError, SettingError, brief
from llava_patch.core.files import digest, write_json
from llava_patch.core.stored import read_object
from llava_patch.core.version import __version__
from llava_patch.tools.evidence import study
from llava_patch.tools.evidence.study import Context, Run, Size, Study

KEPT = "evidence.json"
FORMAT = 1
_PACKAGES = ("torch", "transformers", "peft", "numpy", "pillow", "matplotlib", "scipy")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Task:
    """A run for one seed: its full name and the key of what decides its result."""

    study: str
    run: Run
    seed: int
    key: str

    @property
    def name(self) -> str:
        """Full name of the run."""
        return f"{self.study}/{self.run.name}"

    @property
    def label(self) -> str:
        """Name and seed."""
        return f"{self.name}, seed {self.seed}"


def chosen(only: Sequence[str]) -> list[Study]:
    """The studies that are asked for, in the report's order.

    Raises:
        SettingError: a name that no study has.
    """
    for name in only:
        if name not in study.STUDIES:
            raise SettingError(f"--only {name}: expected one of {', '.join(study.STUDIES)}")
    return [study.read(name) for name in study.STUDIES if not only or name in only]


def tasks(studies: Sequence[Study], size: Size, quick: bool, device: str) -> dict[tuple[str, int], Task]:
    """Everything that is to be done, with what it needs from other studies, by full name and seed."""
    every = {name: run for one in map(study.read, study.STUDIES) for name, run in one.runs.items()}
    wanted: dict[str, Run] = {}

    def want(name: str) -> None:
        for needed in every[name].needs:
            want(needed)
        wanted.setdefault(name, every[name])

    for one in studies:
        for name, run in one.runs.items():
            if run.quick or not quick:
                want(name)
    shared = [versions(), size.name, size.scale, device.partition(":")[0]]
    sources = {name: run.sources() for name, run in wanted.items()}
    found: dict[tuple[str, int], Task] = {}
    for seed in range(size.seeds):
        for name, run in wanted.items():
            before = [found[needed, seed].key for needed in run.needs]
            key = digest([shared, name, seed, sources[name], before])
            found[name, seed] = Task(name.partition("/")[0], run, seed, key)
    return found


def versions() -> dict[str, str]:
    """What decides numbers beside the code here."""
    found = {"llava_patch": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def kept(folder: Path, task: Task) -> dict[str, Any] | None:
    """What an earlier run left of a task, if it is of the same key and the weights that it kept are there."""
    path = study.run_path(folder, task.name, task.seed)
    if not path.is_file():
        return None
    try:
        record = read_object(path)
        weights = study.weights_path(folder, task.name, task.seed)
        whole = record["key"] == task.key and (weights.is_file() or not record["weights"])
        return {**record, "result": dict(record["result"])} if whole else None
    except (CheckpointError, KeyError, TypeError, ValueError):  # damaged: it is done again
        return None


def do(
    every: Mapping[tuple[str, int], Task],
    folder: Path,
    size: Size,
    device: str,
    jobs: int,
    minutes: float | None,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Do what is missing, what others wait for longest first.

    Args:
        every: of `tasks`.
        folder: for `runs` and `weights`.
        size: the tier.
        device: of every run.
        jobs: processes at a time.
        minutes: after so many nothing more is begun; None: all is done.
        say: gets a line for each run that ends.

    Returns:
        What failed, by label, with the reason; runs that need a failed one are not tried.
    """
    left = {place: task for place, task in every.items() if kept(folder, task) is None}
    done = {place for place in every if place not in left}
    if not left:
        return {}
    weight = _urgency(every)
    failed: dict[str, str] = {}
    began, total = time.monotonic(), len(left)
    os.environ.update(_ONE_THREAD)  # before the processes start, which read it when they load torch
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin) as pool:
        running: dict[concurrent.futures.Future[dict[str, Any]], tuple[str, int]] = {}
        try:
            while left or running:
                late = minutes is not None and time.monotonic() - began > 60 * minutes
                ready = [p for p, task in left.items() if all((needed, p[1]) in done for needed in task.run.needs)]
                for place in sorted(ready, key=lambda p: (-weight[p], p))[: 0 if late else jobs - len(running)]:
                    running[pool.submit(_work, left.pop(place), folder, size, device)] = place
                if not running:
                    break
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    place = running.pop(future)
                    record, label = future.result(), every[place].label
                    if "error" in record:
                        failed[label] = record["error"]
                        say(f"{label}: failed ({record['error']})")
                    else:
                        done.add(place)
                        say(f"{total - len(left) - len(running)} of {total}: {label}, {record['seconds']:.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failed


def _urgency(every: Mapping[tuple[str, int], Task]) -> dict[tuple[str, int], float]:
    """Seconds of the longest chain of runs that begins with each."""
    after: dict[tuple[str, int], list[tuple[str, int]]] = {place: [] for place in every}
    for (name, seed), task in every.items():
        for needed in task.run.needs:
            after[needed, seed].append((name, seed))
    found: dict[tuple[str, int], float] = {}
    for place in reversed(list(every)):  # what is needed stands before what needs it
        found[place] = every[place].run.seconds + max((found[later] for later in after[place]), default=0.0)
    return found


def _begin() -> None:
    """Prepare a process: one thread, so that sums have one order, and no chatter."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _work(task: Task, folder: Path, size: Size, device: str) -> dict[str, Any]:
    """One task; its record, or {"error"} in words."""
    import random

    import numpy as np
    import torch

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(task.seed)
    began = time.process_time()  # of this one thread, whatever else the machine does
    try:
        result = task.run.work(Context(task.seed, size, torch.device(device), folder, task.name))
        record = {
            "run": task.name, "seed": task.seed, "key": task.key, "seconds": round(time.process_time() - began, 1),
            "weights": study.weights_path(folder, task.name, task.seed).is_file(), "result": result,
        }  # fmt: skip
        write_json(study.run_path(folder, task.name, task.seed), record)
        return record
    except Exception as error:
        path = study.run_path(folder, task.name, task.seed).with_suffix(".log")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
        return {"error": f"{type(error).__name__}: {brief(error)}; where: {path}"}


def collect(every: Mapping[tuple[str, int], Task], folder: Path, size: Size, machine: str) -> dict[str, Any]:
    """Everything that is there, as `evidence.json` has it: by run the results of its seeds, in order."""
    runs: dict[str, Any] = {}
    names = list(dict.fromkeys(name for name, _ in every))
    for (name, seed), task in sorted(every.items(), key=lambda item: names.index(item[0][0])):
        if (record := kept(folder, task)) is not None:
            one = runs.setdefault(name, {"seeds": [], "seconds": [], "results": []})
            one["seeds"].append(seed)
            one["seconds"].append(record["seconds"])
            one["results"].append(record["result"])
    return {
        "format": FORMAT, "size": size.name, "seeds": size.seeds, "machine": machine, "versions": versions(),
        "date": datetime.date.today().isoformat(), "asked": len(every), "runs": runs,
    }  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """A file that `collect` gave.

    Raises:
        CheckpointError: it is not there, damaged, or of another format.
    """
    values = read_object(path)
    if values.get("format") != FORMAT or not isinstance(values.get("runs"), dict):
        raise CheckpointError(f"{path}: not this version's evidence: measure it again")
    return values


def with_seeds(size: Size, seeds: int | None) -> Size:
    """The tier with another number of seeds."""
    return size if seeds is None else replace(size, seeds=seeds)
