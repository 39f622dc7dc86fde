"""Gin files and bindings: whatever is in them, and whichever way they come."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from llava_patch.settings import active, gin_config
from tests.reliability.place import Call, Place, Row

Way = Callable[[Place, str], Call]
NAME = "mine.gin"
UNCLOSED = "never closed: close it"
LINE = "a line is as Routing.split = 18"
TAKEN = "take the other's bindings out"


# --- the ways in ------------------------------------------------------------------------------------------------------


def _read_file(place: Place, name: str) -> Call:
    return lambda: gin_config.read([name], [])


def _file_variable(place: Place, name: str) -> Call:
    def call() -> None:
        with mock.patch.dict(os.environ, {active.FILE_VARIABLE: name}):
            active.configuration()

    return call


def _file_flag(place: Place, name: str) -> Call:
    def call() -> None:
        with mock.patch.object(sys, "argv", ["train.py", "--gin_file", name]):
            active.take_flags_from_command_line()
            active.configuration()

    return call


def _sweep(place: Place, name: str) -> Call:
    return place.command("sweep", name, "--output", "out", "--", "true")


def _flops(place: Place, name: str) -> Call:
    return place.command("flops", "--gin-file", name)


def _read_param(place: Place, text: str) -> Call:
    return lambda: gin_config.read([], [text])


def _param_variable(place: Place, text: str) -> Call:
    def call() -> None:
        with mock.patch.dict(os.environ, {active.PARAM_VARIABLE: text}):
            active.configuration()

    return call


def _param_flag(place: Place, text: str) -> Call:
    def call() -> None:
        with mock.patch.object(sys, "argv", ["train.py", f"--gin_param={text}"]):
            active.take_flags_from_command_line()
            active.configuration()

    return call


FILE_WAYS = itertools.cycle([_read_file, _file_variable, _file_flag, _sweep, _flops])
PARAM_WAYS = itertools.cycle([_read_param, _param_variable, _param_flag])


def _file(what: str, content: Any, *says: str, by: Way | None = None, **others: Any) -> Row:
    """A file of its own beside `others`."""
    way = by or next(FILE_WAYS)

    def make(place: Place) -> Call:
        for name, text in others.items():
            place.file(f"{name}.gin", text)
        place.file(NAME, content)
        return way(place, NAME)

    return Row("gin file", f"{what}, by {way.__name__.strip('_')}", make, says)


def _param(what: str, text: str, *says: str, by: Way | None = None) -> Row:
    chosen = by or next(PARAM_WAYS)
    return Row("gin binding", f"{what}, by {chosen.__name__.strip('_')}", lambda place: chosen(place, text), says)


def _name(what: str, name: str, *says: str) -> Row:
    way = next(FILE_WAYS)

    def make(place: Place) -> Call:
        place.file("folder/inside.gin", "Routing.split = 3\n")
        return way(place, name)

    return Row("gin file's name", f"{what}, by {way.__name__.strip('_')}", make, says)


def _each_way(what: str, content: str, *says: str) -> list[Row]:
    return [_file(what, content, *says) for _ in range(5)]


def _setting(setting: str, value: str, *expected: str) -> Row:
    says = (f"{NAME}:2: {setting} = ", "expected", *expected)
    return _file(f"{setting} = {value[:20]}", f"# a value\n{setting} = {value}\n", *says)


def _unreadable(place: Place) -> Call:
    path = place.file(NAME, "Routing.split = 3\n")

    def call() -> None:
        denied = PermissionError(13, "Permission denied")
        with mock.patch("pathlib.Path.read_bytes", side_effect=denied):
            gin_config.read([str(path)], [])

    return call


BOMB = (
    "".join(f"m{i} = ({', '.join([f'%m{i + 1}'] * 10)})\n" for i in range(8)) + "m8 = 1\nRouting.fusion_layers = %m0\n"
)

ROWS = [
    # What a file does that is no binding of ours
    *_each_way("import of a module that is not there", "\nimport nosuchmod\n", f"{NAME}:2:", "take the line out"),
    _file("import of a module that is there", "import os\n", f"{NAME}:1:", "cannot import", "take the line out"),
    _file("from ... import", "from os import path\n", f"{NAME}:1:", "cannot import", "take the line out"),
    _file("import ... as", "import os.path as p\n", f"{NAME}:1:", "cannot import", "take the line out"),
    _file("an included file imports", "include 'b.gin'\n", "b.gin:1:", "cannot import", b="import os\n"),
    _file("a name of another program", "Trainer.lr = 3\n", f"{NAME}:1:", "Known names: Patch"),
    _file("a name of Python", "os.system = 'true'\n", f"{NAME}:1:", "No name of llava_patch is os", "Known names"),
    _file("a name of gin", "gin.macro.value = 3\n", f"{NAME}:1:", "No name of llava_patch is gin.macro", "Known names"),
    _file("a name with a slip", "Routng.split = 3\n", f"{NAME}:1:", "Did you mean Routing?"),
    _file("a setting with a slip", "Routing.splt = 3\n", f"{NAME}:1:", "has no setting splt", "did you mean split?"),
    _file("a scope", "a/Routing.split = 3\n", f"{NAME}:1:", "scoped binding", "bind Routing itself"),
    _file("a block of another name", "Routng:\n  split = 3\n", f"{NAME}:1:", "Did you mean Routing?"),
    _file("a macro without a use", "split = 3\n", f"{NAME}:1:", "sets nothing", "as in Routing.split = ..."),
    _file("a macro that is not set", "Routing.split = %s\n", f"{NAME}:1:", "%s is not set", "add s = ..."),
    _file("a macro of itself", "s = %t\nt = %s\nRouting.split = %s\n", f"{NAME}:3:", "set to itself",
          "give it a value"),
    _file("macros that multiply", BOMB, f"{NAME}:10:", "too many values"),
    _file("nothing but a comment", "# nothing\n", NAME, "configures nothing: bind Patch.fusion", by=_file_flag),
    # Includes
    _file("include that is missing", "\ninclude 'b.gin'\n", f"{NAME}:2:", "'b.gin'", "no such file beside mine.gin"),
    _file("include with a slip", "include 'dpvr_lf_7.gin'\n", f"{NAME}:1:", "did you mean dpvr_lf_7b.gin?"),
    _file("include by an absolute path", "include '/etc/hostname'\n", f"{NAME}:1:", "beside it", "put the file there"),
    _file("include above", "include '../b.gin'\n", f"{NAME}:1:", "beside it", "put the file there"),
    _file("include without a name", "include ''\n", f"{NAME}:1:", "include ''", "by name"),
    _file("include of a number", "include 3\n", f"{NAME}:1:", "Expected file path as string"),
    _file("include of 5,000 letters", f"include '{'x' * 5000}'\n", f"{NAME}:1:", "xxx...xxx", "no such file beside"),
    _file("include of itself", f"include '{NAME}'\n", f"{NAME}:1:", "include one another (mine.gin > mine.gin)",
          "take one"),
    _file("two that include one another", "include 'b.gin'\n", "b.gin:1:", "mine.gin > b.gin > mine.gin", "take one",
          b=f"include '{NAME}'\n"),
    _file("an error in an included file", "include 'b.gin'\n", "b.gin:2:", UNCLOSED, b="\nRouting.split = (\n"),
    _param("an include", "include 'b.gin'", "only a file can include", "--gin_file"),
    # What the parser cannot read
    *_each_way("a bracket that is not closed", "\nRouting.fusion_layers = (1, 2\n", f"{NAME}:", UNCLOSED),
    _file("a quote that is not closed", "Routing.variant = 'lf\n", f"{NAME}:1:", UNCLOSED),
    _file("three quotes that are not closed", 'Routing.variant = """lf\n\n', f"{NAME}:1:", UNCLOSED),
    _file("3,000 brackets", f"Routing.split = {'(' * 3000}\n", f"{NAME}:1:", "too deeply: write a flat value"),
    _file("no value", "Routing.split =\n", f"{NAME}:1:", LINE),
    _file("two values", "Routing.split = 3 4\n", f"{NAME}:1:", "Expected newline", LINE),
    _file("no equals sign", "Routing.split 3\n", f"{NAME}:1:", "expected ':' or '='", LINE),
    _file("signs", "$%&\n", f"{NAME}:1:", LINE),
    _file("indents that do not fit", "Routing:\n    split = 3\n  side_layers = 1\n", f"{NAME}:3:", "unindent", LINE),
    _file("a word without quotes", "Routing.variant = lf\n", f"{NAME}:1:", "neither a number nor quoted"),
    _file("a dict with a list for a key", "Sweep.grid = {[1]: 2}\n", f"{NAME}:1:", "unhashable", LINE),
    _file("a picture", bytes(range(256)), f"{NAME}:2:", "not text in UTF-8", "name another"),
    _file("Latin-1", "# Maße\nRouting.split = 3\n".encode("latin-1"), f"{NAME}:1:", "not text in UTF-8", "convert it"),
    _file("NUL", "Routing.split = 3\n\0\n", f"{NAME}:2:", "NUL"),
    _file("a megabyte and more", "#" * 1_000_001, NAME, "1,000,001 bytes are no gin file", "name another"),
    Row("gin file", "one that may not be read", _unreadable, (NAME, "Permission denied", "name another")),
    # Names of files
    _name("5,000 letters", "x" * 5000, "xxx...xxx", "no such gin file", "llava-patch gin-files lists them"),
    _name("a folder", "folder", "folder: not a file", "name a gin file in it"),
    _name("a device", "/dev/zero", "/dev/zero: not a file", "name a gin file in it"),
    _name("nothing there", "none.gin", "none.gin: no such gin file", "gin-files lists them"),
    _name("a slip", "dpvr_lf_7.gin", "did you mean dpvr_lf_7b.gin?"),
    Row("gin file's name", "empty", lambda place: _read_file(place, ""), ("''", "a gin file needs a name")),
    Row("gin file's name", "NUL", lambda place: _read_file(place, "a\0.gin"), ("a\\x00.gin", "no such gin file")),
    Row("gin file's name", "lone surrogate", lambda place: _read_file(place, "\udc80.gin"), ("\\udc80.gin", "no such")),
    Row("gin file's name", "flag alone", lambda place: _flag_alone, ("--gin_file needs a value",)),
    # Single bindings
    _param("import", "import os", "import os: a gin file cannot import", "take the line out"),
    _param("a bracket that is not closed", "Routing.fusion_layers = (1", UNCLOSED),
    _param("a semicolon in quotes", "Flags.name = 'a;b'", UNCLOSED, "LLAVA_PATCH_GIN_PARAM", by=_param_variable),
    _param("a name with a slip", "Routng.split = 3", "Routng.split = 3: ", "Did you mean Routing?"),
    _param("two in one flag", "FastV.layer = 2; FastV.ratio = 0.5", "one binding a --gin_param", by=_param_flag),
    _param("5,000 letters", "x" * 5000 + " = 3", "xxx...xxx", "sets nothing"),
    _param("a lone surrogate", "Drift.base = '\udc80'", "Drift.base", "not text in UTF-8"),
    _param("NUL", "Drift.base = '\0'", "Drift.base", "NUL", by=_param_flag),
    _param("nothing but a comment", "# nothing", "# nothing configures nothing: bind Patch.fusion", by=_param_flag),
    _param("a sweep", "Sweep.grid = {'Routing.split': (1,)}", "describes a sweep", by=_param_variable),
    # Two of a kind
    _file("two fusions, one by its settings alone", "Patch.fusion = @SkipLinks()\nDeepStack.start = 1\n",
          "two fusions", f"SkipLinks ({NAME}:1)", f"DeepStack ({NAME}:2)", TAKEN),
    _file("two fusions, the named one second", "DeepStack.start = 1\nPatch.fusion = @SkipLinks()\n",
          f"SkipLinks ({NAME}:2)", f"DeepStack ({NAME}:1)", TAKEN),
    _file("two fusions by their settings", "SkipLinks.stride = 3\nDeepStack.start = 1\n", "SkipLinks", "DeepStack",
          TAKEN),
    _file("two fusions, one in an included file", "include 'skiplinks_7b.gin'\nDeepStack.start = 1\n",
          "skiplinks_7b.gin:", f"DeepStack ({NAME}:2)", TAKEN),
    _file("routing named as fusion", "Patch.fusion = @Routing()\n", f"{NAME}:1:", "expected @SkipLinks()"),
    _file("fusion named as routing", "Patch.routing = @SkipLinks()\n", f"{NAME}:1:", "expected @Routing()"),
    _file("one fusion named as two kinds", "Patch.fusion = @SkipLinks()\nPatch.pruning = @SkipLinks()\n", f"{NAME}:2:",
          "expected @FastV()"),
    _file("a measurement named as probe", "Patch.probe = @RProbe()\n", f"{NAME}:1:", "expected @AuxiliaryProbe()"),
    _file("two fusions in a tuple", "Patch.fusion = (@SkipLinks(), @DeepStack())\n", f"{NAME}:1:",
          "expected @SkipLinks()"),
    _file("a name without a call", "Patch.fusion = @SkipLinks\n", f"{NAME}:1:", "Patch.fusion = @SkipLinks:",
          "@SkipLinks()"),
    _file("a name in a scope", "Patch.fusion = @a/SkipLinks()\n", f"{NAME}:1:", "@a/SkipLinks()",
          "expected @SkipLinks()"),
    _file("gin's macro as a method", "Patch.fusion = @gin.macro()\n", f"{NAME}:1:", "@gin.macro()",
          "expected @SkipLinks()"),
    _file("gin's singleton as a method", "Patch.routing = @gin.singleton()\n", f"{NAME}:1:", "expected @Routing()"),
    _file("a text as a method", "Patch.routing = 'Routing'\n", f"{NAME}:1:", "Patch.routing = 'Routing'", "@Routing()"),
    _file("a name with @ as a setting", "Routing.split = @FastV()\n", f"{NAME}:1:", "only Patch takes",
          "write the value"),
    _file("a kind that is none", "Patch.vision = @SkipLinks()\n", f"{NAME}:1:", "Patch has no setting vision",
          "fusion"),
    _file("a bad setting of what is switched off", "Patch.routing = None\nRouting.split = -1\n", f"{NAME}:2:",
          "Routing.split"),
    # Values
    _setting("Drift.store_gb", "1e999", "a finite number"),
    _setting("Drift.store_gb", "-1e999", "a finite number"),
    _setting("Drift.store_gb", "0", "a number above 0"),
    _setting("Drift.store_gb", "True", "a number above 0"),
    _setting("RProbe.minutes", "1e999", "a finite number"),
    _setting("RProbe.clip", "1e400", "a finite number"),
    _setting("AuxiliaryProbe.weight", "1e999", "a finite number"),
    _setting("SkipLinks.tower_lr", "1e999", "a finite number"),
    _setting("Gradients.smoothness", "-1e999", "a finite number"),
    _setting("Flags.learning_rate", "1e999", "a finite number"),
    _setting("Routing.split", "True", "an integer >= 0"),
    _setting("Routing.split", "3.0", "an integer >= 0"),
    _setting("Routing.split", "None", "an integer >= 0"),
    _setting("Routing.split", "9223372036854775808", "below 2**63"),
    _setting("Routing.split", "9" * 400, "below 2**63", "999...999"),
    _setting("Routing.variant", f"'{'x' * 5000}'", "xxx...xxx", "one of lf"),
    _setting("Drift.base", r"'a\0b'", "without NUL"),
    _setting("Drift.base", r"'\ud800'", "lone surrogates"),
    _setting("Drift.base", "b'x'", "texts"),
    _setting("Drift.split", "1j", "numbers"),
    _setting("RProbe.text", "1", "True or False"),
    _setting("Report.samples", "{}", "an integer >= 1"),
    _file("seeds that are there twice", "Sweep.grid = {'Routing.split': (1,)}\nSweep.seeds = (1, 1)\n",
          f"{NAME}:2: Sweep.seeds = (1, 1)", "expected distinct integers"),
    _setting("Flags.name", "{}", "a string or a list"),
    _file("an integer of 5,000 digits", f"Routing.split = {'9' * 5000}\n", f"{NAME}:1:"),
]  # fmt: skip


def _flag_alone() -> None:
    with mock.patch.object(sys, "argv", ["train.py", "--gin_file"]):
        active.take_flags_from_command_line()
