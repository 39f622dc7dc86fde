"""Compiled decode's table: every row is one graph, equals the dynamic cache, and is written with its ratios."""

import json
import logging

import pytest
import torch

from llava_patch.hosts import sizes
from llava_patch.hosts.compat.static_cache import has_static_layers
from llava_patch.tools.bench import report
from llava_patch.tools.bench.compiled import measure
from llava_patch.tools.bench.methods import build, methods

if not has_static_layers():
    pytest.skip("static caches are not routed here", allow_module_level=True)
TINY = sizes.Shape(layers=3, hidden=64, intermediate=96, heads=4, vocabulary=128, split=1)


def test_rows_are_measured_side_by_side_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest would keep all that it says
    torch._dynamo.utils.counters.clear()
    model = build(TINY, "cpu", torch.float32)
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    rows = [method for method in methods(3, 1, lora=False) if method.name in ("stock", "LF")]
    found = measure(model, rows, 6, 2, repeats=2, decode_tokens=4, backend="eager", progress=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(rows)  # none is made again in later rounds
    assert all(len(row.dynamic_ms) == len(row.compiled_ms) == 2 and row.delta < 1e-5 for row in found)
    stock, routed = (row.cache_bytes for row in found)
    longest, text = 6 + 576 + 4, 6 + 4
    assert routed * 3 * longest == stock * (2 * longest + text)  # one text-only layer of three
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before
    report.write_compiled(tmp_path, "compiled", {"tiny": found}, {"device": "this"})
    written = json.loads((tmp_path / "compiled.json").read_text())["tables"]["tiny"]
    assert [row["method"] for row in written] == ["stock", "LF"]
    assert written[0]["compiled_ratio"] == [1.0, 1.0, 1.0] and written[1]["cache_ratio"] == routed / stock
    assert "static, compiled" in (tmp_path / "compiled.md").read_text()
