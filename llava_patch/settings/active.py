"""What is configured now: gin files and bindings from flags, environment and our own commands, read once."""

import os
import sys
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import SettingError
from llava_patch.core.undo import meanwhile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from llava_patch.settings.gin_config import Configuration

FLAGS = FILE_FLAG, PARAM_FLAG = "--gin_file", "--gin_param"
VARIABLES = FILE_VARIABLE, PARAM_VARIABLE = "LLAVA_PATCH_GIN_FILE", "LLAVA_PATCH_GIN_PARAM"

_flags: tuple[list[str], list[str]] = ([], [])
_configuration: "Configuration | None" = None
_training = False


def take_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Remove our flags from a command line, in place: (values of --gin_file, values of --gin_param), in order.

    `--flag value` and `--flag=value` both work, and may be repeated. SettingError: a flag without a value.
    """
    taken: dict[str, list[str]] = {flag: [] for flag in FLAGS}
    rest, kept = iter(argv), []
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag not in taken:
            kept.append(argument)
        elif value := value if equals else next(rest, ""):
            taken[flag].append(value)
        else:
            raise SettingError(f"{flag} needs a value")
    argv[:] = kept
    return taken[FILE_FLAG], taken[PARAM_FLAG]


def also(files: "Sequence[str]", params: "Sequence[str]") -> "AbstractContextManager[None]":
    """Inside the block, gin files and bindings of one of our own commands count after those of the environment."""
    flags = [*_flags[0], *files], [*_flags[1], *params]
    return meanwhile(sys.modules[__name__], _flags=flags, _configuration=None)


def without_patches() -> "AbstractContextManager[None]":
    """Inside the block, models come as their checkpoints are: a configured patch is not put on them.

    For the model that a patched one is compared with; settings of measurements still count.
    """
    now = configuration()
    return meanwhile(sys.modules[__name__], _flags=_flags, _configuration=now and now.unpatched())


def configuration() -> "Configuration | None":
    """What flags and environment ask for, read once; None when nothing is configured.

    SettingError: a configuration that cannot be honoured; nothing was changed then.
    """
    global _configuration
    files = [*_split(os.environ.get(FILE_VARIABLE)), *_flags[0]]
    params = [*_split(os.environ.get(PARAM_VARIABLE)), *_flags[1]]
    if not files and not params:
        return None
    if _configuration is None:
        from llava_patch.core.errors import short
        from llava_patch.settings import gin_config as config

        read, given = config.read(files, params), short(", ".join([*files, *params]), 300)
        if not read:
            raise SettingError(
                f"{given} configures nothing: bind Patch.fusion or Patch.routing, or a field of a method or measurement"
            )
        if read.sweep is not None:
            raise SettingError(f"{given} describes a sweep: run it with `llava-patch sweep`")
        if read.flags and not _training:  # a training recipe reused for evaluation
            names = ", ".join(f"Flags.{name}" for name in read.flags)
            print(f"llava_patch: {names}: flags of LLaVA's training script, without effect here", file=sys.stderr)
        _configuration = read
    return _configuration


def training() -> bool:
    """Whether a LLaVA training script is running."""
    return _training


def begin_training() -> None:
    """A LLaVA training script is running."""
    global _training
    _training = True


def reset() -> None:
    """Forget flags and configuration (for tests and notebooks)."""
    global _configuration, _flags, _training
    _configuration, _flags, _training = None, ([], []), False


def _split(value: str | None) -> list[str]:
    return [part.strip() for part in (value or "").split(";") if part.strip()]


def take_flags_from_command_line() -> None:
    """Take our flags out of `sys.argv`; they count from now on."""
    global _configuration
    files, params = take_flags(sys.argv)
    _flags[0].extend(files)
    _flags[1].extend(params)
    if files or params:  # what was read before lacks them
        _configuration = None


def asked() -> bool:
    """Whether flags or environment configure anything, readable or not."""
    given = {argument.partition("=")[0] for argument in sys.argv}  # a script's flags are taken out later
    return any(_flags) or not given.isdisjoint(FLAGS) or any(_split(os.environ.get(name)) for name in VARIABLES)


def settings_of(cls: Any, **given: Any) -> Any:
    """A measurement's settings: gin's, or the defaults, with the command line's own (those not None) on top."""
    import dataclasses

    now = configuration()
    bound = None if now is None else now.measurements.get(cls.__name__)
    return dataclasses.replace(cls() if bound is None else bound, **{k: v for k, v in given.items() if v is not None})
