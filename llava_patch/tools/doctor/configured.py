"""What environment and gin options ask for, what that would patch, and what of it would be ignored."""

import contextlib
import difflib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_patch.core import registry
from llava_patch.core.errors import LlavaPatchError
from llava_patch.core.paths import VARIABLE as CACHE_VARIABLE
from llava_patch.integrations import import_hook as autostart
from llava_patch.settings import active
from llava_patch.settings.gin_config import Configuration
from llava_patch.settings.methods import AUTO, AuxiliaryProbe
from llava_patch.tools.doctor import NOTE, OK, PROBLEM, Row

DISABLE = "LLAVA_PATCH_DISABLE"
KNOWN_VARIABLES = (
    active.FILE_VARIABLE, active.PARAM_VARIABLE, DISABLE, CACHE_VARIABLE, "LLAVA_PATCH_RPROBE_DATA",
    "LLAVA_PATCH_VENV", "LLAVA_PATCH_LLAVA_TREE",
)  # fmt: skip
READERS = {"Report": "llava-patch report", "RProbe": "llava-patch rprobe, lmms-eval's task rprobe"}
"""Who reads bindings of settings that no measurement of the registry has."""


def readers() -> dict[str, str]:
    """Who reads each measurement's bindings, by the settings' name."""
    found = dict(READERS)
    for measurement in map(registry.measurement, registry.MEASUREMENTS):
        if measurement.settings is not None:
            words = [f"llava-patch {measurement.command} and report"]
            words += [f"lmms-eval's task {measurement.name}"] if measurement.metrics else []
            found[measurement.settings.__name__] = ", ".join([*words, *measurement.readers])
    return found


def read(gin_file: Sequence[str], gin_param: Sequence[str]) -> tuple[Configuration | None, LlavaPatchError | None]:
    """What is configured by environment and options, or why it cannot be read."""
    try:
        # It says on stderr what has no effect outside training; the rows say that too.
        with active.also(gin_file, gin_param), contextlib.redirect_stderr(io.StringIO()):
            return active.configuration(), None
    except LlavaPatchError as error:
        return None, error


def check_configured(asked: Configuration | None, error: LlavaPatchError | None) -> list[Row]:
    """What is configured, and to what it is applied."""
    if error is not None:
        return [Row("configured", "error", PROBLEM, str(error))]
    if asked is None:
        return [Row("configured", "nothing: stock models stay stock")]
    rows = [Row("configured", "from " + ", ".join(asked.sources))]
    for kind, value in asked.methods().items():
        if value is not None:
            where = "LLaVA's training script" if kind == AuxiliaryProbe.KIND else "training, and every model loaded"
            rows.append(Row(f"would patch: {kind}", f"{value} ({where})"))
    if asked.fusion is not None and asked.routing is not None and asked.routing.freeze != "none":
        found = f"new weights start at zero, and Routing.freeze = {asked.routing.freeze!r} keeps them there"
        advice = "on a stock checkpoint train the fusion first (stage 1), or bind Routing.freeze = 'none'"
        rows.append(Row(f"does nothing yet: {type(asked.fusion).__name__}", found, NOTE, advice))
    rows += [Row(f"switched off: {kind}", "by an explicit None") for kind in asked.off]
    if asked.flags:
        given = " ".join(f"--{name} {value}" for name, value in asked.flags.items())
        rows.append(Row("training flags", given, NOTE, "act in LLaVA's training script only, ignored elsewhere"))
    return rows


def check_ignored(asked: Configuration | None, hook: Row, environment: Mapping[str, str] = os.environ) -> list[Row]:
    """What is set and would have no effect."""
    rows = []
    for name in sorted(n for n in environment if n.startswith("LLAVA_PATCH_") and n not in KNOWN_VARIABLES):
        near = difflib.get_close_matches(name, KNOWN_VARIABLES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        rows.append(Row(f"ignored: {name}", "unknown", NOTE, f"{hint}known are {', '.join(KNOWN_VARIABLES)}"))
    switch = environment.get(DISABLE, "")
    if switch not in ("", "0", "1"):
        rows.append(Row(f"ignored: {DISABLE}", switch, NOTE, "only 1 switches llava_patch off"))
    if asked is None:
        return rows
    if autostart.disabled():
        advice = f"{DISABLE}=1 switches everything off: unset it, or drop the bindings"
        rows.append(Row("ignored: all bindings", ", ".join(asked.sources), NOTE, advice))
    elif hook.state != OK:
        advice = "unmodified scripts would run without them: " + hook.advice
        rows.append(Row("ignored: all bindings without the hook", ", ".join(asked.sources), PROBLEM, advice))
    if asked.probe is not None:
        advice = "a training loss: evaluation and llava-patch's commands go without it"
        rows.append(Row("ignored outside training: AuxiliaryProbe", str(asked.probe), NOTE, advice))
    for name, value in asked.measurements.items():
        if name == "Saturation" and asked.routing is not None and asked.routing.split == AUTO:
            rows.append(Row(f"measurement: {name}", str(value), OK, 'read by Routing.split = "auto"'))
            continue
        reader = readers().get(name)
        advice = "no command reads it" if reader is None else f"changes no model; read by {reader} only"
        rows.append(Row(f"measurement: {name}", str(value), NOTE, advice))
    return rows


def check_deepspeed(environment: Mapping[str, str] = os.environ) -> list[Row]:
    """Variables of ours that deepspeed would not hand to other nodes: it exports what `.deepspeed_env` names."""
    ours = [n for n in (active.FILE_VARIABLE, active.PARAM_VARIABLE, DISABLE) if environment.get(n)]
    if not ours:
        return []
    hosts = [line for line in _lines(Path(environment.get("DLTS_HOSTFILE") or "/job/hostfile")) if line[0] != "#"]
    name = environment.get("DS_ENV_FILE") or ".deepspeed_env"
    pairs = [line.partition("=") for folder in (Path.home(), Path()) for line in _lines(folder / name)]
    exported = {key: value.strip("\"'") for key, _, value in pairs}
    rows = []
    for variable in ours:
        if exported.get(variable) == environment[variable]:
            rows.append(Row(f"other nodes: {variable}", f"exported by {name}"))
            continue
        other = f"{name} has another value: {exported[variable]}" if variable in exported else f"not in {name}"
        found = f"{other}; the hostfile names {len(hosts)} nodes" if len(hosts) > 1 else other
        advice = f"deepspeed on several nodes would leave the others without it: add the line {variable}="
        advice += f"{environment[variable]} to ~/{name}, or give --gin_file and --gin_param to the script"
        rows.append(Row(f"other nodes: {variable}", found, NOTE, advice))
    return rows


def _lines(path: Path) -> list[str]:
    """Those that hold something; none where there is no such file."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        return []
