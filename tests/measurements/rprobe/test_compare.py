import json
import os

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_patch.cli.main import app
from llava_patch.core.errors import InputError, SettingError
from llava_patch.measurements.rprobe import compare
from llava_patch.measurements.rprobe.bootstrap import paired
from tests.support.results import made_up_result


def command(*words):
    return CliRunner().invoke(app, ["rprobe", "compare", *map(str, words)], env={**os.environ, "COLUMNS": "80"})


def test_command_writes_table_json_and_figure(tmp_path):
    stock, better = made_up_result(shift=0.05), made_up_result()
    stock.save(tmp_path / "stock", formats=())
    better.save(tmp_path / "lmms" / "model" / "rprobe", formats=())
    out = tmp_path / "out"
    done = command(tmp_path / "stock", tmp_path / "lmms", "--output", out, "--format", "png", "--format", "pdf")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == ["compare.json", "compare.md", "compare.pdf", "compare.png"]
    found = json.loads((out / "compare.json").read_text())
    assert found["baseline"] == "stock"
    assert found["results"]["lmms"]["mse"] == pytest.approx(0.4)
    # The shift is the same for every document: its paired interval has no width, the interval of the MSE has.
    assert found["results"]["lmms"]["difference"] == pytest.approx(-0.05)
    assert found["results"]["lmms"]["difference_interval"] == pytest.approx([-0.05, -0.05])
    low, high = found["results"]["lmms"]["mse_interval"]
    assert (low, high) == pytest.approx((0.2, 0.6))
    assert found["notes"] == []
    table = (out / "compare.md").read_text()
    assert (
        "| lmms | 3 | 0.4000 [0.2000, 0.6000] | 0.400 | 20.0 | 0.5000 | 0.1000 | 3 | never | -0.0500 [-0.0500," in table
    )
    assert "| stock |" in table and "| baseline |" in table
    assert len(Image.open(out / "compare.png").convert("RGB").resize((200, 90)).getcolors(1 << 20)) > 20
    assert max(map(len, done.output.split("\nwrote")[0].splitlines())) <= 80


def test_what_differs_is_named_and_other_samples_are_not_paired(tmp_path):
    results = {
        "a": made_up_result(),
        "b": made_up_result(masked=True, seed=3),
        "c": made_up_result(mse=(0.2, 0.4)),
        "d": made_up_result(trained="head"),
    }
    compared = compare.compare_probes(results, "a", 100, 0)
    rows = compared.lines
    assert rows[0].difference is None and rows[0].unlike is None
    assert rows[1].difference == paired(results["b"].documents, results["a"].documents, 100, 0)
    assert rows[2].difference is None and "only in the second result (such as 's2')" in rows[2].unlike
    notes = compare.warnings_of(results, "a")
    assert "b differs from a in more than the model: seed = 3 (there 0), masked = True (there False)" in notes
    assert any(note.startswith("c has other held-out samples than a") for note in notes)
    assert any(note.startswith("d differs from a") and "trained = head (there all)" in note for note in notes)
    assert any(note.startswith('d: trained = "head": not comparable') for note in notes)
    assert compared.rows[2][-1] == "not paired"
    other = made_up_result()
    other.facts.update(source="scans.jsonl", checkpoint="b")
    assert compare.warnings_of({"a": results["a"], "x": other}, "a") == []  # lmms-eval's results do not record it
    results["a"].facts["source"] = "receipts"
    assert "source = scans.jsonl (there receipts)" in compare.warnings_of({"a": results["a"], "x": other}, "a")[0]
    results["a"].facts["source"] = os.path.abspath("scans.jsonl")
    assert compare.warnings_of({"a": results["a"], "x": other}, "a") == []
    del results["a"].facts["source"]
    counts = {"skipped_by_reader": 1, "skipped_train": 2, "skipped_heldout": 3, "unread": 4}
    results["a"].facts.update(dict.fromkeys(counts, 0))
    other.facts.update(counts)
    (apart,) = compare.warnings_of({"a": results["a"], "x": other}, "a")
    assert all(f"{name} = {count} (there 0)" in apart for name, count in counts.items())
    for name in counts:
        del results["a"].facts[name]
    shown = made_up_result(examples=1, maps=0, store=False, resamples=3)
    assert compare.warnings_of({"a": results["a"], "x": shown}, "a") == []  # pictures and the store change no figure


def test_runs_cut_short_and_vacuous_thresholds_are_said():
    import dataclasses

    short = made_up_result()
    short = dataclasses.replace(short, losses=short.losses[:2], threshold_is_vacuous=True)
    results = {"a": made_up_result(), "b": short}
    notes = compare.warnings_of(results, "a")
    assert any("b was stopped after 2 of 4 steps" in note for note in notes)
    assert any(note.startswith("b: a constant patch is under the threshold") for note in notes)
    assert compare.compare_probes(results, "a", 50, 0).rows[1][7] == "(3)"


def test_results_are_found_and_named(tmp_path):
    for place in (
        "x/rprobe.json",
        "y/m/rprobe/rprobe.json",
        "y/m/rprobe_masked/rprobe.json",
        "z.json",
        "w/x/rprobe.json",
    ):
        made_up_result().save((tmp_path / place).parent, (tmp_path / place).stem, ())
    found = compare.find_results(tmp_path / "y")
    assert list(found) == ["y/m/rprobe", "y/m/rprobe_masked"]
    assert list(compare.load([tmp_path / "x", tmp_path / "z.json", tmp_path / "w" / "x"])) == ["x (1)", "z", "x (3)"]
    assert list(compare.load([tmp_path / "x", tmp_path / "z.json"], ["p", "q"])) == ["p", "q"]
    with pytest.raises(SettingError, match="1 name for 2 results"):
        compare.load([tmp_path / "y"], ["p"])
    with pytest.raises(SettingError, match="distinct"):
        compare.load([tmp_path / "y"], ["p", "p"])
    with pytest.raises(InputError, match="no such file or folder"):
        compare.find_results(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no rprobe\.json"):
        compare.find_results(tmp_path / "empty")


def test_refusals_write_nothing(tmp_path):
    made_up_result().save(tmp_path / "a", formats=())
    made_up_result().save(tmp_path / "b", formats=())
    out = tmp_path / "out"
    for words, message in (
        ([tmp_path / "a"], "expected at least two"),
        ([tmp_path / "a", tmp_path / "b", "--baseline", "c"], "--baseline c: expected one of a, b"),
        ([tmp_path / "a", tmp_path / "b", "--format", "svg"], "--format svg"),
        ([tmp_path / "a", tmp_path / "b", "--names", "a"], "1 name for 2 results"),
    ):
        done = command(*words, "--output", out)
        assert done.exit_code == 1 and message in str(done.exception)
    assert not out.exists()


def test_long_names_are_not_broken(tmp_path):
    name = "llava-v1.5-7b-detached-skip-links-from-layers-6-and-12"
    for one in ("a", name):
        made_up_result().save(tmp_path / one, formats=())
    done = command(tmp_path / "a", tmp_path / name, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    table = done.output.split("\nwrote")[0].splitlines()
    assert f"2 = {name}" in table and any(line.split()[:2] == ["2", "0.4000"] for line in table)
    assert "| " + name + " |" in (tmp_path / "out" / "compare.md").read_text()


def test_many_results_share_one_figure():
    from llava_patch.measurements.rprobe.compare import _figure

    many = {f"a long name of checkpoint number {i}": made_up_result(shift=0.02 * i) for i in range(12)}
    first = next(iter(many))
    figure = _figure(compare.compare_probes(many, first, 50, 0))
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 >= 0 and legend.x1 <= figure.bbox.x1 + 1


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_a_terminal_with_whole_names(tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("skiplinks_detached", "deepstack"):
        made_up_result().save(tmp_path / name, formats=())
    folders = [str(tmp_path / name) for name in ("skiplinks_detached", "deepstack")]
    shown = CliRunner().invoke(app, ["rprobe", "compare", *folders, "--output", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    lines = [line for line in shown.output.splitlines() if not line.startswith("wrote")]
    assert sum(line.split()[:1] == ["skiplinks_detached"] for line in lines) == 2
    assert all(len(line) <= width for line in lines if not line.startswith("- "))
    assert "[0.2000, 0.6000]" in shown.output and "[+0.0000, +0.0000]" in shown.output
