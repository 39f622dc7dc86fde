"""What a sweep runs over. Imports neither torch nor gin."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_patch.core.errors import SettingError, shown
from llava_patch.settings.checks import is_integer, is_number, is_text, refused


@dataclass(frozen=True)
class Sweep:
    """A grid of settings, each trained with several seeds.

    Attributes:
        grid: for each gin binding its values, such as {"Routing.split": (10, 14, 18, 22)}; several bindings give
            every combination, the last one varying fastest. A list of such grids gives the points of each in turn,
            for values that do not go with every other: [{"SkipLinks.stride": (6,), "SkipLinks.detach": (0, 1, 2, 3)},
            {"SkipLinks.stride": (12,), "SkipLinks.detach": (0, 1)}].
        baseline: one more point, trained first, that the others are compared with, such as {"Patch.fusion": None}
            (the files' fusion switched off). None: no such point.
        scores: named means of metrics of the evaluation, such as {"OCR": ("textvqa_val/exact_match",
            "ocrbench/ocrbench_accuracy")}; they are shown beside the metrics. Metrics of one mean should share a scale.
        seeds: one run each; the DPVR paper's are 1, 2 and 3, its single runs have 42.
        gin_files: files that every run takes, by path or shipped name.
        gin_params: bindings that every run takes.
    """

    grid: Mapping[str, tuple[Any, ...]] | Sequence[Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    baseline: Mapping[str, Any] | None = None
    scores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3)
    gin_files: tuple[str, ...] = ()
    gin_params: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        several = isinstance(self.grid, (list, tuple))
        grids = tuple(map(_checked, self.grid)) if several else (_checked(self.grid),)
        if not grids:
            _checked({})
        object.__setattr__(self, "grid", grids if several else grids[0])
        if self.baseline is not None:
            if not isinstance(self.baseline, Mapping) or not self.baseline:
                raise self._refused("baseline", 'bindings with one value each, as {"Patch.fusion": None}')
            baseline = _checked({key: (value,) for key, value in self.baseline.items()}, "Sweep.baseline")
            object.__setattr__(self, "baseline", {key: value for key, (value,) in baseline.items()})
        scores = self.scores
        if not isinstance(scores, Mapping) or not (_texts([*scores]) and all(m and _texts(m) for m in scores.values())):
            raise self._refused("scores", 'names with metrics, as {"OCR": ("pope/pope_accuracy",)}')
        object.__setattr__(self, "scores", {name: tuple(metrics) for name, metrics in scores.items()})
        seeds = tuple(self.seeds) if isinstance(self.seeds, (list, tuple)) else (self.seeds,)
        whole = all(is_integer(s) and s >= 0 for s in seeds)
        if not seeds or not whole or len(set(seeds)) != len(seeds):
            raise self._refused("seeds", "distinct integers >= 0")
        object.__setattr__(self, "seeds", seeds)
        for name in ("gin_files", "gin_params"):
            if not _texts(getattr(self, name)):
                raise self._refused(name, "a tuple of strings, as ('a.gin',)")
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def _refused(self, name: str, expected: str) -> SettingError:
        return refused("Sweep", name, getattr(self, name), expected)

    def points(self) -> list[dict[str, Any]]:
        """The baseline, if there is one, then every combination of each grid's values, as {binding: value}."""
        grids: Any = self.grid if isinstance(self.grid, tuple) else (self.grid,)
        points = [] if self.baseline is None else [dict(self.baseline)]
        for grid in grids:
            points += [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        return points


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_text, value))


def _is_plain(value: Any) -> bool:
    """Whether a point can hold it: what gin's text and a record's JSON say alike."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool) or is_number(value) or is_text(value)


def _checked(grid: Any, owner: str = "Sweep.grid") -> dict[str, tuple[Any, ...]]:
    if not isinstance(grid, Mapping) or not grid:
        raise SettingError(
            f'{owner} = {shown(grid)}: expected bindings with their values, as {{"Routing.split": (14, 18)}}, or a '
            "list of such grids"
        )
    checked = {}
    for key, values in grid.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
            raise SettingError(f"{owner}: {shown(key)} is not the name of a binding, such as Routing.split")
        if not isinstance(values, (list, tuple)) or not values:
            raise SettingError(f'{owner}["{key}"] = {shown(values)}: expected a tuple of values')
        if not all(map(_is_plain, values)):
            raise SettingError(f'{owner}["{key}"] = {shown(values)}: expected numbers, strings or tuples of them')
        checked[key] = tuple(tuple(value) if isinstance(value, list) else value for value in values)
    return checked


def describe(point: Mapping[str, Any]) -> str:
    """A point of the grid in words: "Routing.split = 18, Routing.side_layers = 2"."""
    return ", ".join(f"{key} = {value!r}" for key, value in point.items())


def folder_name(point: Mapping[str, Any]) -> str:
    """A point of the grid as a folder's name: no character that a shell, or lmms-eval's model_args, would split."""
    words = (f"{key}-{re.sub(r'[^A-Za-z0-9.]+', '-', str(value)).strip('-')}" for key, value in point.items())
    return "_".join(words)


def meaning(value: Any) -> Any:
    """A value by which two that mean the same are equal: 18 and 18.0, lists and tuples; but not 1 and True."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping):
        return {key: meaning(item) for key, item in value.items()}
    return tuple(map(meaning, value)) if isinstance(value, (list, tuple)) else value
