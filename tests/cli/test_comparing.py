"""attention-maps, drift and fusion-attention as commands, on tiny checkpoints on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from llava_patch import Routing, patch
from llava_patch.cli.main import app
from llava_patch.core.errors import CheckpointError, InputError, SettingError
from llava_patch.data.target import ModelInputs
from llava_patch.settings import active
from tests.support import fileset

runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stock checkpoint, a routed and trained one, an adapter on the stock one, and images."""
    root = tmp_path_factory.mktemp("comparing")
    stock = fileset.write_hf(root / "stock")
    from transformers import LlavaForConditionalGeneration

    for name, form in (("full", "full"), ("adapter", "adapter")):
        model = LlavaForConditionalGeneration.from_pretrained(stock)
        handle = patch(model, routing=Routing(split=2))
        with torch.no_grad():
            for parameter in model.model.language_model.side_branch.parameters():
                parameter.add_(0.2)
        handle.save(root / name, form=form)
    for name in ("full", "adapter"):
        fileset.processor().save_pretrained(root / name)
    (root / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (40 * i, 90, 200 - 30 * i)).save(root / "images" / f"{i}.png")
    return {"root": root, "stock": stock, "full": root / "full", "adapter": root / "adapter", "data": root / "images"}


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path / "cache"))
    active.reset()


def run(*arguments: Any) -> str:
    result = runner.invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_attention_maps(folders: dict[str, Path], tmp_path: Path) -> None:
    first = folders["data"] / "0.png"
    output = run("attention-maps", folders["stock"], folders["full"], "--image", first, "--block", 2)
    values = json.loads((tmp_path / "llava_patch_out" / "attention-maps" / "stock" / "attention_maps.json").read_text())
    assert "wrote llava_patch_out/attention-maps/stock/attention_maps.png" in output
    assert [one["checkpoint"] for one in values["checkpoints"]] == ["stock", "full"]
    assert values["checkpoints"][1]["images"][0]["correlation_with_first"] == pytest.approx(1)
    assert values["checkpoints"][0]["images"][0]["image"] == "0.png"
    with pytest.raises(CheckpointError, match=r"holds the results of .*full, not of"):
        run("attention-maps", folders["stock"], "--image", first, "--block", 2)
    more = run("attention-maps", folders["stock"], "--data", folders["data"], "--output", "more", "--samples", 2,
               "--gin-param", "AttentionMaps.block = 1", "--names", "mine")  # fmt: skip
    assert "mine" in more
    values = json.loads(Path("more/attention_maps.json").read_text())
    assert values["settings"]["block"] == 1 and len(values["checkpoints"][0]["images"]) == 2
    with pytest.raises(SettingError, match="give one of them"):
        run("attention-maps", folders["stock"], "--data", "x", "--image", "y")
    with pytest.raises(SettingError, match="--names one: expected 2 distinct names"):
        run("attention-maps", folders["stock"], folders["full"], "--names", "one")
    with pytest.raises(InputError, match=r"images: no such file \(a folder of images is given with --data\)"):
        run("attention-maps", folders["stock"], "--image", folders["data"])
    with pytest.raises(SettingError, match="every --image is shown"):
        run("attention-maps", folders["stock"], "--image", first, "--samples", 3)


def test_examples_are_as_many_as_options_or_bindings_say_and_spread_over_the_data(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[str]] = []
    real = ModelInputs.__init__

    def noted(self: Any, subject: Any, examples: Any, answers: bool = False) -> None:
        taken.append([example.id for example in examples])
        real(self, subject, examples, answers)

    monkeypatch.setattr(ModelInputs, "__init__", noted)
    data = folders["root"] / "more"
    data.mkdir()
    for i in range(34):
        Image.new("RGB", (8, 8), (7 * i, 0, 0)).save(data / f"{i:02}.png")
    stock = folders["stock"]
    run("attention-maps", stock, "--data", data, "--block", 1)
    run(
        "attention-maps",
        stock,
        "--data",
        data,
        "--block",
        1,
        "--gin-param",
        "AttentionMaps.max_samples = 5",
        "--overwrite",
    )
    run("fusion-attention", stock, data, "--base", stock, "--gin-param", "FusionAttention.max_samples = 33")
    run("drift", stock, data, "--base", stock, "--samples", 2, "--gin-param", "Drift.max_samples = 33", "--together")
    run("drift", stock, data, "--base", stock, "--samples", 0, "--overwrite")
    assert [len(one) for one in taken] == [4, 5, 33, 33, 2, 2, 34, 34]
    assert taken[0] == ["00.png", "08.png", "17.png", "25.png"] and taken[4] == ["00.png", "17.png"]
    assert json.loads(Path("llava_patch_out/drift/stock/drift.json").read_text())["samples"] == 34


def test_drift(folders: dict[str, Path], tmp_path: Path) -> None:
    output = run("drift", folders["full"], folders["data"], "--base", folders["stock"])
    assert "No drift" in output
    values = json.loads((tmp_path / "llava_patch_out" / "drift" / "full" / "drift.json").read_text())
    assert values["split"] == 2 and values["samples"] == 3 and values["image"]["median"] == [1.0, 1.0]
    both = run("drift", folders["full"], folders["data"], "--base", folders["stock"], "--together", "--output", "both")
    assert "No drift" in both
    again = json.loads(Path("both/drift.json").read_text())
    assert again["settings"].pop("together") and not values["settings"].pop("together") and again == values
    run("drift", folders["adapter"], folders["data"])  # its record names the base
    assert json.loads(Path("llava_patch_out/drift/adapter/drift.json").read_text())["base"] == str(folders["stock"])
    with pytest.raises(CheckpointError, match="names no base: say with --base"):
        run("drift", folders["full"])
    with pytest.raises(CheckpointError, match="holds the results of"):
        run("drift", folders["full"], "--base", folders["adapter"])
    for old in ((folders["stock"],), (folders["stock"], folders["data"]), ("", folders["data"]), ("org/model",)):
        with pytest.raises(SettingError, match=r"takes CKPT \[DATA\], and the model .* is given as --base"):
            run("drift", folders["adapter"], *old)
    assert not list((tmp_path / "cache" / "drift").iterdir())


def test_a_configured_patch_is_not_put_on_the_base(folders: dict[str, Path]) -> None:
    patched = ["--gin-param", "Routing.split = 1"]
    run("drift", folders["stock"], folders["data"], "--base", folders["stock"], *patched)
    assert json.loads(Path("llava_patch_out/drift/stock/drift.json").read_text())["split"] == 1
    run("fusion-attention", folders["stock"], folders["data"], "--base", folders["stock"], *patched)
    layer = json.loads(Path("llava_patch_out/fusion-attention/stock/fusion_attention.json").read_text())["layers"][0]
    assert layer["layer"] == 3 and layer["mean_ratio"] != 1  # routed on one side only


def test_fusion_attention(folders: dict[str, Path]) -> None:
    output = run("fusion-attention", folders["full"], folders["data"], "--base", folders["stock"])
    values = json.loads(Path("llava_patch_out/fusion-attention/full/fusion_attention.json").read_text())
    assert [one["layer"] for one in values["layers"]] == [3] and "Layer 3" in output
    run(
        "fusion-attention",
        folders["stock"],
        folders["data"],
        "--base",
        folders["stock"],
        "--layers",
        "0,2",
        "--samples",
        2,
    )
    values = json.loads(Path("llava_patch_out/fusion-attention/stock/fusion_attention.json").read_text())
    assert [one["mean_ratio"] for one in values["layers"]] == [1, 1] and values["samples"] == 2
    with pytest.raises(SettingError, match="expected layer numbers"):
        run("fusion-attention", folders["stock"], "--base", folders["stock"], "--layers", "x")


def test_a_base_that_is_not_there(folders: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "adapter"
    shutil.copytree(folders["adapter"], moved)
    record = json.loads((moved / "llava_patch.json").read_text())
    (moved / "llava_patch.json").write_text(json.dumps({**record, "base": "/gone"}))
    language_model = tmp_path / "vicuna"
    language_model.mkdir()
    (language_model / "config.json").write_text('{"model_type": "llama"}')
    trained = tmp_path / "trained"  # LLaVA's training names the language model that it started from
    shutil.copytree(folders["adapter"], trained)
    (trained / "llava_patch.json").write_text(json.dumps({**record, "base": str(language_model)}))
    for command in ("drift", "fusion-attention"):
        with pytest.raises(CheckpointError, match=r"vicuna as its base, which is no LLaVA .* say with --base"):
            run(command, trained)
        with pytest.raises(CheckpointError, match="names /gone as its base, and there is no such folder"):
            run(command, moved)
        with pytest.raises(CheckpointError, match=r"not a checkpoint, it has no config\.json"):
            run(command, folders["stock"], "--base", tmp_path)
