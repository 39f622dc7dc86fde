"""Both hosts as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.support import tiny


@pytest.fixture(params=["hf", "llava"])
def host(request: Any, tmp_path: Path) -> tuple[Callable[..., nn.Module], Callable[..., dict]]:
    """(make_model(**kwargs), make_sample(**kwargs)) of one host."""
    if request.param == "hf":
        return tiny.hf_model, tiny.hf_sample
    pytest.importorskip("llava")
    return lambda **kwargs: tiny.llava_model(tmp_path, **kwargs), tiny.llava_sample
