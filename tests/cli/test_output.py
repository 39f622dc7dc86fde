"""What may be written where, and how tables look, in every measurement's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_patch.cli.common import CONFIGURED, check_checkpoint, check_results, facts_of, show
from llava_patch.cli.main import app
from llava_patch.core.errors import CheckpointError
from llava_patch.settings import active
from tests.support import fileset

PATCH = ("--gin-param", "Routing.split = 2")
WORDED = "Routing(split=2, freeze='all_but_single')"  # what a routing freezes is settled when it is made
COMMANDS = {
    "saturation": ("--samples", 1),
    "drift": ("--base", "STOCK", "--samples", 1),
    "fusion-attention": ("--base", "STOCK", "--samples", 1),
    "attention-maps": ("--samples", 1, "--block", 1),
    "reach": ("--samples", 1),
    "flops": (),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fileset.write_hf(tmp_path_factory.mktemp("stock") / "stock")


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path / "cache"))
    active.reset()


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_configured_patch_does_not_replace_the_stock_results(name: str, stock: Path) -> None:
    words = [name, stock, *(stock if word == "STOCK" else word for word in COMMANDS[name])]
    done = run(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    (path,) = Path("llava_patch_out", name, "stock").glob("*.json")
    before = path.read_bytes()
    done = run(*words, *PATCH)
    assert isinstance(done.exception, CheckpointError), done.output
    message = f"holds the results of {stock} without a patch of gin, not of {stock} with {WORDED} of gin: give "
    if name in ("drift", "fusion-attention"):
        message = f"holds the results of {stock}, {stock} without a patch of gin, not of "
    assert message in str(done.exception) and "--output" in str(done.exception)
    assert path.read_bytes() == before
    for _ in range(2):  # the same patch in its own folder, which may be measured again
        done = run(*words, *PATCH, "--output", "patched")
        assert done.exit_code == 0, (done.output, done.exception)
    kept = json.loads(Path("patched", path.name).read_text())["facts"]
    assert kept[CONFIGURED] == {"routing": WORDED} and kept["checkpoint"] == str(stock)
    assert isinstance(run(*words, "--output", "patched").exception, CheckpointError)


def test_results_that_say_less(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    check_results(path, ["a"], {})
    for text in ("{}", '{"facts": {}}', '{"facts": []}', '{"sources": [1]}', '{"sources": "a"}', '{"checkpoint": "a"}'):
        path.write_text(text)
        check_results(path, ["a"])  # beside what is written
        with pytest.raises(CheckpointError, match=r"does not say with which settings .* --overwrite"):
            check_results(path, ["a"], {})
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"result.json: not valid JSON .* --overwrite"):
            check_results(path, ["a"], {})
    path.write_text('{"checkpoint": "b"}')
    with pytest.raises(CheckpointError, match="holds the results of b, not of a: give another folder with --output"):
        check_results(path, ["a"])
    path.write_text('{"sources": ["a", "b"]}')
    check_results(path, ["a", "b"])
    with pytest.raises(CheckpointError, match="results of a, b, not of a:"):
        check_results(path, ["a"])


def test_settings_are_compared_by_what_they_mean(tmp_path: Path) -> None:
    path = tmp_path / "result.json"

    def there(**asked: Any) -> None:
        path.write_text(json.dumps({"sources": ["a"], "facts": {"asked": asked}}))

    here, defaults = {"X.depth": 2, "X.layers": [1], "X.new": 5, "data": "/d", "--question": ""}, {"X.new": 5}
    there(**{"X.depth": 2.0, "X.layers": [1], "data": "/d"})  # without what was added later
    check_results(path, ["a"], here, defaults)
    for values, said in (
        ({"X.depth": 3, "X.layers": [1], "data": "/d"}, r"X.depth = 3 there, 2 here: give .* --overwrite"),
        ({"X.depth": 2, "X.layers": [1], "data": "/e"}, "data = '/e' there, '/d' here"),
        ({"X.depth": 2, "X.layers": [1], "data": "/d", "X.new": 0}, "X.new = 0 there, 5 here"),
        ({"X.depth": 2, "X.layers": [1], "data": "/d", "X.unknown": 1}, "X.unknown = 1 there, None here"),
    ):
        there(**values)
        with pytest.raises(CheckpointError, match=said):
            check_results(path, ["a"], here, defaults)


def test_what_a_record_says_of_a_patch() -> None:
    with active.also([], ["Routing.split = 2", "FastV.layer = 1"]):
        facts = facts_of("a")
    assert facts[CONFIGURED] == {"routing": WORDED, "pruning": "FastV(layer=1)"}
    with active.also([], ["Reach.samples = 2"]):
        assert facts_of("a") == {"checkpoint": "a"}


def test_reach_takes_all_samples(stock: Path) -> None:
    from PIL import Image

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A page"}]
    Image.new("RGB", (60, 60), "white").save("a.png")
    Path("data.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 6))
    for words, count in (((), 4), (("--samples", 0), 6), (("--gin-param", "Reach.samples = 2"), 2)):
        done = run("reach", stock, "data.json", *words, "--overwrite")
        assert done.exit_code == 0, (done.output, done.exception)
        assert json.loads(Path("llava_patch_out/reach/stock/reach.json").read_text())["samples"] == count


NAME_IT = "name the folder with the checkpoint's config.json"


@pytest.mark.parametrize("name", [*COMMANDS, "gradients"])
def test_a_folder_that_is_not_there(name: str, stock: Path) -> None:
    for path in ("./gone", "/gone", "some/where/gone", "gone/"):
        assert str(run(name, path).exception) == f"{path}: no such folder: {NAME_IT}"
    if name in ("drift", "fusion-attention"):
        assert str(run(name, stock, "--base", "./gone").exception) == f"--base ./gone: no such folder: {NAME_IT}"


def test_names_of_the_hub_are_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_patch.core import weights

    monkeypatch.setattr(weights, "read_json", lambda source, name: {} if source == "org/model" else None)
    check_checkpoint("org/model")
    for name in ("out/model", "model"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(CheckpointError, match=f"{name}: no such folder; as a hub name: the hub does not give it"):
            check_checkpoint(name)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=f"{name}: no such folder; .* hf download {name}"):
            check_checkpoint(name)


def test_a_table_fits_the_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    show((["name", "a long title of this", "another long title"], [["[first]", "1", "2 of 3"]]), "Title", ["a note"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 40 and "[first]" in out and "2 of 3" in out
    for word in ("a", "long", "title", "of", "this", "another", "Title"):
        assert word in out
    assert "- a note" in out and "1 = " not in out
