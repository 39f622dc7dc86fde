"""R-Probe results that were measured before: a probe takes longer than a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError
from llava_patch.core.files import atomic
from llava_patch.core.paths import named
from llava_patch.measurements.base import NothingToMeasure
from llava_patch.measurements.rprobe import ablation
from llava_patch.measurements.rprobe.ablation import SUMMARY
from llava_patch.measurements.rprobe.output import RESULT
from llava_patch.measurements.rprobe.result import RProbeResult
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Figure, Found, Section, Table

MAPS = 3


def _run(context: Context, folder: Path) -> Found:
    source = Path(context.rprobe)
    if (source / SUMMARY).is_file():
        return _ablation(source, folder, context)
    result = RProbeResult.load(source / RESULT)
    _check(result.facts.get("checkpoint"), context, source / RESULT)
    figures, files = _copied(source, folder, "rprobe")
    rows = [
        ["MSE", f"{result.mse:.4f}", f"{result.constant_mse:.4f}"],
        ["FVU", f"{result.fvu:.3f}", f"{result.constant_fvu:.3f}"],
        ["PSNR (dB)", f"{result.psnr:.1f}", ""],
    ]
    return Found(result.summary(), figures, [Table(["held out", "the probe", "a constant patch"], rows)], files)


def _ablation(source: Path, folder: Path, context: Context) -> Found:
    try:
        values = json.loads((source / SUMMARY).read_text(encoding="utf-8"))
        found = [Table(head, rows) for head, rows in ablation.tables(values)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source / SUMMARY}: cannot be read as R-Probe's ablation ({error})") from error
    _check(values.get("checkpoint"), context, source / SUMMARY)
    figures: list[Figure] = []
    files: list[str] = []
    for part in sorted(p.parent for p in source.glob(f"*/{RESULT}")):
        more, names = _copied(part, folder, f"rprobe-{part.name}")
        figures, files = figures + more[:1], files + names
    said = ablation.notes(values) or ["R-Probe with the region seen or masked, and with its text or without."]
    return Found(" ".join(said), figures, found, files)


def _copied(source: Path, folder: Path, name: str) -> tuple[list[Figure], list[str]]:
    """Copy result and figures into the report's folder, which must not need the probe's."""
    figures, files = [], []
    alt = {"rprobe": "R-Probe: training curve, and regions as they are and as they were rebuilt."}
    pictures = [p for p in (source / "rprobe.png", *sorted(source.glob("map-*.png"))[:MAPS]) if p.is_file()]
    for path in (source / RESULT, *pictures):
        kept = f"{name}{path.suffix}" if path.stem == "rprobe" else f"{name}-{path.name}"
        with atomic(folder / kept) as part:
            shutil.copyfile(path, part)
        files.append(kept)
        if path.suffix == ".png":
            figures.append(Figure(kept, alt.get(path.stem, "R-Probe: error map of a held-out page.")))
    return figures, files


def _check(measured: Any, context: Context, path: Path) -> None:
    if isinstance(measured, str) and named(measured) != named(context.checkpoint):
        raise NothingToMeasure(f"{path} was measured on {measured}, another checkpoint")


def _inputs(context: Context) -> list[str]:
    return [str(Path(context.rprobe) / name) for name in (RESULT, SUMMARY)] if context.rprobe else []


def _why_not(context: Context) -> str | None:
    if not context.rprobe:
        return "no results given: measure with llava-patch rprobe CKPT, then give the folder as --rprobe"
    there = any(Path(path).is_file() for path in _inputs(context))
    return None if there else f"{context.rprobe} holds neither {RESULT} nor {SUMMARY}"


SECTION = Section(
    "rprobe",
    "R-Probe",
    "Did the model see it, or did it not say? A small decoder rebuilds the pixels under text regions from the "
    "projected tokens; what it cannot rebuild, the language model cannot read. Lower is better.",
    _run,
    command=lambda context: context.command("rprobe"),
    why_not=_why_not,
    inputs=_inputs,
    supplies=True,
)
