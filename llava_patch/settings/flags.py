"""Flags of LLaVA's own training script, bound from gin: `Flags.lora_r = 16` stands for `--lora_r 16`.

They let one gin file hold a whole recipe (LoRA, learning rate) and leave the launch script as it is. They act in
LLaVA's training script only; nothing else has these flags.
"""

from __future__ import annotations

from typing import Any

from llava_patch.core.errors import SettingError

GIN_NAME = "Flags"
OWN = ("gin_file", "gin_param")


def bound(**values: Any) -> dict[str, Any]:
    """The gin configurable `Flags`: any keyword is a flag's name; SettingError for what no command line holds."""
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
