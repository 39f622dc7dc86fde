"""The model card of a saved folder: what it is, which settings and base, how to load it, what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError
from llava_patch.core.files import write_text
from llava_patch.core.version import __version__
from llava_patch.hosts.anatomy import LLAVA
from llava_patch.patching.handle import Handle

FILE = "README.md"
OURS = "<!-- Written by llava_patch, and again by the next save; take this line out to keep a text of your own. -->"
HERE = "THIS_FOLDER_OR_REPOSITORY"
_PACKAGES = ("torch", "transformers", "llava", "llava-torch", "peft")


def write(
    handle: Handle, new: Path, folder: Path, form: str, base: str, measured: Mapping[str, Any] | None = None
) -> None:
    """Write the card into a `new` folder that is to become `folder`, unless the user's own text is in that."""
    if (folder / FILE).is_file() and OURS not in (folder / FILE).read_text(encoding="utf-8", errors="replace"):
        return
    write_text(new / FILE, card(handle, form, base, measured))


def card(handle: Handle, form: str, base: str, measured: Mapping[str, Any] | None = None) -> str:
    """The text: Markdown under the hub's metadata.

    Args:
        handle: the patch.
        form: "adapter" or "full".
        base: folder or hub name of the model below; "": not known.
        measured: what was measured, by name: numbers or text.

    Raises:
        CheckpointError: `measured` holds what is neither.
    """
    from huggingface_hub import ModelCardData

    applied = handle.applied()
    named = base if base and not Path(base).is_dir() else ""
    data = ModelCardData(
        base_model=named or None,
        library_name="llava_patch",
        pipeline_tag="image-text-to-text",
        tags=["llava", "llava_patch", *(type(settings).__name__ for settings in applied.values())],
    )
    what = "What was added to or trained on" if form == "adapter" else "All weights of"
    below = f"`{named}`" if named else f"`{Path(base).name}`, a folder where this was saved" if base else "its base"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        OURS,
        f"# {', '.join(type(settings).__name__ for settings in applied.values()) or 'LLaVA'} by llava_patch",
        f"{what} {below}. {handle.report()}.",
        "## Settings",
        "\n".join(f"- `{settings}`" for settings in applied.values()),
        "## Load it",
        _loading(handle, form),
        "## Measured",
        _measured(measured),
        "## Made with",
        ", ".join(_versions()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _loading(handle: Handle, form: str) -> str:
    if handle.anatomy.host == LLAVA:
        call = f'load_pretrained_model("{HERE}", None, "llava")'
        lines = ["from llava.model.builder import load_pretrained_model", f"tokenizer, model, images, _ = {call}"]
    else:
        kind = type(handle.anatomy.model).__name__
        lines = [f"from transformers import {kind}", f'model = {kind}.from_pretrained("{HERE}")']
    text = f"With llava_patch {__version__} or later installed, the host's own loader opens it:\n\n"
    text += "```python\n" + "\n".join(lines) + "\n```"
    if form == "adapter":
        text += f'\n\nor, on a base that is in memory, `handle = llava_patch.load(model, "{HERE}")`; `handle.remove()` '
        text += "gives the base back."
    return text


def _measured(measured: Mapping[str, Any] | None) -> str:
    if not measured:
        return "Nothing was recorded with this save. `llava-patch report` and `lmms-eval` measure it."
    for name, value in measured.items():
        if not isinstance(value, (int, float, str)):
            raise CheckpointError(f"measured[{name!r}] = {value!r}: expected a number or text")
    rows = [
        f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |" for name, value in measured.items()
    ]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _versions() -> list[str]:
    found = [f"llava_patch {__version__}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found
