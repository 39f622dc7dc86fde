"""`llava-patch rprobe store`."""

import gc

import torch
from typer.testing import CliRunner

from llava_patch.cli.main import app
from llava_patch.data.pages import Pages
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.disk import stores_folder
from llava_patch.measurements.rprobe.store.freeze import Encoder, freeze_samples
from llava_patch.probe.view import make_transform
from tests.support.probes import Characters, processor, tiny_model


def call(*arguments, columns=200):
    result = CliRunner().invoke(app, ["rprobe", "store", *arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.output


def test_stores_are_listed_and_deleted_unless_they_are_in_use():
    assert "no stores under" in call()
    assert "deleted 0 stores, 0.0 kB" in call("--clear")
    anatomy = find(tiny_model())
    transform = make_transform(anatomy, processor(), "resize")
    data = freeze_samples(Encoder(anatomy, transform, Characters()), Pages(3, 56), RProbe(masked=True))
    listed = call()
    for shown in (data.store.folder.name[:8], "LlavaForConditionalGeneration", "3 pages of 112 px", "masked", "1 of 1"):
        assert shown in listed
    assert f"{stores_folder()}: 1 store, " in listed and " kB, 1 of 1 shards, used " in listed
    assert max(map(len, listed.splitlines())) > 40 and call(columns=20) == listed  # a path is never broken
    cleared = call("--clear")
    assert "deleted 0 stores" in cleared and "left, because a process uses it" in cleared
    tokens = data.batch(torch.arange(3)).image_tokens
    assert tokens.isfinite().all()
    del data
    gc.collect()
    assert "deleted 1 store, " in call("--clear")
    assert not list(stores_folder().iterdir())
