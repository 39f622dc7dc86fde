"""Gin configuration: the one root, how files are found, and the operative config.

Bindings name the same classes and fields as Python does (`Routing.split = 18`). The root is `Patch`, with
a field a kind of method (`Patch.fusion`, ...); binding any field of a method switches that method on as well.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core import registry
from llava_patch.core.errors import SettingError, short, shown
from llava_patch.core.paths import gin_dir
from llava_patch.settings import gin_reader
from llava_patch.settings.gin_reader import Binding, Bindings, Reference

METHODS = registry.methods()
MEASUREMENTS: dict[str, Any] = registry.settings()
Sweep: Any = registry.load(registry.SWEEP)

FLAGS = "Flags"
_OWN_FLAGS = ("gin_file", "gin_param")

# What a gin file can bind: names with their settings; the script's flags are not ours to know.
KNOWN: dict[str, tuple[str, ...] | None] = {
    "Patch": tuple(registry.KINDS),
    **{n: tuple(f.name for f in dataclasses.fields(c)) for n, c in {**METHODS, **MEASUREMENTS}.items()},
    FLAGS: None,
    "Sweep": tuple(f.name for f in dataclasses.fields(Sweep)),
}


def launch_flags(**values: Any) -> dict[str, Any]:
    """Flags of LLaVA's own training script, where alone they act: `Flags.lora_r = 16` stands for `--lora_r 16`."""
    values = {name: value for name, value in values.items() if value is not None}  # takes an included file's back
    for name, value in values.items():
        if name in _OWN_FLAGS:
            raise SettingError(f"Flags.{name}: a gin file cannot bring further gin settings; use gin's include")
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items or not all(isinstance(item, (bool, int, float, str)) for item in items):
            raise SettingError(
                f"Flags.{name} = {shown(value)}: expected True, False, a number, a string or a list of these; to leave "
                "a flag as the script has it, do not bind it, or bind None"
            )
    return values


@dataclass(frozen=True)
class Configuration:
    """What was configured."""

    fusion: Any = None  # fusion settings or None
    routing: Any = None  # routing settings or None
    pruning: Any = None  # pruning settings or None
    probe: Any = None  # settings of R-Probe as an auxiliary loss or None; only training uses them
    # Settings of measurements that have a binding, by class name.
    measurements: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)  # flags for LLaVA's training script, by name
    sweep: Any = None  # a grid for `llava-patch sweep`, or None
    sources: tuple[str, ...] = field(default=(), compare=False)  # the files and bindings it came from
    # Kinds of method that are explicitly None, as in `Patch.fusion = None`: asked for, and not nothing.
    off: tuple[str, ...] = ()

    def methods(self) -> dict[str, Any]:
        """Keyword arguments of `patch`."""
        return {kind: getattr(self, kind) for kind in registry.KINDS}

    def lasting(self) -> dict[str, Any]:
        """Keyword arguments of `patch` for a model that is used and not trained; only what is asked for."""
        return {k: v for k, v in self.methods().items() if v is not None and k not in registry.TRAINING_ONLY}

    @property
    def operative(self) -> str:
        """Every setting in use as gin text, the defaults included; reading it gives an equal configuration."""
        parts = []
        for name, values in self._in_use():
            head = f"# Parameters for {name}:\n# {'=' * 78}\n"
            parts.append(head + "".join(f"{name}.{key} = {value!r}\n" for key, value in values.items()))
        return "\n".join(parts)

    def bindings(self) -> tuple[str, ...]:
        """The same without comments, a binding each."""
        return tuple(f"{name}.{key} = {value!r}" for name, values in self._in_use() for key, value in values.items())

    def _in_use(self) -> list[tuple[str, dict[str, Any]]]:
        chosen = {k: v for k, v in self.methods().items() if v is not None}
        patch = {kind: Reference(type(value).__name__) for kind, value in chosen.items()}
        used = [*chosen.values(), *self.measurements.values(), *([self.sweep] if self.sweep is not None else [])]
        parts = {type(one).__name__: {f.name: getattr(one, f.name) for f in dataclasses.fields(one)} for one in used}
        parts |= {"Patch": {**dict.fromkeys(self.off), **patch}, FLAGS: self.flags}
        return [(name, dict(sorted(parts[name].items()))) for name in sorted(parts, key=str.lower) if parts[name]]

    def unpatched(self) -> "Configuration":
        """The same without a method."""
        none: dict[str, Any] = dict.fromkeys(registry.KINDS)
        return dataclasses.replace(self, **none, off=())

    @property
    def patches(self) -> bool:
        """Whether a model is to be patched."""
        return any(value is not None for value in self.methods().values())

    def __bool__(self) -> bool:
        """Whether anything is configured."""
        return self.patches or bool(self.measurements or self.flags or self.off) or self.sweep is not None


def find_file(name: str) -> Path:
    """A gin file by path, or by bare name in the current folder and then among the shipped files; else SettingError."""
    path = Path(name)
    if gin_reader.is_file(path):
        return path
    for shipped_name in (name, f"{name}.gin"):
        if path.name == name and gin_reader.is_file(gin_dir() / shipped_name):
            return gin_dir() / shipped_name
    shipped = sorted(p.name for p in gin_dir().glob("*.gin"))
    what = "no such gin file here or among the shipped ones"
    if not name.strip():
        what = "a gin file needs a name"
    elif _is_there(path):
        what = "not a file: name a gin file in it"
    raise SettingError(
        f"{short(name) or repr(name)}: {what}{gin_reader.hint(path.name, shipped)} (llava-patch gin-files lists them)"
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read(files: Sequence[str], params: Sequence[str]) -> Configuration:
    """Parse gin files, then single bindings, into settings; the program's own gin configuration stays as it was.

    SettingError: a missing file, an unknown name or binding, or a value that a setting refuses.
    """
    paths = [find_file(name) for name in files]
    bound = gin_reader.read(paths, params, KNOWN)
    patch = bound.get("Patch", {})
    flags = {name: binding.value for name, binding in bound.get(FLAGS, {}).items()}
    return Configuration(
        **{kind: _method(kind, patch.get(kind), bound) for kind in registry.KINDS},
        measurements={name: _build(cls, bound[name]) for name, cls in MEASUREMENTS.items() if name in bound},
        flags=_build(launch_flags, bound[FLAGS], FLAGS) if flags else {},
        sweep=_build(Sweep, bound["Sweep"]) if "Sweep" in bound else None,
        sources=(*map(str, paths), *params),
        off=tuple(kind for kind in registry.KINDS if kind in patch and patch[kind].value is None),
    )


def _method(kind: str, asked: Binding | None, bound: Bindings) -> Any:
    """The settings of the one method of a kind that is named or has a binding; None where it is None or there is none.

    Where the kind is None, its settings are still looked at.
    """
    known = registry.methods(kind)
    named = {name: next(iter(bound[name].values())).place for name in known if name in bound}
    if asked is not None and asked.value is not None:
        value, where = asked.value, _where(asked)
        if not isinstance(value, Reference) or not value.called or value.name not in known:
            names = ", ".join(f"@{name}()" for name in known)
            strange = isinstance(value, Reference) and value.name not in KNOWN
            more = f". {gin_reader.unknown(value.name, KNOWN)}" if strange else ""
            raise SettingError(f"{where}Patch.{kind} = {shown(value)}: expected {names}{more}")
        named = {value.name: asked.place, **named}
    if len(named) > 1:
        both = " and ".join(f"{name} ({place})" for name, place in list(named.items())[:2])
        raise SettingError(f"two {kind}s are bound: {both}; a model takes one: take the other's bindings out")
    built = [_build(known[name], bound.get(name, {})) for name in named]
    return built[0] if built and not (asked is not None and asked.value is None) else None


def _where(binding: Binding | None) -> str:
    """What an error about a binding of a file begins with; a single binding is its own place."""
    return f"{binding.place}: " if binding is not None and binding.place.line is not None else ""


def _build(make: Callable[..., Any], bindings: Mapping[str, Binding], name: str = "") -> Any:
    try:
        return make(**{setting: binding.value for setting, binding in bindings.items()})
    except SettingError as error:
        named = re.match(rf"{name or make.__name__}\.(\w+)", str(error))
        raise SettingError(f"{_where(bindings.get(named[1]) if named else None)}{error}") from error
