import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_patch.cli import main as cli
from llava_patch.core.errors import InputError, SettingError
from llava_patch.data.readers import read_samples


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["rprobe", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (120, 300), (240, 240, 240)).save(folder / f"{name}.png")
        lines = [f"5,{20 * i + 5},90,{20 * i + 20},{name} line {i}" for i in range(4)] + ["5,200,90,220,###"]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


def test_preview_counts_and_draws(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    output = tmp_path / "p" / "preview.png"
    result = run("preview", scans, "--size", 56, "--samples", 2, "--output", output.parent)
    assert result.exit_code == 0
    shown = " ".join(result.output.split())
    for words in ("read as │ icdar", "documents │ 2", "samples │ 8", "regions without transcript │ 2", "skipped │ 0"):
        assert words in shown
    assert Image.open(output).format == "PNG"


def test_preview_of_pages_and_of_what_is_skipped(scans, tmp_path):
    output = tmp_path / "p" / "preview.png"
    result = run("preview", "--size", 56, "--show", "page-train-0-3", "--output", output.parent)
    assert "16 rendered pages" in result.output
    assert output.stat().st_size > 1000
    (scans / "a.txt").write_text("5,5,90,20,fine\n5,5,900,20,far off")
    with pytest.raises(InputError, match=r"a.txt:2: box"):
        run("preview", scans, "--output", output.parent)
    result = run("preview", scans, "--broken", "skip", "--samples", 1, "--output", output.parent)
    assert "skipped: " in result.output
    assert "a.txt:2: box" in result.output


def test_preview_refuses_before_it_reads(tmp_path):
    for arguments, words in (
        (["--output", "p.png"], "--output p.png: a folder is named with it, which gets preview.png"),
        (["a", "--data", "b"], "--data b: DATA is given already: a"),
        (["--image-mode", "squeeze"], "--image-mode squeeze: expected one of"),
        (["--boxes-per-sample", 2], "rendered pages have one region each"),
        (["--text-height", 2], 'RProbe.text_height = 2.0: expected image_mode = "window"'),
        (["--image-mode", "window", "--text-height", 0], "RProbe.text_height = 0.0: expected a number above 0"),
        (["--image-mode", "window", "--text-height", 30], "text_height = 30: the vision tower's input is 24 tokens"),
    ):
        with pytest.raises(SettingError, match=words):
            run("preview", *arguments)


def test_export(scans, tmp_path):
    out = tmp_path / "all.jsonl"
    result = run("export", scans, out, "--boxes-per-sample", 3)
    assert "4 samples of 2 documents (icdar; 2 regions without transcript: boxes only)" in result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0]["text"] == "a line 0\na line 1\na line 2"
    assert lines[0]["image"] == "scans/a.png"
    assert len(lines[0]["all_boxes"]) == 5
    assert [s.boxes for s in read_samples(out)] == [s.boxes for s in read_samples(scans, boxes_per_sample=3)]
    with pytest.raises(SettingError, match=r"expected a .jsonl file"):
        run("export", scans, tmp_path / "all.csv")
    with pytest.raises(SettingError, match=r"all.jsonl: is there already: .*--overwrite"):
        run("export", scans, out)
    assert len(out.read_text().splitlines()) == 4
    (tmp_path / "few").mkdir()
    Image.new("RGB", (120, 300)).save(tmp_path / "few" / "a.png")
    (tmp_path / "few" / "a.txt").write_text("5,5,90,20,only")
    assert "1 sample of 1 document (icdar)" in run("export", tmp_path / "few", tmp_path / "few.jsonl").output
    assert json.loads((tmp_path / "few.jsonl").read_text())["document"] == "a.png"
    run("export", tmp_path / "few", tmp_path / "few.jsonl", "--force")
    (scans / "b.txt").write_text("not a line")
    with pytest.raises(InputError, match=r"b.txt:1"):
        run("export", scans, out, "--overwrite")
    assert len(out.read_text().splitlines()) == 4  # what was there is untouched


def test_preview_skips_a_file_that_breaks_off(scans, tmp_path):
    Image.effect_noise((120, 300), 90).save(scans / "b.png")
    (scans / "b.png").write_bytes((scans / "b.png").read_bytes()[:3000])
    arguments = ["preview", scans, "--size", 56, "--output", tmp_path / "p"]
    with pytest.raises(InputError, match=r"b.txt:1: image .*b.png cannot be read"):
        run(*arguments, "--show", "0", "--show", "4")
    assert "b.txt:1: image" in run(*arguments, "--show", "0", "--show", "4", "--broken", "skip").output.replace(
        "\n", ""
    )
    assert (tmp_path / "p" / "preview.png").is_file()


def test_preview_of_windows(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    where = ["preview", scans, "--size", 56, "--samples", 1, "--output", tmp_path / "p"]
    shown = [
        " ".join(run(*where, *more).output.split()) for more in ((), ("--image-mode", "window", "--text-height", 1))
    ]
    assert "lower than a token │ 8 of 8 (100%)" in shown[0]
    assert "lower than a token │ 0 of 8 (0%)" in shown[1]
    assert "only the beginning in its window │ 8 of 8 (100%)" in shown[1]
