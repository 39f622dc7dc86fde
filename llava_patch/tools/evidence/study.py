"""What a study consists of: runs, each done for several seeds, and where they keep what they find."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.core.files import atomic
from llava_patch.core.stored import read_object, read_tensors
from llava_patch.tools.evidence.findings import Found

STUDIES: tuple[str, ...] = ("gradients", "rprobe", "saturation", "routing", "detach", "correlate", "both")
"""Folders of `studies`, in the order of the report: instruments before what is measured with them."""
_FRAME = (__name__, f"{__package__}.findings")  # decide no number of a run


@dataclass(frozen=True)
class Size:
    """How large a tier is.

    Attributes:
        name: "cpu" or "gpu"; a study keys its own shapes by it.
        seeds: every run is done for seeds 0 ... seeds - 1.
        scale: factor on steps and pages, where a study takes one.
    """

    name: str
    seeds: int = 3
    scale: float = 1.0


SIZES = {"cpu": Size("cpu"), "gpu": Size("gpu", seeds=5, scale=2.5)}


@dataclass(frozen=True)
class Context:
    """What a run is given.

    Attributes:
        seed: of everything that the run draws.
        size: the tier.
        device: where to compute.
        folder: of the whole evidence: `runs` and `weights` are in it.
        run: full name of the run.
    """

    seed: int
    size: Size
    device: torch.device
    folder: Path
    run: str

    def load(self, run: str) -> dict[str, Tensor]:
        """The tensors that another run, one of those it needs, kept for the same seed, on the CPU."""
        return read_tensors(weights_path(self.folder, run, self.seed), InputError)

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors for later runs; tensors that share memory become copies."""
        path = weights_path(self.folder, self.run, self.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        with atomic(path) as temporary:
            save_file(held, temporary, metadata={"format": "pt"})

    def result(self, run: str) -> dict[str, Any]:
        """What another run, one of those it needs, found for the same seed."""
        found: dict[str, Any] = read_object(run_path(self.folder, run, self.seed), InputError)["result"]
        return found


@dataclass(frozen=True)
class Run:
    """One piece of work, done for every seed.

    Attributes:
        name: within its study, such as "late/lf".
        work: a function of a module, or a partial of one; returns plain JSON values.
        needs: full names of the runs that must be done before, for the same seed.
        quick: whether `--quick` has it.
        seconds: about what it takes on one core.
    """

    name: str
    work: Callable[[Context], dict[str, Any]]
    needs: tuple[str, ...] = ()
    quick: bool = False
    seconds: float = 30.0

    def sources(self) -> str:
        """The text of everything of this tool that the work is made of: its module and what that imports, in order."""
        function = self.work.func if isinstance(self.work, partial) else self.work
        module = inspect.getmodule(function)
        assert module is not None
        seen: dict[str, str] = {}
        _collect(module, seen)
        return "\n".join(seen[name] for name in sorted(seen))


@dataclass(frozen=True)
class Study:
    """A folder of `studies`.

    Attributes:
        name: of the folder.
        title: for the report.
        about: one paragraph: the question, the model, what would be seen if the answer were another.
        runs: by full name, in order.
        report: the module with `findings` and `figures`.
    """

    name: str
    title: str
    about: str
    runs: dict[str, Run]
    report: ModuleType

    def findings(self, results: Mapping[str, list[dict[str, Any]]]) -> list[Any]:
        """What the results, by full name and one a seed, say; a claim whose runs are not there is left out."""
        found: list[Any] = self.report.findings(Found(self.name, results))
        return found

    def figures(self, results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The study's figures by name."""
        drawn: dict[str, Any] = self.report.figures(Found(self.name, results))
        return drawn


def read(name: str) -> Study:
    """One study; its code is imported here."""
    package = f"{__package__}.studies.{name}"
    runs, report = importlib.import_module(f"{package}.runs"), importlib.import_module(f"{package}.findings")
    return Study(name, report.TITLE, report.ABOUT, {f"{name}/{run.name}": run for run in runs.RUNS}, report)


def run_path(folder: Path, run: str, seed: int) -> Path:
    """Where the result of a run is."""
    return folder / "runs" / f"{run}-seed{seed}.json"


def weights_path(folder: Path, run: str, seed: int) -> Path:
    """Where the weights of a run are."""
    return folder / "weights" / f"{run}-seed{seed}.safetensors"


def _collect(module: ModuleType, seen: dict[str, str]) -> None:
    """Add a module's source and that of every module of this tool that its names come from."""
    name = module.__name__
    if name in seen or not name.startswith(f"{__package__}."):
        return
    if name in _FRAME:
        return
    seen[name] = inspect.getsource(module)
    for value in vars(module).values():
        other = value if inspect.ismodule(value) else inspect.getmodule(value) if callable(value) else None
        if other is not None:
            _collect(other, seen)
