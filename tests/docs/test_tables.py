"""Tables of the manual are those of the files in docs/measured."""

import dataclasses
import json

import pytest

from llava_patch.core.terminal import markdown
from llava_patch.tools.bench import fusion, host, measure, report
from tests.support.paths import ROOT

MEASURED = ROOT / "docs" / "measured"


def _rows(cls, values):
    names = [f.name for f in dataclasses.fields(cls)]
    return [cls(**{name: row[name] for name in names if name in row}) for row in values]


def _speed():
    (values,) = json.loads((MEASURED / "routing_small.json").read_text())["tables"].values()
    return report.method_tables(_rows(measure.Row, values))


def _fusions():
    return [report.fusion_table(_rows(fusion.Row, json.loads((MEASURED / "fusion_speed_small.json").read_text())["rows"]))]


def _host():
    return [report.host_table(_rows(host.Row, json.loads((MEASURED / "host.json").read_text())["rows"]))]


TABLES = {
    "host": (_host, "routing.md"),
   "routing": (_speed, "routing.md"), "fusions": (_fusions, "measured/fusion_speed_small.md")}


@pytest.mark.parametrize("name", TABLES)
def test_the_manuals_table_is_that_of_its_file(name):
    make, page = TABLES[name]
    text = (ROOT / "docs" / page).read_text()
    for table in make():
        for line in markdown(*table).splitlines():
            assert line in text
