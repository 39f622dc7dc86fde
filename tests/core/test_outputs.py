"""Where results go, and the page that lists them."""

import os
import re
from pathlib import Path

import pytest

from llava_patch.core import outputs
from llava_patch.core.files import write_text
from llava_patch.core.outputs import place, write_index


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def result(command, name, *files, when=0):
    folder = place(command, name)
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("x")
        os.utime(folder / file, (when, when))
    return folder


def rows():
    return re.findall(r"<tr><td>.*</tr>", Path("llava_patch_out/index.html").read_text(encoding="utf-8"))


def test_names_of_folders():
    assert place("drift", "a") == Path("llava_patch_out/drift/a")
    assert place("saturation-compare", "a b", "x/y") == Path("llava_patch_out/saturation-compare/a_b+x_y")
    assert place("correlate", "..") == Path("llava_patch_out/correlate/results")
    assert len(place("correlate", *("name" * 20,) * 9).name) == 100


def test_the_page_lists_what_is_there_the_newest_first():
    result("drift", "old", "drift.json", "drift.png", when=1_000_000_000)
    folder = result("report", "a <b> & c", "report.html", "x.json", when=1_700_000_000)
    assert write_index(folder) == Path("llava_patch_out/index.html")
    first, second = rows()
    assert '<a href="report/a_b_c/">' in first and '<a href="report/a_b_c/report.html">report.html</a>' in first
    assert "2023-11-14 22:13 UTC" in first and "<td>drift</td>" in second and "2001-09-09 01:46 UTC" in second
    assert second.index("drift.png") < second.index("drift.json")


def test_results_elsewhere_make_no_page(tmp_path):
    (tmp_path / "mine").mkdir()
    assert write_index(Path("mine")) is None and not Path("llava_patch_out").exists()
    result("drift", "a", "drift.json")
    assert write_index(Path("mine")) is None and not Path("llava_patch_out/index.html").exists()


def test_broken_entries_are_in_nobodys_way():
    folder = result("drift", "good", "drift.json")
    result("drift", "unfinished", "state.safetensors")
    (place("drift", "empty")).mkdir()
    place("drift", "nowhere").symlink_to("gone")
    place("drift", "round").symlink_to(place("drift", "round").name)
    Path("llava_patch_out/a file").write_text("x")
    os.mkdir(os.fsencode(place("drift", "x")) + b"\xff <")
    Path(os.fsdecode(os.fsencode(place("drift", "x")) + b"\xff <"), "drift.json").write_text("x")
    write_index(folder)
    page = "\n".join(rows())
    assert page.count("<tr>") == 4 and page.count("cannot be read") == 2
    assert ">good</a>" in page and "unfinished" not in page and "x%FF%20%3C/drift.json" in page


def test_a_page_written_meanwhile_is_not_lost(monkeypatch):
    """Another command ends between this one's look and its writing; the older page must not be the last one."""
    folder = result("drift", "one", "drift.json")
    written = []

    def slow(path, text):
        if not written:
            result("drift", "two", "drift.json")
            write_text(path, "the other's page, with both")
        written.append(text)
        return write_text(path, text)

    monkeypatch.setattr(outputs, "write_text", slow)
    write_index(folder)
    assert len(written) == 2 and len(rows()) == 2


def test_many_processes_end_at_once():
    children = []
    for number in range(6):
        if not (child := os.fork()):
            write_index(result("drift", f"run{number}", "drift.json"))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert len(rows()) == 6 and [path.name for path in Path("llava_patch_out").iterdir() if path.is_file()] == [
        "index.html"
    ]
