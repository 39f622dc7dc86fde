"""`llava-patch saturation`: one checkpoint (`run`, which need not be named) or several (`compare`)."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llava_patch.cli import common
from llava_patch.cli import output as written
from llava_patch.cli.common import (
    BASE,
    CHECKPOINT,
    DATA,
    DEVICE,
    DTYPE,
    GIN_FILE,
    GIN_PARAM,
    QUESTION,
    check_checkpoint,
    configured,
    folder_for,
    samples_option,
)
from llava_patch.cli.rprobe import DefaultGroup
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.data.examples import check_data
from llava_patch.data.model_inputs import examples_for, with_count
from llava_patch.settings.active import settings_of

if TYPE_CHECKING:
    from llava_patch.data.examples import Example
    from llava_patch.data.inputs import Inputs
    from llava_patch.measurements.saturation import Saturation, SaturationResult

DEFAULT_SAMPLES = 32
SAMPLES = samples_option(DEFAULT_SAMPLES, "Saturation.max_samples")


TITLE = "Recommended split, window, image and text transition; attention mass"


class _Group(DefaultGroup):
    second = "several checkpoints: llava-patch saturation compare A B ... --data DATA"


HELP = """Visual saturation: from which layer on the image is no longer needed.

llava-patch saturation CKPT [DATA] [OPTIONS] is short for saturation run: it
measures cosine, attention mass and logit lens layer by layer, and recommends
a split. Its options: llava-patch saturation run --help
"""
app = typer.Typer(cls=_Group, no_args_is_help=True, help=HELP)


def add(root: typer.Typer) -> None:
    """Add the group to the console command."""
    root.add_typer(app, name="saturation")


@app.command("run", no_args_is_help=True)
@needs("saturation", "figures")
def run_command(
    checkpoint: str = CHECKPOINT,
    data: str = DATA,
    samples: int | None = SAMPLES,
    output: Path | None = typer.Option(  # noqa: B008
        None, help="folder for results; default: saturation/ and CKPT's name", show_default=False
    ),
    question: str = QUESTION,
    base: str = BASE,
    device: str = DEVICE,
    dtype: str = DTYPE,
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
) -> None:
    """Measure one checkpoint, stock or patched, and recommend a split.

    Every setting of Saturation can be bound with --gin-param; options win over
    bindings. OUTPUT gets saturation.json and saturation.png. Interrupted, the
    same command goes on, and its result is the same to the last bit.
    """
    from llava_patch.measurements.saturation.compare import RESULT

    check_checkpoint(checkpoint)
    folder = folder_for("saturation", checkpoint, output)
    with configured(gin_file, gin_param, goes_on=True):
        settings = _settings(samples)
        written.check_results(folder / RESULT, [checkpoint])
        check_data(data)
        result = _measure(checkpoint, data, folder, settings, question, base, device, dtype)
    typer.echo(result.summary())
    for name in (RESULT, "saturation.png"):
        typer.echo(f"wrote {folder / name}")


@app.command("compare", no_args_is_help=True)
@needs("saturation compare", "figures")
def compare_command(
    models: list[str] = typer.Argument(  # noqa: B008
        ..., metavar="A B ...", help="checkpoints, saturation.json files of earlier runs, or folders with one"
    ),
    data: str = typer.Option("", help="what checkpoints are measured on, as DATA of saturation run"),
    samples: int | None = SAMPLES,
    names: str = typer.Option("", help="what to call them, such as stock,patched; default: by their paths"),
    output: Path = typer.Option(Path("saturation_compare"), help="folder for table, figure and results"),  # noqa: B008
    question: str = QUESTION,
    base: str = BASE,
    device: str = DEVICE,
    dtype: str = DTYPE,
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
) -> None:
    """Compare models: one figure with all curves, one table.

    Checkpoints are measured one after the other, each into a folder of OUTPUT
    that has its name; the same command again takes up what is there. OUTPUT
    gets compare.json and compare.png.
    """
    from llava_patch.cli.rprobe.compare import split_names
    from llava_patch.core.errors import CheckpointError
    from llava_patch.core.weights import read_json
    from llava_patch.measurements.saturation import compare
    from llava_patch.measurements.saturation.result import read_result

    if len(models) < 2:
        raise SettingError(f"saturation compare: one model ({models[0]}), expected at least two")
    # All that can be wrong with the arguments, before minutes are spent on the first checkpoint.
    called = compare.names_of(models, split_names(names))
    files = [compare.find_result(given) for given in models]
    read = [None if file is None else read_result(file) for file in files]
    found: dict[str, SaturationResult] = {}
    with configured(gin_file, gin_param, goes_on=True):
        settings = _settings(samples)
        check_data(data)
        for name, given, result in zip(called, models, read, strict=True):
            if result is None:
                check_checkpoint(given)
                if read_json(given, "config.json") is None:
                    raise CheckpointError(f"{given}: neither a checkpoint (no config.json) nor a saturation result")
                written.check_results(output / name / compare.RESULT, [given])
        for name, given, result in zip(called, models, read, strict=True):
            if result is None:
                typer.echo(f"measuring {name}", err=True)
                result = _measure(given, data, output / name, settings, question, base, device, dtype, reuse=True)
            found[name] = result
    paths = compare.write(found, output)
    written.show(compare.table(found), TITLE, compare.notes(found))
    for path in paths:
        typer.echo(f"wrote {path}")


def _settings(samples: int | None) -> "Saturation":
    from llava_patch.measurements.saturation import Saturation

    settings: Saturation = with_count(settings_of(Saturation), samples, DEFAULT_SAMPLES)
    return settings


def _measure(
    checkpoint: str,
    data: str,
    folder: Path,
    settings: "Saturation",
    question: str,
    base: str,
    device: str,
    dtype: str,
    reuse: bool = False,
) -> "SaturationResult":
    """Measure a checkpoint into a folder; with `reuse` a finished result of the same measurement is taken as it is."""
    from llava_patch.core.folder_lock import folder_lock
    from llava_patch.data.readers.read import resolve_source
    from llava_patch.hosts.anatomy import find
    from llava_patch.measurements.saturation import measure_saturation
    from llava_patch.measurements.saturation.compare import RESULT
    from llava_patch.measurements.saturation.state import STATE_FILE, State, make_key

    with folder_lock(folder):
        subject = common.load(checkpoint, base, device, dtype)
        examples = examples_for(subject, data, settings.max_samples, question)
        key = make_key(find(subject.model), examples, settings)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        kept = _finished(folder / RESULT, digest) if reuse else None
        if kept is not None:
            typer.echo(f"{folder / RESULT}: measured before", err=True)
            return kept
        state = State(folder / STATE_FILE, key)
        result = measure_saturation(subject.model, _Samples(subject.inputs(), examples), settings, state=state)
        facts = {
            **written.facts_of(checkpoint),
            "base": base,
            "data": resolve_source(data) or "rendered pages",
            "question": question,
            "examples": len(examples),
            "dtype": key["dtype"],
            "device": key["device"],
            "key": digest,
        }
        result = dataclasses.replace(result, facts=facts)
        result.save(folder)
        state.remove()
    del subject
    gc.collect()  # one model at a time in memory: patched ones hold themselves through their handle
    return result


def _finished(path: Path, digest: str) -> "SaturationResult | None":
    """The result of the very same measurement; None when there is none, or one that is to be replaced."""
    from llava_patch.core.errors import InputError
    from llava_patch.measurements.saturation.result import read_result

    if not path.is_file():
        return None
    try:
        found = read_result(path)
    except InputError:  # of an earlier version, or damaged
        return None
    return found if found.facts.get("key") == digest else None


class _Samples(Sequence):
    """Inputs of examples, made when they are asked for; a slice of them makes nothing."""

    def __init__(self, inputs: "Inputs", examples: "Sequence[Example]") -> None:
        self.inputs, self.examples = inputs, examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Samples(self.inputs, self.examples[index])
        example = self.examples[index]
        return self.inputs.forward_inputs(example.open_image(), example.question)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
