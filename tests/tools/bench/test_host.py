"""The host's work: what is counted, and that it does not creep up."""

import json

import pytest
import torch

from llava_patch.hosts import sizes
from llava_patch.tools.bench import host, report
from llava_patch.tools.bench.methods import build, methods

TINY = sizes.Shape(layers=6, hidden=64, intermediate=96, heads=4, vocabulary=128, split=3)


@pytest.fixture(scope="module")
def rows():
    model = build(TINY, "cpu", torch.float32, side=host.IMAGE)
    return host.measure(model, methods(6, 3, lora=False), repeats=2, progress=False)


def test_views_are_not_counted():
    x = torch.randn(4, 6)
    with host.Operations() as found:
        y = x.t().reshape(2, 12)[:, 3:].unsqueeze(0)  # the reshape copies
        y.split(2, dim=2)
        x.add_(1)
    assert found.count == 2


def test_what_is_done_beside_the_layers_does_not_grow(rows):
    """A bound of operations for every row, at any depth; a layer of LLaMA has 30."""
    found = {row.method: row for row in rows}
    stock = found["stock"]
    layer, plan = 30, 30
    more = {name: row.prefill_operations - stock.prefill_operations for name, row in found.items()}
    assert more["VTW"] <= plan
    assert max(more["LF"], more["PC"], more["ideal"]) <= plan + layer + 15  # the side branch, and the last layer's keys
    assert more["KV"] <= plan + layer + 3 * 18  # of a layer: the image's norm, keys, values and rotary, and two merges
    assert more["FastV(2, 0.75)"] <= 85
    assert all(row.decode_operations - stock.decode_operations <= 2 for row in rows)


def test_the_table_is_written_with_its_ratios(rows, tmp_path):
    paths = report.write_host(tmp_path, "host", rows, "tiny", report.machine(torch.device("cpu")))
    record = json.loads(paths[0].read_text())
    lf = next(row for row in record["rows"] if row["method"] == "LF")
    assert lf["prefill_ratio"] == min(rows[1].prefill_ms) / min(rows[0].prefill_ms)
    assert len(lf["prefill_ms"]) == len(lf["decode_ms"]) == 2
    assert "| LF |" in paths[1].read_text().replace("  ", " ")
