"""Which runs a sweep consists of, and everything about them that can be checked before the first one starts."""

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_patch.core.errors import SettingError
from llava_patch.settings import active
from llava_patch.settings import gin_config as config
from llava_patch.tools.sweep.settings import Sweep, describe, folder_name, meaning

TAKEN = ("seed", "output_dir")
"""Flags that the sweep itself sets for each run."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    point: dict[str, Any]  # {binding: value}
    seed: int  # of new weights and data order
    folder: Path  # its --output_dir
    base: tuple[str, ...]  # the user's launch command
    added: tuple[str, ...]  # what the sweep appends to it
    settings: tuple[str, ...]  # every value in use, as lines of gin, the defaults included
    baseline: bool = False  # whether it is a run of the point that the others are compared with

    @property
    def command(self) -> list[str]:
        """The whole command."""
        return [*self.base, *self.added]

    @property
    def name(self) -> str:
        """The run in words."""
        return f"{describe(self.point)}, seed {self.seed}"


def read_sweep(path: str) -> Sweep:
    """Read a sweep file, by path or shipped name."""
    read = config.read([path], [])
    if read.sweep is None:
        raise SettingError(f"{path}: describes no sweep; bind Sweep.grid and Sweep.gin_files")
    if read.patches or read.measurements or read.flags:
        raise SettingError(
            f"{path}: binds settings beside Sweep's own, which no run would take; put them into a file named in "
            "Sweep.gin_files, or into Sweep.gin_params"
        )
    return read.sweep


def make_plan(sweep: Sweep, seeds: Sequence[int], output: Path, command: Sequence[str]) -> list[Run]:
    """All runs, point by point; every point's configuration is parsed here."""
    for variable in (active.FILE_VARIABLE, active.PARAM_VARIABLE):
        if os.environ.get(variable):
            raise SettingError(f"{variable} is set and would reach every run: unset it, or use Sweep.gin_files")
    if not command:
        raise SettingError("no training command: put it after --, as in `-- deepspeed llava/train/train_mem.py ...`")
    if shutil.which(command[0]) is None:
        raise SettingError(f"{command[0]}: no such command")
    own_files, own_params = active.take_flags(list(command))
    runs, folders = [], dict[str, dict[str, Any]]()
    points = sweep.points()
    for number, point in enumerate(points):
        same = next((other for other in points[:number] if meaning(other) == meaning(point)), None)
        if same is not None:
            shown = "" if repr(same) == repr(point) else f", once as {describe(same)}"
            raise SettingError(f"Sweep.grid: {describe(point)} is there twice{shown}")
        params = [*sweep.gin_params, *(f"{key} = {value!r}" for key, value in point.items())]
        settings = _settings(point, [*own_files, *sweep.gin_files], [*own_params, *params])
        name = folder_name(point)
        other = folders.setdefault(name, point)
        if other is not point:
            raise SettingError(f"Sweep.grid: {describe(point)} and {describe(other)} would share the folder {name}")
        flags = [*((active.FILE_FLAG, file) for file in sweep.gin_files), *((active.PARAM_FLAG, one) for one in params)]
        for seed in seeds:
            folder = output / name / f"seed{seed}"
            added = (*itertools.chain(*flags), "--seed", str(seed), "--output_dir", str(folder))
            runs.append(Run(point, seed, folder, tuple(command), added, settings, point == sweep.baseline))
    return runs


def _settings(point: dict[str, Any], files: list[str], params: list[str]) -> tuple[str, ...]:
    try:
        read = config.read(files, params)
    except SettingError as error:
        raise SettingError(f"point {describe(point)} of the sweep: {error}") from error
    if read.sweep is not None:
        raise SettingError(f"{', '.join(files)}: a run's own files cannot describe a sweep; take it out of gin_files")
    detached = next((key for key in point if key.endswith(".detach")), None)
    if detached is not None and read.fusion is not None and read.fusion.train_tower == "frozen":
        raise SettingError(
            f"point {describe(point)} of the sweep: {detached} changes nothing while the vision tower is frozen: bind "
            f'{type(read.fusion).__name__}.train_tower = "all", or the last k blocks'
        )
    for flag in TAKEN:
        if flag in read.flags:
            raise SettingError(f"Flags.{flag} is bound, but a sweep sets --{flag} for each run: take the binding out")
    return read.bindings()
