"""lmms-eval is an optional companion: without it there is nothing to test here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lmms_eval.api.task")

from tests.support import fileset


def make_lm(host: str, folder: Path, layers: int = 4) -> Any:
    """What lmms-eval's `llava_hf` or `llava` looks like to our tasks."""
    if host == "hf":
        joint = fileset.processor()
        return SimpleNamespace(
            model=fileset.hf_model(layers), tokenizer=joint.tokenizer, _image_processor=joint, task_dict={}, rank=0
        )
    pytest.importorskip("llava")
    return SimpleNamespace(
        model=fileset.llava_model(folder, layers), tokenizer=fileset.tokenizer(), task_dict={}, rank=0,
        _image_processor=fileset.image_processor(), conv_template="vicuna_v1",
    )  # fmt: skip


@pytest.fixture(params=["hf", "llava"])
def lm(request: Any, tmp_path: Path) -> Any:
    return make_lm(request.param, tmp_path)
