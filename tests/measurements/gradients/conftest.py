"""Both hosts with a tower of 8 blocks, deep enough for every fusion."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["hf", "llava"])
def host(request: pytest.FixtureRequest, tower_folder: Path):
    from tests.support import models

    if request.param == "llava":
        pytest.importorskip("llava")
    model = models.hf_model() if request.param == "hf" else models.llava_model(tower_folder)
    return models.Host(request.param, model)
