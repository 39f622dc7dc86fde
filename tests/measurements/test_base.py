"""The measurement protocol: the codec of results, and what follows from naming a measurement once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llava_patch.cli import measure
from llava_patch.cli.main import app
from llava_patch.core import registry
from llava_patch.core.errors import InputError, SettingError
from llava_patch.measurements.base import NOT_WRITTEN, Measurement, Result
from llava_patch.settings import gin_config


@dataclass(frozen=True)
class Inner:
    low: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome(Result):
    NAME = "outcome"
    TITLE = "toy"
    VERSION = 2
    FIGURE = "tests.measurements.test_base:draw"

    parts: list[Inner]
    by_layer: dict[int, float]
    best: Inner | None
    pair: tuple[int, str]
    picture: Any = field(default=None, metadata=NOT_WRITTEN, compare=False)

    def derived(self) -> dict[str, Any]:
        return {"lowest": min(one.low for one in self.parts)}


def draw(result: Outcome, path: Path) -> Path:
    path.write_text("drawn")
    return path


@dataclass(frozen=True)
class Toy:
    """Settings of a toy.

    Attributes:
        depth: how deep it looks.
        layers: numbers.
    """

    depth: int = 1
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ToyResult(Result):
    NAME = TITLE = "toy"
    FIGURE = "tests.measurements.test_base:draw"

    settings: Toy
    size: float

    def summary(self) -> str:
        return f"Depth {self.settings.depth}, layers {self.settings.layers}, size {self.size}."

    def table(self) -> Any:
        return ["size"], [[str(self.size)]]


class ToyMeasurement(Measurement):
    """How large is it?"""

    name = "toy"
    title, about = "Toy", "A measurement of one file, named once in the registry."
    settings, result, extras = Toy, "tests.measurements.test_base:ToyResult", ()

    def measure(self, target: Any, settings: Toy, folder: Path | None = None, *, size: float = 2.0) -> ToyResult:
        """Measure.

        Args:
            target: the checkpoint.
            settings: of the toy.
            folder: not needed.
            size: what it is.
        """
        return ToyResult(settings, size)


MADE = Outcome([Inner(1.5, ("a",)), Inner(2.0)], {3: 0.5, 4: 0.25}, None, (1, "x"), picture="kept in memory")


def test_every_field_comes_back_from_a_file(tmp_path: Path) -> None:
    paths = MADE.save(tmp_path, formats=("png", "pdf"))
    assert [path.name for path in paths] == ["outcome.json", "outcome.png", "outcome.pdf"]
    values = json.loads(paths[0].read_text())
    assert values["format"] == "llava_patch toy result" and values["version"] == 2 and values["lowest"] == 1.5
    assert "picture" not in values and "facts" not in values
    read = Outcome.load(paths[0])
    assert read == MADE and type(read.parts[0]) is Inner and read.by_layer == {3: 0.5, 4: 0.25}
    nothing = Outcome([Inner(math.nan)], {}, Inner(1.0), (1, "x"), facts={"checkpoint": "here"})
    again = Outcome.load(nothing.save(tmp_path)[0])
    assert math.isnan(again.parts[0].low) and again.best == Inner(1.0) and again.facts == {"checkpoint": "here"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": ...}, "missing: 'parts'"),
        ({"parts": [{"names": []}]}, "missing: 'low'"),
        ({"more": 1}, "unknown: more"),
        ({"best": {"low": 1, "high": 2}}, "Inner has no high"),
        ({"parts": [{"low": "1"}]}, "expected a number, got '1'"),
        ({"pair": [1]}, "ValueError"),
        ({"version": 3}, "version 3, this version of llava_patch reads 2"),
        ({"format": "llava_patch drift result"}, "not a toy result"),
    ],
)
def test_a_file_that_is_no_whole_result_is_refused_by_its_name(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    values = {k: v for k, v in {**MADE.to_dict(), **change}.items() if v is not ...}
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        Outcome.load(tmp_path / "a.json")
    assert said in str(caught.value) and str(tmp_path / "a.json") in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "none.json"):
        with pytest.raises(InputError, match=name):
            Outcome.load(tmp_path / name)


def test_a_measurement_named_once_has_command_section_and_bindings() -> None:
    from llava_patch.integrations.lmms_eval import runner
    from llava_patch.tools.doctor.configured import readers
    from llava_patch.tools.report.sections import sections

    made = {section.name for section in sections()}
    groups = {group.name for group in app.registered_groups}
    commands = {command.name for command in app.registered_commands} | groups
    for name in registry.MEASUREMENTS:
        measurement = registry.measurement(name)
        assert measurement.name == name and measurement.command in commands
        if measurement.settings is not None:
            assert gin_config.MEASUREMENTS[measurement.settings.__name__] is measurement.settings
            assert measurement.command in readers()[measurement.settings.__name__]
        assert name in made and len(measurement.about) > 40 and measurement.title
        if measurement.metrics:
            assert {"Task", "process_results", *measurement.metrics} == set(runner.names(name))
        kind = registry.load(measurement.result)
        assert issubclass(kind, Result) and name == kind.NAME and callable(registry.load(kind.FIGURE))


def test_a_file_and_a_line_make_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.MEASUREMENTS, "toy", "tests.measurements.test_base:ToyMeasurement")
    root = typer.Typer()
    root.callback()(lambda: None)
    measure.add(root, "toy")
    (tmp_path / "model").mkdir()
    words = ["toy", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--layers", "1,3", "--size", "4"]
    done = CliRunner().invoke(root, words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Depth 1, layers (1, 3), size 4.0." in done.output and (tmp_path / "out" / "toy.png").is_file()
    read = ToyResult.load(tmp_path / "out" / "toy.json")
    assert read.settings == Toy(1, (1, 3)) and read.facts["checkpoint"] == str(tmp_path / "model")
    said = CliRunner().invoke(root, ["toy", "--help"], env={"COLUMNS": "200"}).output
    assert "How large is it?" in said and "how deep it looks" in said and "what it is" in said


def test_a_setting_that_its_docstring_leaves_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "__doc__", "Settings.")
    with pytest.raises(TypeError, match=r"^Toy: its docstring has no line about depth, which is the option's help$"):
        measure.options_of(ToyMeasurement())


def test_files_of_measurements_load_no_torch() -> None:
    code = (
        "from llava_patch.core import registry; import sys\n"
        "for name in registry.MEASUREMENTS: registry.measurement(name)\n"
        "print([n for n in ('torch', 'transformers', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_are_options_of_the_command() -> None:
    said = CliRunner().invoke(app, ["saturation", "run", "--help"], env={"COLUMNS": "200"}).output
    for word in ("--mass-tolerance", "--samples", "--base", "--format", "--output", "--gin-param"):
        assert word in said
    assert "attention mass has settled when it stays within this share" in said
    done = CliRunner().invoke(app, ["saturation", "run", ".", "--format", "gif"])
    assert isinstance(done.exception, SettingError) and "--format gif: expected png or pdf" in str(done.exception)
