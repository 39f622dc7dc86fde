"""`llava-patch saturation`: one checkpoint, several, what is refused, and what the same command takes up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_patch import FastV, Routing, patch
from llava_patch.cli.main import app
from llava_patch.cli.measure import settings_for
from llava_patch.core import plotting, registry
from llava_patch.core.errors import CheckpointError, InputError, SettingError
from llava_patch.data.target import Target
from llava_patch.measurements.base import find_result, names_of
from llava_patch.measurements.saturation import measure
from llava_patch.measurements.saturation.figure import comparison_figure, saturation_figure
from llava_patch.measurements.saturation.measure import STATE_FILE
from llava_patch.measurements.saturation.result import Curves, PatchOn, SaturationResult, compare
from tests.support import fileset

from .test_recommend import paper_like

FILE = "saturation.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> Path:
    """Folder with `stock`, a Hugging Face checkpoint, and `routed`, the same one patched."""
    folder = tmp_path_factory.mktemp("models")
    fileset.write_hf(folder / "stock")
    model = fileset.hf_model()
    patch(model, routing=Routing(split=2), pruning=FastV(layer=1, ratio=0.5)).save(folder / "routed", form="full")
    fileset.processor().save_pretrained(folder / "routed")
    return folder


def run(*words: Any, fails: Any = None, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["saturation", *map(str, words)])
    if fails is not None:
        assert isinstance(done.exception, fails), done.output
        return str(done.exception)
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_one_checkpoint_in_short(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    out = run(models / "stock", "--samples", 2)
    folder = Path("llava_patch_out/saturation/stock")
    assert "(2 samples)" in out and f"wrote {folder / 'saturation.json'}" in out
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == ["saturation.json", "saturation.png"]
    values = json.loads((folder / "saturation.json").read_text())
    assert values["facts"]["checkpoint"] == str(models / "stock") and values["facts"]["data"] == "rendered pages"
    assert values["patch"] is None and values["settings"]["max_samples"] == 2
    said = run("run", models / "routed", "--samples", 1, "--output", folder, fails=CheckpointError)
    assert "holds the results of" in said and "--output" in said
    out = run(models / "routed", "--samples", 1, "--gin-param", "Saturation.chunk = 7")
    values = json.loads(Path("llava_patch_out/saturation/routed/saturation.json").read_text())
    assert values["patch"]["split"] == 2 and values["patch"]["prune_at"] == 1 and values["settings"]["chunk"] == 7
    assert "routed (lf, split 2) and pruned" in out.replace("\n", " ")


def test_samples_are_made_when_they_are_asked_for(models: Path, tmp_path: Path) -> None:
    from PIL import Image

    for i in range(6):
        Image.new("RGB", (30, 30), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    samples = Target(str(models / "stock"), str(tmp_path), question="What?").samples(3)
    assert len(samples) == 3 and len(samples[1:]) == 2 and len(list(samples[2:])) == 1
    saturation = registry.measurement("saturation")
    assert settings_for(saturation, None, {}).max_samples == 32 and settings_for(saturation, 0, {}).max_samples is None


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = (models / "stock", "--samples", 3, "--output", tmp_path / "out")
    run(*words[:3], "--output", tmp_path / "whole")
    real, calls = measure.measure_sample, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measure, "measure_sample", interrupted)
    assert "interrupted" in run(*words, code=130)
    assert (tmp_path / "out" / STATE_FILE).is_file()
    assert "Saturation.chunk was 128 there and is 5 here" in run(
        *words, "--gin-param", "Saturation.chunk = 5", fails=CheckpointError
    )
    run(*words)
    assert len(calls) == 4 and not (tmp_path / "out" / STATE_FILE).exists()
    first, second = (json.loads((tmp_path / n / "saturation.json").read_text()) for n in ("whole", "out"))
    assert first == second


def test_checkpoints_and_earlier_results_are_compared(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run(models / "stock", "--samples", 1, "--output", tmp_path / "earlier")
    words = ("compare", tmp_path / "earlier", models / "routed", "--samples", 1, "--output", tmp_path / "out")
    out = run(*words)
    assert "earlier" in out and "2 (50 %)" in out and "routed: no split: the model is already routed" in out
    values = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(values["results"]) == ["earlier", "routed"] and len(values["table"]["rows"]) == 2
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    monkeypatch.setattr(measure, "measure_sample", None)  # what is there is not measured again
    assert "measured before" in run(*words)
    assert "expected at least two" in run("compare", tmp_path / "earlier", fails=SettingError)
    (tmp_path / "empty").mkdir()
    assert "neither a checkpoint" in run("compare", tmp_path / "earlier", tmp_path / "empty", fails=CheckpointError)
    assert "no such file" in run("compare", tmp_path / "earlier", "nowhere.json", fails=InputError)


def test_results_are_found_and_named(tmp_path: Path) -> None:
    for name in ("a/one", "b/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "saturation.json").write_text("{}")
    assert find_result(str(tmp_path / "a"), FILE) == tmp_path / "a" / "one" / "saturation.json"
    (tmp_path / "a" / "config.json").write_text("{}")
    assert find_result(str(tmp_path / "a"), FILE) is None
    with pytest.raises(InputError, match="several results"):
        find_result(str(tmp_path), FILE)
    paths = [str(tmp_path / "a" / "one"), str(tmp_path / "b" / "one" / "saturation.json")]
    assert names_of(paths, "", FILE) == ["a", "b"] and names_of(["x/a", "x/b"]) == ["a", "b"]
    assert names_of(["x/a", "y/a", "x/b"]) == ["x__a", "y__a", "x__b"] and names_of(["a", "a"]) == ["a-1", "a-2"]
    assert names_of(paths, "p, q") == ["p", "q"]
    with pytest.raises(SettingError, match="2 distinct names"):
        names_of(paths, "p,p")


def made(layers: int = 32, patch_on: PatchOn | None = None) -> Any:
    mass = paper_like()[:layers] if layers <= 32 else [*paper_like()[:-1], *[0.04] * (layers - 32), 0.2]
    kl = [4.0] * 20 + [1.0] * (layers - 21) + [0.0]
    flat = [0.9] * layers
    curves = Curves(flat, flat, [[m, m] for m in mass], kl, kl, [576] * layers, [576] * layers)
    return SaturationResult(curves, 4, patch=patch_on)


def test_the_papers_7b_curve_recommends_18() -> None:
    result = made()
    assert result.recommended_split == 18 and result.worded(18) == "18 (56 %)"
    assert "layer 18 (56 %) of 32, window 18..20" in result.summary()


def test_an_image_that_leaves_early_has_no_transition() -> None:
    nan = float("nan")
    for kl, layer, said in (
        ([2.0, 1.5, nan, nan, 0.0], None, "image none (not reached before the image leaves at layer 2), text 4"),
        ([2.0, 0.5, nan, nan, 0.0], 1, "image 1 (20 %), text 4"),
        ([0.0] * 5, None, "image none, text 4"),
    ):
        gone = [nan if value != value else 0.9 for value in kl]
        curves = Curves(gone, [0.9] * 5, [[0.1]] * 5, kl, [2.0] * 4 + [0.0], [4] * 5, [4] * 5)
        found = SaturationResult(curves, 1, patch=PatchOn(2, None, "routed (lf, split 2)"))
        assert found.image_transition == layer and said in found.summary()
        values = found.to_dict()
        assert values["image_transition_layer"] == layer
        assert values["image_leaves_layer"] == (None if kl[-2] == 0 else 2)
        assert SaturationResult.from_dict(values).summary() == found.summary()


def texts(figure: Any) -> list[str]:
    return [t.get_text() for legend in figure.legends for t in legend.get_texts()]


def test_figures_mark_recommended_and_own_splits_apart(tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plotting, "write_figure", lambda figure, path: drawn.append(figure) or path)
    saturation_figure(made(), tmp_path / "a.png")
    saturation_figure(made(patch_on=PatchOn(14, 3, "routed (lf, split 14)")), tmp_path / "b.png")
    assert "recommended split 18" in texts(drawn[0]) and "image transition 20" in texts(drawn[0])
    assert not any("own" in text for text in texts(drawn[0]))
    assert "own split 14" in texts(drawn[1]) and "pruning from layer 3" in texts(drawn[1])
    assert not any("recommended" in text for text in texts(drawn[1]))
    for axis in drawn[0].axes:
        assert axis.get_xlabel() == "decoder layer" and axis.get_ylabel() and axis.get_title()
    lines = [{line.get_label(): line.get_linestyle() for line in figure.axes[0].lines} for figure in drawn]
    assert lines[0]["recommended split 18"] == ":" and lines[1]["own split 14"] == "--"  # as plotting.mark_split
    comparison_figure({"7b": made(), "13b": made(40), "own": made(patch_on=PatchOn(14, None, "x"))}, tmp_path / "c.png")
    assert texts(drawn[2]) == ["7b (split 18)", "13b (split 18)", "own (own split 14)"]
    assert all("%" in axis.get_xlabel() for axis in drawn[2].axes)


def test_a_table_says_what_differs_besides_the_model() -> None:
    import dataclasses

    one, other = made(), dataclasses.replace(made(), facts={"data": "b.json"}, samples=9)
    found = compare({"one": one, "other": other})
    assert "own" not in found.head and found.rows[0][:4] == ["one", "32", "18 (56 %)", "18..20"]
    (said,) = found.notes
    assert "data = b.json (there None), samples = 9 (there 4)" in said
    found = compare({"one": made(patch_on=PatchOn(14, None, "x"))})
    assert found.head[-1] == "own" and found.rows[0][-1] == "14 (44 %)"
