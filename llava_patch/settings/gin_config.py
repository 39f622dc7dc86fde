"""Gin configuration: the one root, how files are found, and the operative config.

Bindings name the same classes and fields as Python does (`Routing.split = 18`). The root is `Patch`, with
a field a kind of method (`Patch.fusion`, ...); binding any field of a method switches that method on as well.
"""

import dataclasses
import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gin
from llava_patch.core import registry
from llava_patch.core.errors import SettingError
from llava_patch.core.paths import gin_dir

METHODS = registry.methods()
MEASUREMENTS: dict[str, Any] = registry.settings()
Sweep: Any = registry.load(registry.SWEEP)

FLAGS = "Flags"
_OWN_FLAGS = ("gin_file", "gin_param")

for _cls in (*METHODS.values(), *MEASUREMENTS.values(), Sweep):
    gin.register(_cls, module="llava_patch")


@gin.configurable("Patch", module="llava_patch")
def _root(fusion: Any = None, routing: Any = None, pruning: Any = None, probe: Any = None) -> dict[str, Any]:
    return locals()


@gin.register(FLAGS, module="llava_patch")
def launch_flags(**values: Any) -> dict[str, Any]:
    """Flags of LLaVA's own training script, where alone they act: `Flags.lora_r = 16` stands for `--lora_r 16`."""
    values = {name: value for name, value in values.items() if value is not None}  # takes an included file's back
    for name, value in values.items():
        if name in _OWN_FLAGS:
            raise SettingError(f"Flags.{name}: a gin file cannot bring further gin settings; use gin's include")
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items or not all(isinstance(item, (bool, int, float, str)) for item in items):
            raise SettingError(
                f"Flags.{name} = {value!r}: expected True, False, a number, a string or a list of these; to leave a "
                "flag as the script has it, do not bind it, or bind None"
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
    operative: str = ""  # gin's operative config as text: every value in use, the defaults included
    sources: tuple[str, ...] = ()  # the files and bindings it came from
    # Kinds of method that are explicitly None, as in `Patch.fusion = None`: asked for, and not nothing.
    off: tuple[str, ...] = ()

    def methods(self) -> dict[str, Any]:
        """Keyword arguments of `patch`."""
        return {kind: getattr(self, kind) for kind in registry.KINDS}

    def lasting(self) -> dict[str, Any]:
        """Keyword arguments of `patch` for a model that is used and not trained; only what is asked for."""
        return {k: v for k, v in self.methods().items() if v is not None and k not in registry.TRAINING_ONLY}

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
    if path.is_file():
        return path
    for shipped_name in (name, f"{name}.gin"):
        if path.name == name and (gin_dir() / shipped_name).is_file():
            return gin_dir() / shipped_name
    shipped = sorted(p.name for p in gin_dir().glob("*.gin"))
    raise SettingError(
        f"{name}: no such gin file here or among the shipped ones{_hint(path.name, shipped)} (llava-patch gin-files "
        "lists them)"
    )


def _hint(word: str, known: Iterable[str], start: str = "; did") -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"{start} you mean {near[0]}?" if near else ""


def read(files: Sequence[str], params: Sequence[str]) -> Configuration:
    """Parse gin files, then single bindings, into settings; the program's own gin configuration stays as it was.

    SettingError: a missing file, an unknown name or binding, or a value that a setting refuses.
    """
    paths = [find_file(name) for name in files]
    sources = (*map(str, paths), *params)
    # The program's own gin configuration, which ours must neither see nor disturb.
    outside = {name: dict(getattr(gin.config, name)) for name in ("_CONFIG", "_OPERATIVE_CONFIG")}
    gin.clear_config()
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # or the first message would set up logging for the whole program
    root.addFilter(_is_no_search)
    gin.add_config_file_search_path(str(gin_dir()))
    try:
        gin.parse_config_files_and_bindings([str(p) for p in paths], list(params), finalize_config=False)
        _check_bindings()
        explicit = gin.get_bindings("Patch", resolve_references=False)
        implied = {k: name for k, name in _implied().items() if k not in explicit}  # `Patch.routing = None` stays off
        # Bound for good, so that the operative config reproduces the run.
        gin.parse_config([f"Patch.{kind} = @{name}()" for kind, name in implied.items()])
        resolved = _root()
        for kind, value in resolved.items():
            known = registry.methods(kind)
            if value is not None and not isinstance(value, tuple(known.values())):
                names = ", ".join(f"@{name}()" for name in known)
                raise SettingError(f"Patch.{kind} = {value!r}: expected {names}")
        measurements = {n: gin.get_configurable(n)() for n in MEASUREMENTS if _bound(n)}
        flags = gin.get_configurable(FLAGS)() if _bound(FLAGS) else {}
        sweep = gin.get_configurable("Sweep")() if _bound("Sweep") else None
        operative = gin.operative_config_str()
    except (ValueError, TypeError, SyntaxError, OSError, KeyError, RuntimeError) as error:
        inner = _setting_error(error)
        cause = None if isinstance(error, SettingError) else error
        raise SettingError(inner or f"gin configuration ({', '.join(sources)}): {_explain(error)}") from cause
    finally:
        gin.clear_config()
        for name, values in outside.items():
            getattr(gin.config, name).update(values)
        root.removeFilter(_is_no_search)
        root.removeHandler(handler)
    return Configuration(
        **resolved, measurements=measurements, flags=flags, sweep=sweep, operative=operative, sources=sources,
        off=tuple(kind for kind, value in explicit.items() if value is None),
    )  # fmt: skip


def _is_no_search(record: logging.LogRecord) -> bool:
    """False for gin's error about an included file that is not in the current folder, before it looks among ours."""
    return not str(record.msg).startswith("Path not found")


def _check_bindings() -> None:
    used = {reference.config_key for reference in gin.config.iterate_references(gin.config._CONFIG)}
    for scope, selector in gin.config._CONFIG:
        if selector == "gin.macro":
            if (scope, selector) not in used:  # gin takes `split = 14` for a macro
                cls = METHODS.get(scope)
                example = f"Routing.{scope}" if cls is None else f"{scope}.{dataclasses.fields(cls)[0].name}"
                raise SettingError(f"{scope} = ... sets nothing: write METHOD.setting, as in {example} = ...")
        elif scope:
            raise SettingError(f"{scope}/{selector}: a scoped binding has no effect here; bind {selector} itself")


def _bound(name: str) -> bool:
    return bool(gin.get_bindings(name, resolve_references=False))


def _implied() -> dict[str, str]:
    implied: dict[str, str] = {}
    for name in filter(_bound, METHODS):
        kind = METHODS[name].KIND
        if implied.setdefault(kind, name) != name:
            raise SettingError(f"two {kind}s are bound: {implied[kind]} and {name}; a model takes one")
    return implied


def _setting_error(error: BaseException) -> str | None:
    # Gin wraps what a dataclass raises and appends the call's scope to its message.
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, SettingError):
            return str(seen).split("\n  In call to configurable")[0]
        seen = seen.__cause__ or seen.__context__
    return None


def _explain(error: BaseException) -> str:
    text = " ".join(str(error).split())
    unknown = re.search(r"No configurable matching '([^']+)'", text)
    if unknown:
        known = ["Patch", *METHODS, *MEASUREMENTS, FLAGS, "Sweep"]
        return f"{text} Known names: {', '.join(known)}.{_hint(unknown[1].split('.')[0], known, ' Did')}"
    parameter = re.search(r"Configurable '(?:llava_patch\.)?(\w+)' doesn't have a parameter named '(\w+)'", text)
    if parameter and (cls := {**METHODS, **MEASUREMENTS}.get(parameter[1])) is not None:
        names = [f.name for f in dataclasses.fields(cls)]
        return f"{parameter[1]} has no setting {parameter[2]}, it has {', '.join(names)}{_hint(parameter[2], names)}"
    if "malformed node or string" in text:
        return f'{text.split(":")[0]}: a value is neither a number nor quoted; write text as in Routing.variant = "lf"'
    if "Expected newline" in text:
        return f'{text} (one binding a --gin_param; ";" separates them in LLAVA_PATCH_GIN_PARAM only)'
    return text
