"""Commands of measurements, made from what `core.registry` names: one adapter for all of them.

An option is a field of the measurement's settings or a keyword-only parameter of its `measure`; its help is the line
about it in the docstring. What every command has (`cli.common`) means the same in each.
"""

import dataclasses
import gc
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional, Union, get_args, get_origin

import typer

from llava_patch.cli import common
from llava_patch.cli.common import check_results, show, with_facts
from llava_patch.core import registry
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.core.extras import need
from llava_patch.core.outputs import place
from llava_patch.data.examples import check_data
from llava_patch.data.target import Target
from llava_patch.measurements import asked as kept
from llava_patch.measurements import base as protocol
from llava_patch.measurements.base import Measurement, Result
from llava_patch.settings.active import settings_of

Words = dict[str, Any]
"""Values of a command's own options, by name."""
ABSENT: Words = {
    "data": "", "data_option": "", "samples": None, "names": "", "extra": None, "overwrite": False, "base": "",
    "device": "", "dtype": "", "question": "",
}  # fmt: skip
"""What commands are called with that have no such option."""
FURTHER = {"gradients": {"show": "llava_patch.cli.gradients:show", "table": "llava_patch.cli.gradients:table"}}
"""Subcommands of a measurement's group that measure nothing."""


def add(app: typer.Typer, name: str) -> None:
    """Add the command of a measurement of the registry, or its group where results can be compared."""
    measurement = registry.measurement(name)
    if not measurement.compare and name not in FURTHER:
        how: Any = {"no_args_is_help": not measurement.optional, "rich_help_panel": common.PANEL}
        app.command(measurement.command, **how)(run_command(measurement))
        return
    several = f"several checkpoints: llava-patch {measurement.command} compare A B ... --data DATA"
    kind = type("Group", (common.DefaultGroup,), {"second": several if measurement.compare else ""})
    word, (first, *more) = measurement.command, (inspect.getdoc(type(measurement)) or "").split("\n\n")
    short = f"llava-patch {word} CKPT [DATA] [OPTIONS] is short for {word} run.\nIts options: llava-patch {word} run"
    text = "\n\n".join([first, f"{short} --help", *more[:1]])
    group = typer.Typer(cls=kind, no_args_is_help=True, help=text)
    group.command("run", no_args_is_help=True)(run_command(measurement))
    if measurement.compare:
        group.command("compare", no_args_is_help=True)(compare_command(measurement))
    for further, entry in FURTHER.get(name, {}).items():
        group.command(further, no_args_is_help=True)(registry.load(entry))
    app.add_typer(group, name=measurement.command, rich_help_panel=common.PANEL)


def run_command(measurement: Measurement) -> Callable[..., None]:
    """The command that measures a checkpoint, or several side by side."""
    name = measurement.command
    takes_data = measurement.samples is not None
    checkpoint = common.OPTIONAL if measurement.optional else common.CHECKPOINT
    parameters: common.Parameters = {"checkpoint": (str, checkpoint)}
    if measurement.several:
        parameters = {"checkpoint": (list[str], common.CHECKPOINTS), "names": (str, common.NAMES)}
    if takes_data:
        if not measurement.several:
            parameters["data"] = (str, common.DATA)
        parameters["data_option"] = (str, common.DATA_OPTION)
    if measurement.compares:
        parameters["extra"] = (Optional[list[str]], typer.Argument(None, hidden=True))
    if measurement.count_field is not None:
        parameters["samples"] = (Optional[int], samples_of(measurement))
    parameters |= options_of(measurement)
    if takes_data:
        parameters |= common.MODEL | {"dtype": (str, common.dtype(measurement.gpu_dtype))}
    if measurement.compares:
        parameters["base"] = (str, common.BASE)
    parameters |= {"output": (Optional[Path], common.output_option(name)), **common.LAST}

    def command(asked: Any, fields: Words, others: Words) -> None:
        need(name, *measurement.extras)
        asked.data = common.one_data(asked.data, asked.data_option)
        measurement.check(asked.data, asked.samples, **others)
        given = [one for one in ([asked.checkpoint] if isinstance(asked.checkpoint, str) else asked.checkpoint) if one]
        for one in given:
            common.check_checkpoint(one)
        common.check_formats(asked.formats)
        if measurement.compares:
            _check_words(name, asked.data, asked.extra or [])
        checkpoints = given if measurement.several else [measurement.subject("".join(given), **others)]
        labels = protocol.names_of(checkpoints, asked.names)
        folder = common.folder_for(name, checkpoints[0], asked.output)
        with common.configured(asked.gin_file, asked.gin_param, goes_on=measurement.resumes):
            settings = settings_for(measurement, asked.samples, fields)
            targets = []
            for one, label in zip(checkpoints, labels, strict=True):
                below, compared = _models(measurement, settings, one, asked.base)
                how = {"device": asked.device, "dtype": asked.dtype, "question": asked.question}
                targets.append(Target(one, asked.data, below, compared, **how, name=label))
            if measurement.samples is not None:
                check_data(asked.data)
            _run(measurement, targets, settings, folder, asked, others)

    return _typed(_split(measurement, command), parameters, inspect.getdoc(type(measurement)) or "")


def _run(
    measurement: Measurement, targets: list[Target], settings: Any, folder: Path, asked: Any, others: Words
) -> None:
    """Measure, show what was found and write it; several checkpoints are in memory one after the other."""
    with common.results_in(folder):
        record = _check(measurement, targets, settings, folder, asked.overwrite, others)
        result: Any = None
        for target in targets:
            one = measurement.measure(target, settings, folder, **others)
            result = one if result is None else result.beside(one)
            if len(targets) > 1:
                target.release()
        for title, table in measurement.tables(result):
            show(table, title)
        typer.echo(result.summary())
        for path in with_facts(result, targets[0].checkpoint, record).save(folder, formats=asked.formats):
            typer.echo(f"wrote {path}")
        measurement.finished(folder)


def compare_command(measurement: Measurement) -> Callable[..., None]:
    """The command that puts results side by side, and measures checkpoints among them."""
    name = measurement.command
    file = f"{measurement.name}.json"
    models = typer.Argument(..., metavar="A B ...", help=f"checkpoints, {file} files of earlier runs, or their folders")
    parameters = {
        "models": (list[str], models),
        "data": (str, common.DATA_OPTION),
        "samples": (Optional[int], samples_of(measurement)),
        **options_of(measurement),
        "names": (str, common.NAMES),
        **common.MODEL,
        "output": (Optional[Path], common.output_option(f"{name}-compare", "their names")),
        **common.LAST,
    }

    def command(asked: Any, fields: Words, others: Words) -> None:
        need(f"{name} compare", *measurement.extras)  # before torch, which takes seconds
        models = asked.models
        common.check_formats(asked.formats)
        if len(models) < 2:
            raise SettingError(f"{name} compare: one model ({models[0]}), expected at least two")
        # All that can be wrong with the arguments, before minutes are spent on the first checkpoint.
        common.check_paths(models)
        called = protocol.names_of(models, asked.names, file)
        output = common.check_output(asked.output or place(f"{name}-compare", *called))
        with common.results_in(output):
            compared(asked, fields, others, called, output)

    def compared(asked: Any, fields: Words, others: Words, called: list[str], output: Path) -> None:
        models = asked.models
        kind = registry.load(measurement.result)
        files = [protocol.find_result(given, file) for given in models]
        found = {name: file and kind.load(file) for name, file in zip(called, files, strict=True)}
        with common.configured(asked.gin_file, asked.gin_param, goes_on=True):
            from llava_patch.core.weights import read_json

            settings = settings_for(measurement, asked.samples, fields)
            wanted = [(name, given) for name, given in zip(called, models, strict=True) if found[name] is None]
            how = {"device": asked.device, "dtype": asked.dtype, "question": asked.question}
            targets = [Target(given, asked.data, asked.base, **how, name=name) for name, given in wanted]
            for target in targets:
                given = target.checkpoint
                common.check_checkpoint(given)
                if read_json(given, "config.json") is None:
                    what = f"{given}: neither a checkpoint (no config.json) nor a {measurement.name} result"
                    raise CheckpointError(what)
            if targets:
                check_data(asked.data)
            records = [
                _check(measurement, [target], settings, output / target.name, asked.overwrite, others)
                for target in targets
            ]
            sources, record = kept.places(models), {"--names": called, **(records or [{}])[0]}
            if not asked.overwrite:
                check_results(output / "compare.json", sources, record, kept.defaults_of(measurement))
            about = {"sources": sources, kept.ASKED: record}
            if patch := common.configured_patch():
                about[common.CONFIGURED] = patch
            for target, record in zip(targets, records, strict=True):
                typer.echo(f"measuring {target.name}", err=True)
                found[target.name] = _kept(measurement, target, settings, output / target.name, record, others)
        result = dataclasses.replace(registry.load(measurement.compare)(found), asked=about)
        paths = result.save(output, formats=asked.formats)
        show((result.head, result.rows), result.title, result.notes)
        for path in paths:
            typer.echo(f"wrote {path}")

    text = (
        "Compare models: one figure, one table.\n\nCheckpoints are measured one after the other, each into a folder of "
        "OUTPUT that has its name; the same command again takes up what is there. OUTPUT gets compare.json and "
        "compare.png."
    )
    return _typed(_split(measurement, command), parameters, text)


def _kept(
    measurement: Measurement, target: Target, settings: Any, folder: Path, record: Words, others: Words
) -> Result:
    """A checkpoint's result: of an earlier run where that was the same measurement, else measured and written now."""
    from llava_patch.core.locks import folder_lock

    with folder_lock(folder):
        before = measurement.kept(target, settings, folder)
        if before is not None:
            typer.echo(f"{folder / (measurement.name + '.json')}: measured before", err=True)
            return before
        result = with_facts(measurement.measure(target, settings, folder, **others), target.checkpoint, record)
        result.save(folder)
        measurement.finished(folder)
    target.release()
    gc.collect()  # one model at a time in memory: patched ones hold themselves through their handle
    return result


def settings_for(measurement: Measurement, samples: int | None, given: dict[str, Any]) -> Any:
    """A measurement's settings: gin's with the command line's (`given`, where not None) on top.

    The number of samples is filled in: `samples` (0: all), or for None the setting's, else the command's own number.
    """
    if measurement.settings is None:
        return None
    settings = settings_of(measurement.settings, **given)
    field = measurement.count_field
    if field is None or measurement.samples is None:
        return settings
    count = samples or None if samples is not None else getattr(settings, field) or measurement.samples
    return dataclasses.replace(settings, **{field: count})


def _fields(measurement: Measurement) -> list[dataclasses.Field[Any]]:
    """Those of the settings that are not hidden."""
    found = () if measurement.settings is None else dataclasses.fields(measurement.settings)
    return [field for field in found if field.name not in measurement.hidden]


def samples_of(measurement: Measurement) -> Any:
    """The option --samples."""
    field = f"{measurement.settings.__name__}.{measurement.count_field}"
    text = f"{common.SAMPLES} {field}, or {measurement.samples}"
    return typer.Option(None, min=0, help=text, show_default=False)


def options_of(measurement: Measurement) -> common.Parameters:
    """(type, option) of each setting that is one, and of each keyword-only parameter of `measure`, by name."""
    found: common.Parameters = {}
    lines = described(getattr(measurement.settings, "__doc__", ""), "Attributes")
    for field in _fields(measurement):
        if field.name not in (*protocol.COUNTS, "base"):
            default = f'"{field.default}"' if isinstance(field.default, str) else field.default
            text = _help(lines, measurement.settings, field.name)
            text += f"; default: {measurement.settings.__name__}.{field.name}, {default}"
            hint = protocol.hint_of(measurement.settings, field)
            found[field.name] = _option(measurement, field.name, hint, None, text)
    lines = described(measurement.measure.__doc__, "Args")
    for name, one in inspect.signature(measurement.measure).parameters.items():
        if one.kind is one.KEYWORD_ONLY:
            found[name] = _option(
                measurement, name, one.annotation, one.default, _help(lines, measurement.measure, name)
            )
    return found


def _help(lines: Mapping[str, str], owner: Any, name: str) -> str:
    if name not in lines and sys.flags.optimize == 2:  # without docstrings there is no help
        return ""
    if name not in lines:
        raise TypeError(f"{owner.__qualname__}: its docstring has no line about {name}, which is the option's help")
    return lines[name]


def _option(measurement: Measurement, name: str, hint: Any, default: Any, text: str) -> tuple[Any, Any]:
    words = [measurement.words[name]] if name in measurement.words else []
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is tuple:  # its numbers come as one word, "30,31"
        hint = str
    if hint is bool and not words:
        words = [f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}"]
    shown = default not in (None, "", [], False)
    return Optional[hint] if default is None else hint, typer.Option(default, *words, help=text, show_default=shown)


def _numbers(name: str, value: Any, hint: Any) -> Any:
    if not isinstance(value, str) or not any(get_origin(one) is tuple for one in (hint, *get_args(hint))):
        return value
    try:
        return tuple(int(part) for part in value.split(",")) if value else None
    except ValueError:
        raise SettingError(f"--{name.replace('_', '-')} {value}: expected layer numbers, as 30,31") from None


def _models(measurement: Measurement, settings: Any, checkpoint: str, base: str) -> tuple[str, str]:
    """(the model below the checkpoint, the one that it is compared with); "": none.

    Under a LoRA or projector-only checkpoint --base is both, unless the setting `base` names another one to compare
    with.
    """
    if not measurement.compares:
        return base, ""
    from llava_patch.data.loaded import base_of, is_part

    part = bool(base) and is_part(checkpoint)
    other = (settings.base or base) if part else (base or settings.base)
    if other:
        common.check_checkpoint(other, "--base")
    return base if part else "", base_of(checkpoint, other, "--base")


def _check(
    measurement: Measurement, targets: list[Target], settings: Any, folder: Path, overwrite: bool, others: Words
) -> Words:
    """Refuse to replace results of another kind, before minutes are spent on loading a model; what is asked for."""
    record = kept.asked_of(measurement, targets[0], settings, others)
    bases = [target.base for target in targets] if measurement.compares else []
    path = folder / f"{measurement.stem(**others)}.json"
    try:
        checkpoints = [*(target.checkpoint for target in targets), *bases]
        check_results(path, checkpoints, record, kept.defaults_of(measurement))
    except CheckpointError:
        if not overwrite or path.is_dir():
            raise
        measurement.make_way(folder)
    return record


def _check_words(name: str, data: str, extra: list[str]) -> None:
    """Refuse a base in the place of DATA, where it stood in earlier versions."""
    path = Path(data.partition("?")[0])
    lost = bool(data) and ":" not in data and not path.exists()
    if extra or lost or (path / "config.json").is_file():
        given = " ".join(word or "''" for word in (data, *extra))
        raise SettingError(
            f"{name} CKPT {given}: no data there; it takes CKPT [DATA], and the model to compare with is given as "
            "--base BASE"
        )


def _split(measurement: Measurement, command: Callable[[Any, Words, Words], None]) -> Callable[..., None]:
    """A command that is called with what every one has (`ABSENT` where this has not), settings, and `measure`'s own."""
    own = options_of(measurement)
    hints = {f.name: protocol.hint_of(measurement.settings, f) for f in _fields(measurement) if f.name in own}

    def called(**given: Any) -> None:
        words = {name: given.pop(name) for name in own}
        fields = {name: _numbers(name, words.pop(name), hint) for name, hint in hints.items()}
        command(types.SimpleNamespace(**{**ABSENT, **given}), fields, words)

    return called


def _typed(command: Callable[..., None], parameters: common.Parameters, text: str) -> Callable[..., None]:
    """A command as typer reads it: its parameters with their types and options."""

    def called(**given: Any) -> None:
        command(**given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, default=one, annotation=hint) for name, (hint, one) in parameters.items()]
    )
    called.__annotations__ = {name: hint for name, (hint, _) in parameters.items()}
    called.__doc__ = text
    return called


def described(text: str | None, section: str) -> dict[str, str]:
    """What a docstring's section ("Attributes" or "Args") says of each name, without the full stop."""
    lines = inspect.cleandoc(text or "").partition(f"\n{section}:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.split(r"\n(?=\S)", lines)[0], re.M)
    return {name: " ".join(line.split()).removesuffix(".") for name, line in found}
