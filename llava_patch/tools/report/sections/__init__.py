"""The sections of a report: one for each measurement of the registry, and those of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core import registry
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, found_of
from llava_patch.tools.report.sections import rprobe, training

if TYPE_CHECKING:
    from llava_patch.measurements.base import Measurement


def sections() -> list[Section]:
    """All of them, in the report's order."""
    measured = [_section_of(registry.measurement(name)) for name in registry.MEASUREMENTS]
    return [*measured, training.GRADIENTS, training.SECTION, rprobe.SECTION]


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
