"""Sections run apart from one another, and what is finished is kept."""

import dataclasses
import json

import pytest

from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.measurements.base import NothingToMeasure, decode, encode
from llava_patch.tools.report import build
from llava_patch.tools.report.sections import DONE, FAILED, SKIPPED, Context, Figure, Found, Record, Section, Table


def _works(context, folder):
    (folder / "one.json").write_text("{}")
    return Found("It is <one> & well.", [], [Table(["a"], [["<b>"]], "a & b")], ["one.json"])


def _fails(context, folder):
    raise ValueError("broken <tag>")


def _skips(context, folder):
    raise NothingToMeasure("nothing there")


def _section(name, run, **more):
    return Section(name, name.title(), "About it.", run, **more)


@pytest.fixture
def context(checkpoint):
    return Context(str(checkpoint))


def _states(values):
    return {record.name: record.state for record in values["sections"]}


def test_a_failure_leaves_the_others(context, tmp_path):
    every = [_section("fails", _fails), _section("works", _works), _section("skips", _skips)]
    values = build.build(context, every, every, tmp_path)
    assert _states(values) == {"fails": FAILED, "works": DONE, "skips": SKIPPED}
    text = build.write_page(values, tmp_path).read_text()
    assert "ValueError: broken &lt;tag&gt;" in text and "nothing there" in text and "It is &lt;one&gt;" in text
    assert "<tag>" not in text and "<b>" not in text


def test_finished_sections_are_kept_until_what_they_depend_on_changes(context, tmp_path):
    calls = []
    made = {"count": 1}

    def run(context, folder):
        calls.append(1)
        return _works(context, folder)

    every = [_section("works", run, settings=lambda context: dict(made))]
    again = lambda *fresh, **how: build.build(context, every, every, tmp_path, *fresh, **how)  # noqa: E731
    first = again()
    assert again()["sections"] == first["sections"] and len(calls) == 1
    again(fresh=True)
    assert len(calls) == 2
    made["count"] = 2
    with pytest.raises(CheckpointError, match=r"section works, holds .* count = 1 there, 2 here: .* --overwrite"):
        again()
    again(overwrite=True)
    assert len(calls) == 3
    (tmp_path / "one.json").unlink()
    again()
    assert len(calls) == 4
    context.data = "other.json"
    with pytest.raises(CheckpointError, match=r"data = 'rendered pages' there, .*other\.json' here"):
        again()
    every.append(_section("more", _works))
    assert len(again(overwrite=True)["sections"]) == 2 and len(calls) == 5
    context.data = "third.json"
    left = build.build(context, every, every[1:], tmp_path, overwrite=True)["sections"]
    assert [record.name for record in left] == ["more"]  # nothing of other data stays beside it


def test_failed_and_skipped_sections_run_again(context, tmp_path):
    outcome = [_fails]
    every = [_section("one", lambda *a: outcome[0](*a))]
    assert _states(build.build(context, every, every, tmp_path)) == {"one": FAILED}
    outcome[0] = _works
    assert _states(build.build(context, every, every, tmp_path)) == {"one": DONE}


def test_sections_that_are_not_asked_for_stay(context, tmp_path):
    every = [_section("one", _works), _section("two", _works)]
    build.build(context, every, every[:1], tmp_path)
    assert list(_states(build.build(context, every, every[1:], tmp_path))) == ["one", "two"]


def test_what_was_finished_before_an_interruption_is_kept(context, tmp_path):
    def interrupted(context, folder):
        raise KeyboardInterrupt

    every = [_section("one", _works), _section("two", interrupted)]
    with pytest.raises(KeyboardInterrupt):
        build.build(context, every, every, tmp_path)
    assert [record.name for record in build.read(tmp_path)["sections"]] == ["one"]


def test_choose():
    every = [_section(name, _works) for name in ("a", "b", "c")]
    assert [s.name for s in build.choose(every, ["c", "a"], [])] == ["a", "c"]
    assert [s.name for s in build.choose(every, [], ["b"])] == ["a", "c"]
    with pytest.raises(SettingError, match="--skip d: expected one of a, b, c"):
        build.choose(every, [], ["d"])
    with pytest.raises(SettingError, match="leave no section"):
        build.choose(every, ["a"], ["a"])


def test_a_folder_of_another_checkpoint_or_a_damaged_one(context, tmp_path):
    every = [_section("one", _works)]
    build.build(context, every, every, tmp_path)
    kept = json.loads((tmp_path / build.KEPT).read_text())
    (tmp_path / build.KEPT).write_text(json.dumps({**kept, "checkpoint": "another"}))
    with pytest.raises(CheckpointError, match="is the report of another"):
        build.build(context, every, every, tmp_path)
    (tmp_path / build.KEPT).write_text("{")
    with pytest.raises(CheckpointError, match=r"report\.json: not valid JSON .*: delete it"):
        build.read(tmp_path)
    assert build.build(context, every, every, tmp_path, overwrite=True)["sections"]


def test_a_record_comes_back():
    record = Record(
        "one", "One", "About.", DONE, found=Found("It is.", [Figure("a.png", "a")], [Table(["x"], [["1"]])], ["a.png"])
    )
    assert decode(Record, json.loads(json.dumps(encode(record)))) == record
    skipped = dataclasses.replace(record, state=SKIPPED, found=None, reason="why")
    assert decode(Record, json.loads(json.dumps(encode(skipped)))) == skipped


def test_a_configured_patch_is_measured_shown_and_kept_off_the_base(files, tmp_path):
    from llava_patch import get_handle
    from llava_patch.settings import active

    every = [_section("one", _works)]
    plain = build.build(Context(str(files.hf), base=str(files.hf)), every, every, tmp_path)
    with active.also([], ["Routing.split = 2"]):
        context = Context(str(files.hf), base=str(files.hf))
        own, other = context.openers(1)
        assert get_handle(own()[0]) is not None and get_handle(other()[0]) is None
        with pytest.raises(CheckpointError, match="patches of gin"):
            build.build(context, every, every, tmp_path)
        patched = build.build(context, every, every, tmp_path, overwrite=True)
    assert patched["sections"][0].key != plain["sections"][0].key
    assert "split=2" in dict(patched["facts"])["put on it by gin"]
    assert "put on it by gin" not in dict(plain["facts"])
