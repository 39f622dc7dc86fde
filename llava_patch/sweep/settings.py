"""What a sweep runs over. Imports neither torch nor gin."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_patch.errors import SettingError


@dataclass(frozen=True)
class Sweep:
    """A grid of settings, each trained with several seeds.

    Attributes:
        grid: for each gin binding its values, such as {"Routing.split": (10, 14, 18, 22)}; several bindings give
            every combination, the last one varying fastest.
        seeds: one run each; the DPVR paper's are 1, 2 and 3, its single runs have 42.
        gin_files: files that every run takes, by path or shipped name.
        gin_params: bindings that every run takes.
    """

    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3)
    gin_files: tuple[str, ...] = ()
    gin_params: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Mapping) or not self.grid:
            raise SettingError(
                f'Sweep.grid = {self.grid!r}: expected bindings with their values, as {{"Routing.split": (14, 18)}}'
            )
        grid = {}
        for key, values in self.grid.items():
            if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
                raise SettingError(f"Sweep.grid: {key!r} is not the name of a binding, such as Routing.split")
            if not isinstance(values, (list, tuple)) or not values:
                raise SettingError(f'Sweep.grid["{key}"] = {values!r}: expected a tuple of values')
            if any(isinstance(value, (dict, set)) for value in values):
                raise SettingError(f'Sweep.grid["{key}"] = {values!r}: expected numbers, strings or tuples of them')
            grid[key] = tuple(tuple(value) if isinstance(value, list) else value for value in values)
        object.__setattr__(self, "grid", grid)
        seeds = tuple(self.seeds) if isinstance(self.seeds, (list, tuple)) else (self.seeds,)
        whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
        if not seeds or not whole or len(set(seeds)) != len(seeds):
            raise SettingError(f"Sweep.seeds = {self.seeds!r}: expected distinct integers >= 0")
        object.__setattr__(self, "seeds", seeds)
        for name in ("gin_files", "gin_params"):
            texts = getattr(self, name)
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise SettingError(f"Sweep.{name} = {texts!r}: expected a tuple of strings, as ('a.gin',)")
            object.__setattr__(self, name, tuple(texts))

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values, as {binding: value}."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def describe(point: Mapping[str, Any]) -> str:
    """A point of the grid in words: "Routing.split = 18, Routing.side_layers = 2"."""
    return ", ".join(f"{key} = {value!r}" for key, value in point.items())


def folder_name(point: Mapping[str, Any]) -> str:
    """A point of the grid as a folder's name: no character that a shell, or lmms-eval's model_args, would split."""
    words = (f"{key}-{re.sub(r'[^A-Za-z0-9.]+', '-', str(value)).strip('-')}" for key, value in point.items())
    return "_".join(words)
