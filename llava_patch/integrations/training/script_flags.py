"""Flags of LLaVA's training script that gin binds (`Flags.lora_r = 16`), brought into the script."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser, set_seed

from llava_patch.hosts import compat
from llava_patch.settings import flags

if TYPE_CHECKING:
    from llava_patch.core.undo import UndoStack
    from llava_patch.settings.gin_config import Configuration


def add(asked: "Configuration", undo: "UndoStack") -> None:
    """Append the flags to the script's own: of two, its parser takes the later.

    When the script parses them, once, unknown ones are refused by their gin names, and `--seed` seeds: LLaVA makes a
    new projector and LoRA's matrices before the Trainer seeds anything.
    """
    added = flags.arguments(asked.flags)
    compat.fix_argv(added)
    if added and os.environ.get("RANK", "0") == "0":
        print(flags.describe(sys.argv[1:], added), flush=True)
    sys.argv.extend(added)
    cls: Any = HfArgumentParser
    original = cls.parse_args_into_dataclasses

    @functools.wraps(original)
    def parse_args_into_dataclasses(self: Any, *args: Any, **kwargs: Any) -> Any:
        cls.parse_args_into_dataclasses = original
        renamed = {}
        for name, value in asked.flags.items():
            option = [f"--{name}"]
            compat.fix_argv(option)
            renamed[option[0][2:]] = value
        flags.refuse_unknown(renamed, self._option_string_actions)
        parsed = original(self, *args, **kwargs)
        for part in parsed:
            if hasattr(part, "seed"):
                set_seed(part.seed)
        return parsed

    undo.set_attribute(cls, "parse_args_into_dataclasses", parse_args_into_dataclasses)
