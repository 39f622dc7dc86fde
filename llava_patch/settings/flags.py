"""Flags of LLaVA's own training script, bound from gin: `Flags.lora_r = 16` stands for `--lora_r 16`.

They let one gin file hold a whole recipe (LoRA, learning rate) and leave the launch script as it is. They act in
LLaVA's training script only; nothing else has these flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_patch.core.errors import SettingError

GIN_NAME = "Flags"
OWN = ("gin_file", "gin_param")


def bound(**values: Any) -> dict[str, Any]:
    """The gin configurable `Flags`: any keyword is a flag's name, without its dashes.

    Raises:
        SettingError: a value that no command line can hold.
    """
    values = {name: value for name, value in values.items() if value is not None}  # takes an included file's back
    for name, value in values.items():
        if name in OWN:
            raise SettingError(f"Flags.{name}: a gin file cannot bring further gin settings; use gin's include")
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items or not all(isinstance(item, (bool, int, float, str)) for item in items):
            raise SettingError(
                f"Flags.{name} = {value!r}: expected True, False, a number, a string or a list of these; to leave a "
                "flag as the script has it, do not bind it, or bind None"
            )
    return values


def arguments(values: Mapping[str, Any]) -> list[str]:
    """What `values` look like on a command line."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def describe(script: Sequence[str], added: Sequence[str]) -> str:
    """One line that says which flags are added and which of the script's values they replace.

    Args:
        script: the script's own arguments.
        added: what `arguments` made.
    """
    before, after = _by_name(script), _by_name(added)
    replaced = [f"--{name} {before[name]}" for name in after if name in before and before[name] != after[name]]
    line = f"llava_patch: flags from gin: {' '.join(added)}"
    return f"{line} (instead of the script's {' '.join(replaced)})" if replaced else line


def refuse_unknown(values: Mapping[str, Any], options: Iterable[str]) -> None:
    """Check the names against the options that a script's parser takes.

    Args:
        values: the bound flags.
        options: option strings, with their dashes.

    Raises:
        SettingError: the script has no such flag; names a similar one.
    """
    known = [option[2:] for option in options if option.startswith("--")]
    for name in values:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean Flags.{near[0]}?" if near else ""
        raise SettingError(f"Flags.{name}: the training script has no flag --{name}{hint}")


def _by_name(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = found[name.replace("-", "_")] = [value] if equals else []
        else:
            current.append(word)
    return {name: " ".join(values) or "True" for name, values in found.items()}
