"""The errors that llava_patch raises; every message names the setting, file or tensor and what to do."""

from collections.abc import Mapping


class LlavaPatchError(RuntimeError):
    """Base class of every error raised by llava_patch itself."""


class SettingError(LlavaPatchError, ValueError):
    """A setting (dataclass field or gin binding) has a value that cannot be honoured."""


class HostError(LlavaPatchError, TypeError):
    """The model, or the version of a library under it, is not one that llava_patch knows."""


class CheckpointError(LlavaPatchError):
    """A saved patch does not fit the model or the request: wrong base, missing tensor, other shape."""


class InputError(LlavaPatchError, ValueError):
    """What was passed to a patched model at run time does not fit together."""


class MissingExtraError(LlavaPatchError):
    """A package that one of our extras brings is not installed; the message says what to type."""


class RunError(LlavaPatchError):
    """A command of a sweep failed, or left nothing to read behind."""


class SilentFusionWarning(UserWarning):
    """A fusion was asked for that changes nothing: its new weights are zero, and frozen."""


def refuse(against: Mapping[str, object], error: type[LlavaPatchError] = SettingError) -> None:
    """Raise an error with the first of these reasons that holds."""
    for why, holds in against.items():
        if holds:
            raise error(why)


def shown(value: object, limit: int = 80) -> str:
    """A value as a message shows it: its `repr`, cut to some characters; no value is too large or too deep."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more digits than Python prints; lists in lists in lists
        return f"a value too large to show ({type(value).__name__})"
    return text if len(text) <= limit else f"{text[:limit]}…"
