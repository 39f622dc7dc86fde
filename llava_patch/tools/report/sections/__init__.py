"""The sections of a report: one for each measurement of the registry, and a file for each of the others."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core import registry
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, found_of

if TYPE_CHECKING:
    from llava_patch.measurements.base import Measurement

FILES = ("training_gradients", "training", "rprobe")
"""Modules of this folder, each with a `SECTION`."""


def sections() -> list[Section]:
    """All of them, in the report's order."""
    measured = [_section_of(registry.measurement(name)) for name in registry.MEASUREMENTS if name not in FILES]
    return measured + [importlib.import_module(f"{__name__}.{name}").SECTION for name in FILES]


def _section_of(measurement: "Measurement") -> Section:
    """The section of a measurement; results of the command and of the section are written alike."""

    def run(context: Context, folder: Path) -> Found:
        result = measurement.in_report(context, measurement.report_settings(context))
        return found_of(result, folder, measurement.name, measurement.alt, measurement.report_tables(result))

    def recorded(context: Context) -> dict[str, Any]:
        return measurement.recorded(context, measurement.report_settings(context))

    def command(context: Context) -> str:
        words = measurement.report_words(context, measurement.report_settings(context))
        takes_data = measurement.samples is not None and not measurement.several
        return context.command(measurement.command, *words, base=measurement.compares, data=takes_data)

    return Section(measurement.name, measurement.title, measurement.about, run, recorded, command, measurement.why_not)
