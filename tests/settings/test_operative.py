"""The operative text says the settings that are in use: reading it gives an equal configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_patch import FastV, Routing, SkipLinks
from llava_patch.core.errors import SettingError
from llava_patch.core.paths import gin_dir
from llava_patch.integrations.training import llava
from llava_patch.settings import active
from llava_patch.settings import gin_config as config
from llava_patch.settings.methods import to_dict

FILES = sorted(path.name for path in gin_dir().glob("*.gin"))


def again(read, folder):
    (folder / "again.gin").write_text(read.operative, encoding="utf-8")
    return config.read([str(folder / "again.gin")], [])


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_file_survives(name, tmp_path):
    read = config.read([name], [])
    back = again(read, tmp_path)
    assert back == read and back.operative == read.operative
    assert config.read([], ["\n".join(read.bindings())]) == read


def test_it_says_what_the_json_says():
    for params in (["Routing.split = 3"], ["Routing.variant = 'vtw'"], ["s = 4", "Routing.split = %s"]):
        read = config.read([], params)
        lines = read.operative.splitlines()
        for name, value in to_dict(read.routing).items():
            assert name == "method" or f"Routing.{name} = {value!r}" in lines
    assert "Routing.freeze = 'all_but_single'" in config.read([], ["Routing.split = 3"]).operative
    assert "None" not in config.read([], ["Routing.split = 3"]).operative


def test_what_is_switched_off_stays_so_and_what_is_not_bound_stays_open(tmp_path):
    off = again(config.read([], ["SkipLinks.stride = 3", "Patch.fusion = None", "Routing.split = 3"]), tmp_path)
    assert off.off == ("fusion",) and off.routing == Routing(split=3)
    (tmp_path / "again.gin").write_text(config.read([], ["Routing.split = 3"]).operative)
    assert config.read([str(tmp_path / "again.gin")], ["SkipLinks.stride = 3"]).fusion == SkipLinks(stride=3)


# --- settings made at random ------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-2, 40), st.floats(0, 1, allow_nan=False), st.sampled_from([1e-7, 0.5, 1e300, 2**63 - 1, 5e-324])
)
VALUES = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.text(max_size=12), st.lists(st.integers(0, 30), max_size=4).map(tuple)
)
CLASSES = {**config.METHODS, **config.MEASUREMENTS}


@st.composite
def made(draw):
    """One valid settings object of any class: its defaults with some fields changed to something that it takes."""
    cls = CLASSES[draw(st.sampled_from(sorted(CLASSES)))]
    one = cls()
    for field in draw(st.lists(st.sampled_from(dataclasses.fields(cls)), max_size=5)):
        with contextlib.suppress(SettingError):
            one = dataclasses.replace(one, **{field.name: draw(VALUES)})
    return one


FLAG = st.one_of(
    st.booleans(), NUMBERS, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
)


@given(st.lists(made(), max_size=4), st.dictionaries(st.sampled_from(["a", "lr", "b_2"]), FLAG, max_size=3))
@settings(max_examples=250, deadline=None)
def test_settings_of_any_kind_survive(several, flags):
    methods = {one.KIND: one for one in several if hasattr(one, "KIND")}
    measured = {type(one).__name__: one for one in several if not hasattr(one, "KIND")}
    now = config.Configuration(**methods, measurements=measured, flags=flags)
    back = config.read([], [now.operative])
    assert back == now
    assert json.dumps([to_dict(one) for one in back.methods().values() if one]) == json.dumps(
        [to_dict(one) for one in now.methods().values() if one]
    )


# --- beside a run -----------------------------------------------------------------------------------------------------


def test_a_binding_of_several_lines_stays_a_comment_of_the_written_file(tmp_path, monkeypatch):
    with active.also([], ["FastV:\n  layer = 3\n  ratio = 0.25"]):
        llava.write_records(None, tmp_path)
    path = tmp_path / llava.OPERATIVE_FILE
    assert path.read_text().splitlines()[1] == r"# FastV:\n  layer = 3\n  ratio = 0.25"
    assert config.read([str(path)], []).pruning == FastV(layer=3, ratio=0.25)
