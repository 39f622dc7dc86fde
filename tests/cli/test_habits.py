"""One habit across all commands: a word of the command line means the same wherever it is there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llava_patch.cli.main import app
from tests.support.paths import ROOT

WRITTEN = ROOT / "tests" / "compatibility" / "written"
OPTIONS = {
    "--data": (False, r"DATA, spelled as an option"),
    "--base": (False, r"the model that CKPT was trained from: below an adapter, .* CKPT's record names"),
    "--samples": (False, r"how many, spread evenly over DATA; 0: all of it; default: .*"),
    "--output": (False, r"folder for results(; default: llava_patch_out/COMMAND/ and .*| and report; .*)"),
    "--format": (True, r"of figures: png or pdf; may be repeated"),
    "--only": (True, r"this \w+ only(, with what it needs)?; may be repeated"),
    "--overwrite": (False, r"replace (results of other settings, data or checkpoints in OUTPUT|OUT)"),
    "--device": (False, r"cpu, cuda or cuda:N; default: cuda where there is one"),
    "--question": (False, r"asked about every image; .*"),
    "--gin-file": (True, r"gin file with bindings of this measurement or a patch; may be repeated"),
    "--gin-param": (True, r"one gin binding; may be repeated"),
}
"""Whether it may be repeated, and the help, of each option that several commands have."""
DATA = r"images: LLaVA's JSON, .* R-Probe needs them: .*"
NO_BASE = {"doctor", "flops", "sweep", "bench"}
"""Commands with CKPT, or a model, that read no weights under it."""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its words."""

    def walk(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words, command
        for name, one in (inner or {}).items():
            yield from walk(one, f"{words} {name}".strip())

    yield from walk(typer.main.get_command(app), "")


COMMANDS = dict(commands())


@pytest.mark.parametrize("words", COMMANDS)
def test_what_a_word_means(words: str) -> None:
    parameters = {one.name: one for one in COMMANDS[words].params if not getattr(one, "hidden", False)}
    spelled = {option: one for one in parameters.values() for option in one.opts if option.startswith("--")}
    for option, (several, text) in OPTIONS.items():
        if option in spelled:
            one = spelled[option]
            said = text.replace(
                "COMMAND", words.replace(" run", "").replace(" ", "-").replace("rprobe-correlate", "correlate")
            )
            assert re.fullmatch(said, one.help), f"{words} {option}: {one.help}"
            assert bool(one.multiple) == several, f"{words} {option}"
    names = {one.metavar: one for one in parameters.values() if one.param_type_name == "argument"}
    if "DATA" in names:
        assert re.match(DATA, names["DATA"].help) and ("--data" in spelled or words == "rprobe export")
    if any((name or "").startswith("CKPT") for name in names) and words not in NO_BASE:
        assert "--base" in spelled
    assert "--force" not in spelled and ("--gin-file" in spelled) == ("--gin-param" in spelled)
    for option in ("--gin-file", "--gin-param"):
        assert option not in spelled or option.replace("gin-", "gin_") in spelled


def test_the_table_is_of_options_that_there_are() -> None:
    there = {option for command in COMMANDS.values() for one in command.params for option in one.opts}
    assert set(OPTIONS) <= there and len(COMMANDS) > 20


NOT_THERE = {
    "./nosuch": "./nosuch: no such folder: name the folder",
    "me/nosuch": "it is not on this machine: hf download me/nosuch",
    "empty": "config.json",
}
"""What leads to no checkpoint, with what the error says of it."""
PLAIN = ("run", "reach", "drift", "flops", "inspect", "report", "merge")
TAKES = (
    *((name,) for name in COMMANDS if name.split()[-1] in PLAIN),
    ("attention-maps",), ("fusion-attention",), ("convert", "--to", "hf"), ("rprobe preview", "--model"),
    ("doctor",),
)  # fmt: skip


@pytest.mark.parametrize("name", NOT_THERE)
@pytest.mark.parametrize("words", TAKES, ids=" ".join)
def test_what_is_no_checkpoint_is_told_apart(
    words: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_patch.tools.doctor import examine

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for slow in ("start_imports", "check_hosts", "check_attention", "check_imports"):
        monkeypatch.setattr(examine.software, slow, lambda *given: [])
    (tmp_path / "empty").mkdir()
    given = [*words[0].split(), *words[1:]]
    place = [] if words[0] not in ("drift", "fusion-attention") else ["--base", str(WRITTEN / "base")]
    done = CliRunner().invoke(app, [*given, name, *place])
    said = f"{done.exception} {done.output}"
    assert done.exit_code != 0 and NOT_THERE[name] in said and name in said, said
    assert not Path("llava_patch_out").exists()


def test_an_adapter_is_put_on_the_base_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WRITTEN / "adapters" / "skip_links_lf", tmp_path / "adapter")

    def merge(*words: Any) -> str:
        return str(CliRunner().invoke(app, ["merge", "adapter", *map(str, words)]).exception)

    assert "base: no such folder" in merge()  # it was left behind
    assert "no plain form" in merge("--base", WRITTEN / "base")  # of a routing; its base was read


def test_a_checkpoint_is_converted_into_the_folder_of_all_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import tiny_train
    from tests.support.release import write_fileset

    monkeypatch.chdir(tmp_path)
    made = write_fileset(tmp_path / "set", vision=tiny_train.VISION, text=tiny_train.TEXT, vocab_size=512).hf

    def convert() -> Any:
        return CliRunner().invoke(app, ["convert", str(made), "--to", "llava"])

    done, place = convert(), f"convert/{Path(made).name}"
    assert done.exit_code == 0, (done.output, done.exception)
    assert (tmp_path / "llava_patch_out" / place / "config.json").is_file()
    assert f"{place}/config.json" in Path("llava_patch_out/index.html").read_text()
    assert "is there already and not an empty folder" in str(convert().exception)
