"""What a result was asked for, kept in its file: one of other settings or other data is not replaced without a word.

The record is flat: settings as gin names them, options as the command line does, and the data. Values are compared by
what they mean, so that a setting that was added later makes no result another one.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError, shown
from llava_patch.core.files import plain
from llava_patch.core.stored import read_object
from llava_patch.measurements.base import Measurement

ASKED, DATA = "asked", "data"
PAGES = "rendered pages"
ADVICE = "give another folder with --output, or replace what is there with --overwrite"
_MOST = 4
"""Differences that a message names."""


def asked_of(measurement: Measurement, target: Any, settings: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a measurement of a target with settings, and options of its `measure`, is asked for; JSON values.

    SettingError: the target's device or precision is not there.
    """
    from llava_patch.data.loaded import pick_device, pick_dtype
    from llava_patch.data.readers.read import resolve_source

    found = _settings(settings) | {_option(name): value for name, value in options.items()}
    for name in measurement.sources:
        value = found.get(name) or ""
        found[name] = resolve_source(value) if isinstance(value, str) else [resolve_source(one) for one in value]
    if measurement.samples is not None:
        dtype = str(pick_dtype(target.dtype, pick_device(target.device))).removeprefix("torch.")
        found |= {DATA: resolve_source(target.data) or PAGES, "--question": target.question, "--dtype": dtype}
        found["--base"] = "" if measurement.compares else target.below
    kept: dict[str, Any] = plain({name: value for name, value in found.items() if name not in measurement.aside})
    return kept


def defaults_of(measurement: Measurement) -> dict[str, Any]:
    """What an absent value of such a record means."""
    settings = {} if measurement.settings is None else _settings(measurement.settings())
    parameters = inspect.signature(measurement.measure).parameters.values()
    options = {_option(one.name): one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    found: dict[str, Any] = plain({**settings, **options})
    return found


def _settings(settings: Any) -> dict[str, Any]:
    if settings is None:
        return {}
    return {f"{type(settings).__name__}.{name}": value for name, value in dataclasses.asdict(settings).items()}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def unlike(there: Mapping[str, Any], here: Mapping[str, Any], defaults: Mapping[str, Any]) -> str | None:
    """In what two records differ, in words; None: in nothing."""
    found = []
    for name in dict.fromkeys((*here, *there)):
        was, now = (one.get(name, defaults.get(name)) for one in (there, here))
        if was != now and (was or now or name in defaults):  # "", [] and None are all "none"
            found.append(f"{name} = {shown(was)} there, {shown(now)} here")
    more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return "; ".join(found[:_MOST]) + more if found else None


def check_kept(path: Path, here: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """Refuse to replace a result that was asked for in another way, or does not say how; else what it holds, or None.

    None: there is no such file. CheckpointError: it says what differs.
    """
    values = read_kept(path)
    if values is not None:
        check_asked(values, str(path), here, defaults)
    return values


def read_kept(path: Path) -> dict[str, Any] | None:
    """What a result's file holds; None: there is none. CheckpointError: it is none of ours."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, and a file of this name is to be written: {ADVICE.split(',')[0]}")
    return read_object(path, advice=f", so it is no result that can go on: {ADVICE}") if path.exists() else None


def check_asked(
    values: Mapping[str, Any], where: str, here: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Refuse to replace a result (its file's `values`, or its facts) that was asked for in another way."""
    facts = values.get("facts")
    there = values.get(ASKED, facts.get(ASKED) if isinstance(facts, dict) else None)
    if not isinstance(there, dict):
        raise CheckpointError(
            f"{where} does not say with which settings and data it was measured (another version or command wrote "
            f"it): {ADVICE}"
        )
    if (difference := unlike(there, here, defaults or {})) is not None:
        raise CheckpointError(f"{where} holds results of other settings or data: {difference}: {ADVICE}")


def places(given: Sequence[Any]) -> list[str]:
    """Files and folders by where they lie; other names as they are."""
    return [str(Path(one).resolve()) if Path(str(one)).exists() else str(one) for one in given]
