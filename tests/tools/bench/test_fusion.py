"""The table of fusions: what it counts, and that it leaves the model as it was."""

import json

import pytest
import torch

from llava_patch.hosts import sizes
from llava_patch.tools.bench import fusion, report
from llava_patch.tools.bench.methods import build

TINY = sizes.Shape(layers=11, hidden=32, intermediate=48, heads=2, vocabulary=64, split=3)
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 24, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model():
    return build(TINY, "cpu", torch.float32, "sdpa", TOWER)


def test_measuring_fills_the_table_and_leaves_the_model(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = fusion.measure(model, fusion.fusions(), 8, 1, repeats=1, progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert not any(p.requires_grad for p in model.parameters())
    by_name = {row.method: row for row in rows}
    assert list(by_name) == list(fusion.fusions())
    for name, row in by_name.items():
        assert len(row.prefill_ms) == len(row.train_ms) == 1
        assert row.start_delta == (0.0 if row.image_tokens == 576 else None), name
    assert by_name["Dense Connector, STI"].image_tokens == 576 + 2 * 72
    assert by_name["SkipLinks, S = 6, merged 2 x 2"].image_tokens == 144
    assert by_name["stock"].added == 0
    assert by_name["SkipLinks, S = 6, D = 2"].added == 3 * 16 * 32
    assert by_name["DeepStack"].added == 16 * 32 + 32 + 32 * 32 + 32
    # three taps kept once, and the sum of two products (a tenth more: small tensors come and go)
    kept = by_name["SkipLinks, S = 6, D = 2"].kept_bytes - by_name["stock"].kept_bytes
    assert 3 * 576 * 16 * 4 <= kept <= 1.1 * (3 * 16 + 32) * 577 * 4
    paths = report.write_fusions(tmp_path, "fusion_tiny", rows, "tiny", report.machine(model.device))
    record = json.loads(paths[0].read_text())
    assert record["rows"][1]["train_ratio"] and record["torch"] == torch.__version__
    assert paths[1].read_text().count("\n| ") == 13
