"""Gin files are data: they bind our names and do nothing else, and gin itself stays as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gin
from llava_patch import Routing, SkipLinks
from llava_patch.core.errors import SettingError
from llava_patch.core.paths import gin_dir
from llava_patch.settings import active, gin_reader
from llava_patch.settings import gin_config as config


def gins_state():
    """Everything that gin keeps for the whole program."""
    found = {}
    for name, value in vars(gin.config).items():
        if name.startswith("_") and not name.startswith("__") and not callable(value):
            if isinstance(value, (dict, list, set, bool, str, tuple)):
                found[name] = copy.copy(value)
            elif hasattr(value, "_selector_map"):
                found[name] = dict(value.items())
    return found | {"scopes": gin.current_scope(), "locked": gin.config_is_locked(), "text": gin.config_str()}


@pytest.fixture
def a_program_of_gins(monkeypatch, tmp_path):
    """A program with its own configuration, names like ours, an import, a singleton, a search path and the lock."""
    monkeypatch.chdir(tmp_path)
    before = copy.copy(gin.config._LOCATION_PREFIXES), copy.copy(gin.config._IMPORTS)
    for name in ("Routing", "Report", "users_rate"):
        if f"users_program.{name}" not in gin.config._REGISTRY:
            gin.external_configurable(dict, name, module="users_program")
    gin.add_config_file_search_path(str(tmp_path))
    (tmp_path / "own.gin").write_text("import json\nRouting.split = 99\nusers_rate.x = %depth\ndepth = 5\n")
    gin.parse_config_file("own.gin")
    gin.get_configurable("users_rate")()
    gin.finalize()
    yield
    with gin.unlock_config():
        gin.clear_config()
    gin.config._LOCATION_PREFIXES[:] = before[0]
    gin.config._IMPORTS.clear()
    gin.config._IMPORTS.update(before[1])


@pytest.mark.parametrize(
    "bindings",
    [
        ["Routing.split = 3"],
        ["depth = 4", "Routing.split = %depth"],
        ["Routing.splt = 3"],
        ["import collections"],
        ["Routing.split = ("],
        ["Routing.split = -1"],
        ["Patch.routing = @Routing()", "Patch.fusion = @Routing()"],
    ],
)
def test_gin_stays_as_the_program_left_it_also_after_an_error(bindings, a_program_of_gins, monkeypatch):
    before = gins_state()
    assert before["locked"] and "99" in before["text"] and any("users_program" in str(k) for k in before["_REGISTRY"])
    with gin.config_scope("outside"), contextlib.suppress(SettingError):
        config.read(["dpvr_lf_7b.gin", "skiplinks_stage2_7b.gin"], bindings)
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", ";".join(bindings))
    with contextlib.suppress(SettingError):
        active.configuration()
    assert gins_state() == before


def test_the_programs_configuration_does_not_reach_ours(a_program_of_gins):
    read = config.read([], ["SkipLinks.stride = 4"])
    assert read.fusion == SkipLinks(stride=4) and read.routing is None
    assert config.read([], ["Routing.split = 3"]).routing == Routing(split=3)  # although the program's is locked
    with pytest.raises(SettingError, match="%depth is not set"):
        config.read([], ["Routing.split = %depth"])
    assert not any("llava_patch" in name for name, _ in gin.config._REGISTRY.items())


def test_nothing_is_imported(tmp_path):
    (tmp_path / "module_of_a_gin_file.py").write_text("raise SystemExit('ran')")
    (tmp_path / "a.gin").write_text("Routing.split = 3\nimport module_of_a_gin_file\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(SettingError, match=r"a\.gin:2: a gin file cannot import: .*take the line out"):
            config.read([str(tmp_path / "a.gin")], [])
    finally:
        sys.path.remove(str(tmp_path))
    assert "module_of_a_gin_file" not in sys.modules


def test_includes_are_found_beside_the_file_and_then_among_the_shipped_ones(tmp_path, monkeypatch):
    (tmp_path / "here" / "more").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "a.gin").write_text("include 'more/b.gin'\ninclude 'dpvr_lf_7b.gin'\n")
    (tmp_path / "here" / "more" / "b.gin").write_text("include 'c.gin'\n")
    (tmp_path / "here" / "more" / "c.gin").write_text("SkipLinks.stride = 3\n")
    (tmp_path / "elsewhere" / "c.gin").write_text("SkipLinks.stride = 4\n")
    monkeypatch.chdir(tmp_path / "elsewhere")  # where gin's own reader would look
    read = config.read([str(tmp_path / "here" / "a.gin")], [])
    assert read.fusion == SkipLinks(stride=3) and read.routing == Routing(split=18)
    (tmp_path / "here" / "dpvr_lf_7b.gin").write_text("Routing.split = 2\n")
    assert config.read([str(tmp_path / "here" / "a.gin")], []).routing == Routing(split=2)
    (tmp_path / "here" / "more" / "c.gin").unlink()
    with pytest.raises(SettingError, match=r"b\.gin:1: include 'c\.gin': no such file beside b\.gin"):
        config.read([str(tmp_path / "here" / "a.gin")], [])


def test_a_file_may_be_included_twice_but_not_by_itself(tmp_path):
    (tmp_path / "a.gin").write_text("include 'b.gin'\nRouting.split = 3\ninclude 'b.gin'\n")
    (tmp_path / "b.gin").write_text("Routing.split = 4\n")
    assert config.read([str(tmp_path / "a.gin")], []).routing.split == 4
    (tmp_path / "b.gin").write_text("include './a.gin'\n")
    with pytest.raises(SettingError, match=r"b\.gin:1: .*a\.gin > b\.gin > a\.gin.*take one"):
        config.read([str(tmp_path / "a.gin")], [])


def test_a_chain_and_a_tree_of_includes_have_an_end(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.gin").write_text(f"include '{i + 1}.gin'\n")
    with pytest.raises(SettingError, match=r"19\.gin:1|20\.gin:1: too many files"):
        config.read([str(tmp_path / "0.gin")], [])
    for i in range(15):
        (tmp_path / f"{i}.gin").write_text(f"include '{i + 1}.gin'\n" * 2)
    (tmp_path / "15.gin").write_text("Routing.split = 3\n")
    with pytest.raises(SettingError, match="too many files"):
        config.read([str(tmp_path / "0.gin")], [])


def test_blocks_prefixes_windows_lines_and_a_byte_order_mark_are_read(tmp_path):
    text = "Routing:\n  split = 3  # three\n\n  side_layers = 2\nllava_patch.SkipLinks.stride = \\\n    4\n"
    (tmp_path / "a.gin").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    read = config.read([str(tmp_path / "a.gin")], [])
    assert read.routing == Routing(split=3, side_layers=2) and read.fusion == SkipLinks(stride=4)


def test_a_macro_of_an_included_binding_that_is_replaced_is_no_error(tmp_path):
    (tmp_path / "a.gin").write_text("depth = 5\nRouting.split = %depth\nf = @SkipLinks()\nPatch.fusion = %f\n")
    read = config.read([str(tmp_path / "a.gin")], ["Routing.split = 4"])
    assert read.routing == Routing(split=4) and read.fusion == SkipLinks()


def test_an_error_names_the_file_and_line_that_bound_the_value(tmp_path):
    (tmp_path / "a.gin").write_text("# a comment\nRouting.variant = 'pc'\nRouting.split = -1\n")
    with pytest.raises(SettingError, match=r"^\S*a\.gin:3: Routing\.split = -1: expected an integer >= 0$"):
        config.read([str(tmp_path / "a.gin")], [])
    with pytest.raises(SettingError, match=r"^Routing\.split = -2: expected an integer >= 0$"):
        config.read([str(tmp_path / "a.gin")], ["Routing.split = -2"])


# --- two methods of a kind --------------------------------------------------------------------------------------------

TWO = [("fusion", "SkipLinks", "DeepStack.start = 1"), ("fusion", "DeepStack", "SkipLinks.stride = 3")]


@pytest.mark.parametrize(("kind", "named", "binding"), TWO)
@pytest.mark.parametrize("first", [True, False])
def test_two_methods_of_a_kind_are_both_named(kind, named, binding, first):
    lines = [f"Patch.{kind} = @{named}()", binding]
    with pytest.raises(SettingError, match=r"two fusions are bound: .*; a model takes one: take the other") as caught:
        config.read([], lines if first else lines[::-1])
    assert named in str(caught.value) and binding.split(".")[0] in str(caught.value)


def test_a_second_method_of_any_kind_is_refused(monkeypatch):
    """One per kind, whichever kinds have several now."""
    for kind in ("routing", "pruning", "probe"):
        (name, cls) = next((n, c) for n, c in config.METHODS.items() if kind == c.KIND)
        twin = dataclasses.make_dataclass("Twin", [("depth", int, 1)], namespace={"KIND": kind})
        known = {name: cls, "Twin": twin}
        monkeypatch.setattr(
            config.registry, "methods", lambda wanted=None, k=kind, both=known: both if wanted == k else {}
        )
        monkeypatch.setitem(config.KNOWN, "Twin", ("depth",))
        with pytest.raises(SettingError, match=f"two {kind}s are bound: {name} .* and Twin "):
            config.read([], [f"Patch.{kind} = @{name}()", "Twin.depth = 3"])
        monkeypatch.undo()


# --- any text at all --------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["Routing", "SkipLinks", "Patch", "fusion", "split", ".", "=", " ", "\n", "  ", "(", ")", "[", "]", "{", "}", ":",
     ",", "@", "%", "'", '"', '"""', "\\", "3", "-", "1e999", "None", "a", "include ", "import ", "#", "\t", "\0", "/",
     "\ufeff", "\r", "'x.gin'", "Flags.x = 3\n", "Routing.split = ", "0x", "é", "\x0c", ";", "Sweep", "macro", "gin"]
)  # fmt: skip


@given(st.one_of(st.lists(PIECES, max_size=25).map("".join), st.text(max_size=60)))
@example("Routing:\n split = 3\nx")
@example("Routing.split = (")
@example("x.")
@settings(max_examples=600, deadline=None)
def test_any_text_is_read_or_refused_in_our_words(text):
    with contextlib.suppress(SettingError):
        gin_reader.read([], [text], config.KNOWN)


@given(content=st.binary(max_size=80))
@example(content=b"\xff\xfe")
@example(content=b"Routing.split = 3\n\x00")
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused_with_the_files_name(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.gin"
    path.write_bytes(content)
    try:
        config.read([str(path)], [])
    except SettingError as error:
        assert "any.gin" in str(error)


def test_every_shipped_file_is_far_from_the_limits():
    largest = max(path.stat().st_size for path in gin_dir().glob("*.gin"))
    assert largest * 50 < gin_reader.LARGEST_FILE
