"""Runs the sections one after the other and keeps what each found, so that a report can go on and be rebuilt.

The page is one HTML file that refers to nothing outside itself.
"""

import base64
import datetime
import html
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError, LlavaPatchError, SettingError, StorageError, brief, shown
from llava_patch.core.extras import optional
from llava_patch.core.files import digest, plain, write_json, write_text
from llava_patch.core.paths import named
from llava_patch.core.stored import read_object
from llava_patch.core.terminal import counted, say_cost
from llava_patch.core.version import __version__
from llava_patch.core.weights import folder_of
from llava_patch.data.readers.read import resolve_source
from llava_patch.measurements import asked
from llava_patch.measurements.base import DAMAGED, NothingToMeasure, decode, encode
from llava_patch.settings import active
from llava_patch.tools.inspect.result import facts_of
from llava_patch.tools.report.sections import DONE, FAILED, SKIPPED, Context, Record, Section, sections

KEPT, PAGE, TEMPLATE = "report.json", "report.html", "report.html.j2"
FORMAT = 1
SHOWN = 0.65
"""Pixels of the page for one of a figure: 200 dots an inch are finer than a screen."""
BROAD = 1.8
"""Width over height from which a figure scrolls on a phone instead of becoming too small to read."""
_ADVICE = ": delete it to make the report again, or give another --output"
_PAGE: dict[str, Any] = {
    "checkpoint": str, "data": str, "base": str, "date": str, "facts": list[list[str]], "settings": dict[str, Any],
    "versions": dict[str, str], "command": str, "sections": list[Any],
}  # fmt: skip
"""What `report.json` holds, for the page."""
BASE = "--base"
_MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "llava_patch.json", "preprocessor_config.json")


def choose(sections: Sequence[Section], only: Sequence[str], skip: Sequence[str]) -> list[Section]:
    """The sections that are asked for."""
    known = [section.name for section in sections]
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in known:
                raise SettingError(f"{option} {name}: expected one of {', '.join(known)}")
    chosen = [s for s in sections if (not only or s.name in only) and s.name not in skip]
    if not chosen:
        raise SettingError("--only and --skip leave no section")
    return chosen


def read(folder: Path) -> dict[str, Any] | None:
    """What an earlier run left; None when there is nothing."""
    path = folder / KEPT
    if not path.exists():
        return None
    values = read_object(path, advice=_ADVICE)
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"format {shown(values['format'])}, this version reads {FORMAT}")
        for name, kind in _PAGE.items():
            values[name] = decode(kind, values[name])
        values["sections"] = [decode(Record, record) for record in values["sections"]]
        for record in values["sections"]:
            files = [] if record.found is None else [*record.found.files, *(f.file for f in record.found.figures)]
            outside = [name for name in files if Path(name).name != name]
            if outside or record.state not in (DONE, SKIPPED, FAILED) or (record.state == DONE) != bool(record.found):
                raise ValueError(f"section {shown(record.name)}: {shown((outside or [record.state])[0])}")
    except DAMAGED as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}){_ADVICE}") from error
    return values


def build(
    context: Context,
    sections: Sequence[Section],
    chosen: Sequence[Section],
    folder: Path,
    fresh: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the chosen sections, keep each as soon as it is finished, and return all that is kept, as `read` does."""
    before = _before(context, folder, overwrite)
    if before is not None and not overwrite:
        _check_sections(before, context, chosen, folder / KEPT)
    records = {} if before is None else {record.name: record for record in before["sections"]}
    values: dict[str, Any] = {}
    samples = context.settings.samples
    about = f"up to {samples} samples each" if samples else "all samples of DATA each"
    say_cost("report", counted(len(chosen), "section"), about, "each says its own cost before it starts")
    for number, section in enumerate(chosen, 1):
        kept, wanted = records.get(section.name), _key(section, context)
        holds = False  # skipped and failed sections have found nothing
        if not fresh and kept is not None and kept.found is not None and kept.key == wanted:
            names = [*kept.found.files, *(figure.file for figure in kept.found.figures)]
            holds = all((folder / name).is_file() for name in names)
        say(f"{number} of {len(chosen)}: {section.title}{': kept' if holds else ''}")
        if not holds:
            records[section.name] = record = _make(section, context, folder, wanted)
            if record.state != DONE:
                say(f"  {record.state}: {record.reason}")
        values = _values(context, [records[s.name] for s in sections if s.name in records])
        write_json(folder / KEPT, {**values, "sections": encode(values["sections"])})
    return values


def _before(context: Context, folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """What an earlier run left of the same report; one of another is refused, or nothing of it stays."""
    try:
        before = read(folder)
        if before is not None:
            _check_report(before, context, folder / KEPT)
    except CheckpointError:
        if not overwrite:
            raise
        return None
    return before


def _check_report(before: dict[str, Any], context: Context, path: Path) -> None:
    """Refuse to replace a report of another checkpoint or of other data."""
    if named(before["checkpoint"]) != named(context.checkpoint):
        raise CheckpointError(
            f"{path} is the report of {before['checkpoint']}, not of {named(context.checkpoint)}: {asked.ADVICE}"
        )
    there, here = before.get(asked.ASKED), _asked(context)
    if isinstance(there, dict) and not there.get(BASE):  # one that is named later makes the sections that need it
        there, here = ({name: value for name, value in one.items() if name != BASE} for one in (there, here))
    asked.check_asked({asked.ASKED: there}, str(path), here)


def _check_sections(before: dict[str, Any], context: Context, chosen: Sequence[Section], path: Path) -> None:
    """Refuse to replace finished sections of other settings."""
    finished = {record.name: record for record in before["sections"] if record.state == DONE}
    for section in chosen:
        if section.name in finished:
            was, now = finished[section.name].settings, plain(section.settings(context))
            where = f"{path}, section {section.name},"
            asked.check_asked({asked.ASKED: was}, where, now, {name: now[name] for name in now if name not in was})


def _asked(context: Context) -> dict[str, Any]:
    """What all sections depend on, beside the checkpoint."""
    return {
        "data": resolve_source(context.data) or asked.PAGES,
        "--question": context.question,
        "--dtype": context.dtype,
        BASE: named(context.base) if context.base else "",
        "patches of gin": _configured(),
    }


def _make(section: Section, context: Context, folder: Path, wanted: str) -> Record:
    record = Record(
        section.name, section.title, section.about, DONE, settings=section.settings(context), key=wanted,
        command=section.command(context),
    )  # fmt: skip
    began = time.monotonic()
    try:
        why_not = section.why_not(context)
        if why_not is not None:
            raise NothingToMeasure(why_not)
        found = section.run(context, folder)
    except NothingToMeasure as skipped:
        return replace(record, state=SKIPPED, reason=str(skipped), command=record.command if section.supplies else "")
    except StorageError:  # nothing else could be kept either
        raise
    except Exception as error:  # one section's failure must not take the others with it; the command ends with 1
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return replace(record, state=FAILED, reason=message, trace=traceback.format_exc())
    return replace(record, found=found, seconds=round(time.monotonic() - began, 1))


def _values(context: Context, records: list[Record]) -> dict[str, Any]:
    import torch

    from llava_patch.tools.doctor.software import installed

    patches = _configured()
    packages = ("torch", "transformers", "llava-torch", "peft", "numpy")
    return {
        "format": FORMAT,
        "checkpoint": named(context.checkpoint),
        "data": context.data or asked.PAGES,
        asked.ASKED: _asked(context),
        "base": named(context.base) if context.base else "",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "facts": [
            *(list(fact) for fact in facts_of(context.inspection)),
            *([["put on it by gin", "; ".join(patches)]] if patches else []),
        ],
        "settings": {kind: values for kind, values in context.inspection.settings.items() if values},
        "versions": {
            "llava_patch": __version__,
            "python": sys.version.split()[0],
            **{name: number for name in packages if (number := installed(name))},
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        },
        "command": context.command(
            "report",
            *(["--rprobe", context.rprobe] if context.rprobe else []),
            *(["--run", context.run] if context.run and context.run != context.folder else []),
            base=True,
        ),
        "sections": records,
    }


def _key(section: Section, context: Context) -> str:
    """Hexadecimal digest; it changes when checkpoint, base, data, settings, inputs or version change."""
    values = {
        "section": section.name,
        "version": __version__,
        "checkpoint": [named(context.checkpoint), _model(context.folder)],
        "base": [named(context.base), _model(folder_of(context.base))] if context.base else None,
        "data": [context.data, _stamp(Path(context.data.split("?")[0]))] if context.data else None,
        "question": context.question,
        "configured": _configured(),
        "precision": [context.device, context.dtype],
        "settings": section.settings(context),
        "inputs": [[path, _stamp(Path(path))] for path in section.inputs(context)],
    }
    return digest(values)


def _configured() -> list[str]:
    methods = active.configuration()
    return [] if methods is None else [f"{kind}: {value}" for kind, value in methods.lasting().items()]


def _model(folder: str) -> list[Any]:
    """Size and time of change of a model's files: weights of 13 GB are not read to see that they are the same."""
    files = sorted({file for pattern in _MODEL_FILES for file in Path(folder).glob(pattern)})
    return [[file.name, *_stamp(file)] for file in files]


def _stamp(path: Path) -> list[int]:
    try:
        about = path.stat()
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns]


def _terms(values: dict[str, Any]) -> dict[str, str]:
    """What is to be explained of the sections that a page shows, by name."""
    shown = {record.name for record in values["sections"] if record.state == DONE}
    return {name: text for one in sections() if one.name in shown for name, text in one.terms.items()}


def write_page(values: dict[str, Any], folder: Path) -> Path:
    """Render what `build` kept; returns the page's path."""
    from PIL import Image

    def picture(file: str) -> dict[str, Any]:
        """What an img element needs."""
        try:
            with Image.open(folder / file) as image:
                width, height = image.size
        except (OSError, ValueError, SyntaxError) as error:
            raise CheckpointError(
                f"{folder / file}: cannot be read as the report's picture ({brief(error)}): make the report again, "
                "with --fresh"
            ) from error
        data = "data:image/png;base64," + base64.b64encode((folder / file).read_bytes()).decode("ascii")
        shown = {"width": round(SHOWN * width), "height": round(SHOWN * height)}
        return {"data": data, **shown, "broad": width > BROAD * height}

    explained = _terms(values)
    jinja2 = optional("jinja2")

    def linked(text: str) -> str:
        """Escaped text with the first mention of each term made a link to its explanation."""
        shown = html.escape(text)
        for number, term in enumerate(explained, 1):
            found = re.compile(rf"\b{re.escape(html.escape(term))}\b(?![^<]*</a>)", re.IGNORECASE)
            shown = found.sub(rf'<a href="#term-{number}">\g<0></a>', shown, count=1)
        return shown

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["linked"] = linked
    source = (resources.files("llava_patch.tools.report") / TEMPLATE).read_text(encoding="utf-8")
    name, pretty = Path(values["checkpoint"]).name, lambda value: json.dumps(value, indent=1, default=str)
    try:
        text = environment.from_string(source).render(
            **values, name=name, picture=picture, pretty=pretty, terms=explained
        )
    except (*DAMAGED, jinja2.TemplateError) as error:
        if isinstance(error, LlavaPatchError):
            raise
        raise CheckpointError(f"{folder / KEPT}: cannot be shown ({error!r}){_ADVICE}") from error
    return write_text(folder / PAGE, text)
