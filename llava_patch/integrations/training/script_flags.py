"""Flags of LLaVA's training script that gin binds (`Flags.lora_r = 16`), brought into the script."""

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser, set_seed

from llava_patch.core.errors import SettingError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import llava_code
from llava_patch.settings.gin_config import Configuration


def add(asked: Configuration, undo: UndoStack) -> None:
    """Append the flags to the script's own: of two, its parser takes the later.

    When the script parses them, once, unknown ones are refused by their gin names, and `--seed` seeds: LLaVA makes a
    new projector and LoRA's matrices before the Trainer seeds anything.
    """
    script, added = sys.argv[1:], arguments(asked.flags)
    sys.argv.extend(added)
    for words in (script, added):
        llava_code.fix_argv(words)
    if added and os.environ.get("RANK", "0") == "0":
        print(describe(script, added), flush=True)

    def parse_checked(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        HfArgumentParser.parse_args_into_dataclasses = original  # type: ignore[method-assign]
        known = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        for flag in asked.flags:
            option = [f"--{flag}"]
            llava_code.fix_argv(option)
            name = option[0][2:]
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean Flags.{near[0]}?" if near else ""
                raise SettingError(f"Flags.{name}: the training script has no flag --{name}{hint}")
        parsed = original(self, *args, **kwargs)
        for part in parsed:
            if hasattr(part, "seed"):
                set_seed(part.seed)
        return parsed

    undo.wrap(HfArgumentParser, "parse_args_into_dataclasses", parse_checked)


def arguments(values: Mapping[str, Any]) -> list[str]:
    """What `values` look like on a command line."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def describe(script: Sequence[str], added: Sequence[str]) -> str:
    """One line that says which flags are added and which of the script's own values they replace."""
    before, after = _by_name(script), _by_name(added)
    replaced = [f"--{name} {before[name]}" for name in after if name in before and before[name] != after[name]]
    line = f"llava_patch: flags from gin: {' '.join(added)}"
    return f"{line} (instead of the script's {' '.join(replaced)})" if replaced else line


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
