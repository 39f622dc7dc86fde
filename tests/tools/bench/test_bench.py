"""The speed table: what it counts, and that it leaves the model as it was."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_patch import patch
from llava_patch.core.errors import LlavaPatchError
from llava_patch.hosts import sizes
from llava_patch.tools.bench import measure, report
from llava_patch.tools.bench.methods import build, make_inputs, methods, partner_difference

TINY = sizes.Shape(layers=6, hidden=64, intermediate=96, heads=4, vocabulary=128, split=3)
ROWS = {m.name: m for m in methods(6, 3)}


@pytest.fixture(scope="module")
def model():
    return build(TINY, "cpu", torch.float32, "eager")


def test_the_table_has_every_variant_and_baseline():
    assert list(ROWS) == [
        "stock", "LF", "LF, K = 2", "PC", "KV", "ideal", "VTW", "FastV(2, 0.5)", "LF + FastV(2, 0.5)", "FastV(2, 0.75)",
        "LF + FastV(2, 0.75)", "LoRA, r = 16", "LoRA, r = 64",
    ]  # fmt: skip
    assert [m.name for m in methods(32, 18) if m.name not in ROWS] == ["PyramidDrop", "SparseVLM"]


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
def test_flops_are_those_of_the_decoders_products(model, name):
    """PyTorch's counter over the decoder's layers in generation, eager attention: within 1 % (FastV's one row)."""
    method = ROWS[name]
    with method.applied(model), FlopCounterMode(display=False) as counter:
        model(**make_inputs(model, 20, 2), use_cache=True, logits_to_keep=1)
    by_module = {name: sum(values.values()) for name, values in counter.flop_counts.items()}
    decoder = "LlavaForConditionalGeneration.model.language_model"
    counted = by_module[decoder] - by_module.get(f"{decoder}.rotary_emb", 0)  # a product up to transformers 4
    wanted = measure.flops(model, method, 20, 2)
    assert abs(counted - wanted) < 0.01 * wanted, (counted, wanted)


@pytest.mark.parametrize("name", ROWS)
def test_every_identity_of_the_table_holds_and_can_fail(model, name):
    inputs = make_inputs(model, 6, 1)
    method = ROWS[name]
    assert partner_difference(model, method, inputs) < 1e-5
    with torch.no_grad(), method.applied(model):
        changed = model(**inputs, use_cache=False).logits
    with torch.no_grad():
        stock = model(**inputs, use_cache=False).logits
    same = name in ("stock", "LoRA, r = 16", "LoRA, r = 64")
    assert torch.equal(changed, stock) == (name == "stock") or same
    assert (changed - stock).abs().max() < 1e-5 if same else (changed - stock).abs().max() > 1e-3


def test_measuring_fills_the_table_and_leaves_the_model(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    chosen = [ROWS[n] for n in ("stock", "LF", "FastV(2, 0.5)", "LoRA, r = 16")]
    rows = measure.measure(model, chosen, 6, 1, repeats=2, decode_tokens=2, training=True, progress=False)
    assert {k: torch.equal(v, before[k]) for k, v in model.state_dict().items()} == dict.fromkeys(before, True)
    assert not any(p.requires_grad for p in model.parameters())
    stock, lf, fastv, lora = rows
    per_layer = 4 * 64 * 64 + 3 * 64 * 96
    assert stock.trainable == 6 * (per_layer + 2 * 64) + 128 * 64 + 64
    assert lf.trainable == per_layer + 2 * 64
    assert fastv.trainable is None and not fastv.train_ms
    assert lora.trainable == 6 * 16 * (4 * 128 + 3 * 160)
    assert stock.cache_bytes == 6 * 582 * 2 * 64 * 4
    assert lf.cache_bytes == (4 * 582 + 2 * 6) * 2 * 64 * 4 + 576 * (64 * 4 + 8)
    for row in rows:
        assert len(row.prefill_ms) == len(row.decode_ms) == 2 and row.bound_ms > 0
        assert row.partner_delta < 1e-5 and row.cached_delta < 1e-5
    paths = report.write(tmp_path, "routing_tiny", {"tiny": rows}, report.machine(model.device))
    assert all(p.stat().st_size > 100 for p in paths)
    record = json.loads(paths[0].read_text())
    assert record["tables"]["tiny"][1]["cache_ratio"] == lf.cache_bytes / stock.cache_bytes
    assert record["torch"] == torch.__version__ and record["date"]
    assert paths[1].read_text().count("\n| ") == 12  # two tables of a head, a rule and four rows
    with patch(model, **chosen[1].settings):
        pass  # nothing was left on it


def test_an_unknown_shape_is_named():
    from llava_patch.cli.tools import bench

    with pytest.raises(LlavaPatchError, match="--shape 70b: expected one of small, 7b, 13b"):
        bench(shape="70b")
