"""The errors that llava_patch raises; every message names the setting, file or tensor and what to do."""

from collections.abc import Mapping
from typing import Any


class LlavaPatchError(RuntimeError):
    """Base class of every error raised by llava_patch itself.

    `exit_code` is the command line's: 2 for what the caller can put right, 1 for what failed on the way.
    """

    exit_code = 2


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

    exit_code = 1


class RunError(LlavaPatchError):
    """A command of a sweep failed, or left nothing to read behind."""

    exit_code = 1


class StorageError(LlavaPatchError, OSError):
    """A disk or a folder does not take what is to be written: it is full, read-only, or somebody else's."""

    exit_code = 1


class BusyError(CheckpointError):
    """Another process works in the same folder."""

    exit_code = 1


class SilentFusionWarning(UserWarning):
    """A fusion was asked for that changes nothing: its new weights are zero, and frozen."""


def refuse(against: Mapping[str, object], error: type[LlavaPatchError] = SettingError) -> None:
    """Raise an error with the first of these reasons that holds."""
    for why, holds in against.items():
        if holds:
            raise error(why)


def brief(error: BaseException) -> str:
    """What another library's error says, in one line of at most 200 characters; its class where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def printable(text: str) -> str:
    """A text on one line that every terminal and file takes: newlines, NUL, lone surrogates and the like escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def short(text: str, length: int = 80) -> str:
    """A text as messages show it: printable, and its middle left out where it is longer."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 20]}...{text[-17:]}"


def shown(value: Any, width: int = 80) -> str:
    """A value as messages show it: its `repr`, shortened; its type where it has none, as of 5,000 digits."""
    try:
        return short(repr(value), width)
    except Exception:
        return f"<{type(value).__name__}>"
