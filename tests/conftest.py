"""Fixtures: one tiny model per host, fresh for each test, and no patch configuration left over."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.support import llava_tree

llava_tree.put_in_front()
torch.set_num_threads(1)  # tiny models: threads only wait for one another


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say which `llava` this is about, under -q too, which hides pytest's own header."""
    if reporter := session.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line(llava_tree.described())


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tower")


@pytest.fixture(params=["hf", "llava"])
def host(request: pytest.FixtureRequest, tower_folder: Path):
    from tests.support import models

    model = models.hf_model() if request.param == "hf" else models.llava_model(tower_folder)
    return models.Host(request.param, model)


@pytest.fixture(autouse=True, scope="session")
def definitions_on_older_decoders():
    """The definitions ask a decoder for rotary embeddings, which up to 4.42 each attention module makes for itself."""
    from llava_patch.hosts import compat
    from llava_patch.routing import reference

    stock = reference._rotary

    def rotary(decoder, positions):
        if hasattr(decoder, "rotary_emb"):
            return stock(decoder, positions)
        return tuple(part[0] for part in compat.rotary(decoder, torch.zeros(1, 1, 1), positions[None]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_rotary", rotary)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_users_cache(tmp_path_factory: pytest.TempPathFactory):
    """Fixtures that live longer than a test keep nothing in the user's cache folder either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    import gin
    from llava_patch.settings import active

    monkeypatch.delenv("LLAVA_PATCH_GIN_FILE", raising=False)
    monkeypatch.delenv("LLAVA_PATCH_GIN_PARAM", raising=False)
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path_factory.mktemp("cache")))  # nothing of a test outlives it
    active.reset()
    yield
    active.reset()
    gin.clear_config()
