"""Settings of a measurement that runs as an lmms-eval task: defaults, then gin, then the task's YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from llava_patch.core.errors import SettingError
from llava_patch.settings.active import settings_of

S = TypeVar("S")


def settings_for(cls: type[S], metadata: Any, task: str) -> S:
    """Settings of one task.

    Args:
        cls: a settings dataclass.
        metadata: the `metadata` of the task's YAML; its entry `settings` overrides single fields.
        task: name of the task, for the error message.

    Raises:
        SettingError: an unknown field or a bad value in the YAML.
    """
    base = settings_of(cls)
    given = dict(metadata.get("settings") or {}) if isinstance(metadata, dict) else {}
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(given) - known)
    if unknown:
        raise SettingError(
            f"task {task}: metadata.settings names {', '.join(unknown)}; {cls.__name__} has {', '.join(sorted(known))}"
        )
    return dataclasses.replace(base, **given)  # type: ignore[type-var]


def output_folder(args: Any, task: str) -> str | None:
    """Where a task's figures go: `<output_path>/<model>/<task>`, beside lmms-eval's own results.

    Args:
        args: lmms-eval's parsed command line, or None when called from Python.
        task: name of the task.

    Returns:
        The folder, or None when no `--output_path` was given.
    """
    path = getattr(args, "output_path", None)
    if not path:
        return None
    from lmms_eval.loggers.evaluation_tracker import GeneralConfigTracker
    from lmms_eval.utils import sanitize_model_name

    model = sanitize_model_name(GeneralConfigTracker._get_model_name(str(args.model_args)))
    return str(Path(path) / model / task)
