"""LLaVA's unmodified train.py with R-Probe as an auxiliary loss: nothing at weight 0, logs, files, ZeRO-2."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.paths import LAUNCHERS
from tests.support.tiny_train import TRAIN, arguments, make_data, ok, run

FILE = "llava_patch_rprobe.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Stage 2's data, in which every third record carries a region."""
    root, files = make_data(tmp_path_factory.mktemp("train"))
    rows = json.loads((root / "v1.json").read_text())
    for i, row in enumerate(rows):
        if i % 3 == 0 and "image" in row:
            row["rprobe"] = {"box": [3, 15, 40, 27], "text": row["conversations"][1]["value"]}
    (root / "regions.json").write_text(json.dumps(rows))
    return root, files


def _flags(*bindings):
    return [word for binding in bindings for word in ("--gin_param", f"AuxiliaryProbe.{binding}")]


def _arguments(data, out, *bindings, steps=4, **extra):
    extra = {"data_path": data[0] / "regions.json", "weight_decay": 0.1, **extra}
    return [TRAIN, *arguments(data, 2, out, steps, **extra), *_flags(*bindings)]


def _logs(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def _same(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.timeout(600)
def test_weight_zero_changes_nothing_and_a_run_logs_and_saves(data, tmp_path):
    stock, none, whole = (tmp_path / f"llava-{n}" for n in ("stock", "none", "whole"))
    ok(run(_arguments(data, stock)))
    plain = data[0] / "v1.json"  # the same records; without a head nobody asks for a region
    text = ok(run(_arguments(data, none, "weight = 0", data_path=plain)))
    assert "AuxiliaryProbe.weight = 0: no head is built" in text
    assert _same(stock, none)
    assert [(e["loss"], e["grad_norm"]) for e in _logs(stock)] == [(e["loss"], e["grad_norm"]) for e in _logs(none)]
    assert not (none / FILE).exists()

    options = ("weight = 0.5", "share = 0.7", "lr = 2e-3")
    text = ok(run(_arguments(data, whole, *options, save_steps=2, save_total_limit=3, per_device_train_batch_size=4)))
    assert text.count("head of the auxiliary loss") == 1
    assert not _same(stock, whole)
    logs = _logs(whole)
    assert all(math.isfinite(e["loss"]) and e["llava_patch/probe/model_loss"] > 0 for e in logs) and len(logs) == 4
    assert any("llava_patch/probe/loss" in e for e in logs) and not all(
        "llava_patch/probe/loss" in e for e in logs
    )  # share
    for entry in logs:  # HF rounds the loss to four places
        assert entry["loss"] == pytest.approx(
            entry["llava_patch/probe/model_loss"] + 0.5 * entry.get("llava_patch/probe/loss", 0.0), abs=1e-4
        )
    stock_names = set(load_file(stock / "model.safetensors"))
    for folder in (whole, whole / "checkpoint-2"):
        assert set(load_file(folder / "model.safetensors")) == stock_names  # the head lies apart
        with safe_open(folder / FILE, framework="pt") as stream:
            assert json.loads(stream.metadata()["settings"])["weight"] == 0.5
        record = json.loads((folder / "llava_patch.json").read_text())
        assert record["probe"]["share"] == 0.7 and record["fusion"] is None
        assert "llava_patch" not in json.loads((folder / "config.json").read_text())


ZERO = {
    "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 2, "overlap_comm": True,
    "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto"},
}  # fmt: skip


@pytest.mark.timeout(400)
def test_zero_2_trains_where_ranks_have_no_region(data, tmp_path):
    """Two ranks with one sample each, of which often neither or only one has a region."""
    pytest.importorskip("deepspeed")
    out, config = tmp_path / "llava-zero2", tmp_path / "zero2.json"
    config.write_text(json.dumps(ZERO))
    extra = {"bf16": True, "group_by_modality_length": False, "per_device_train_batch_size": 1, "use_cpu": False,
             "deepspeed": config}  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", LAUNCHERS / "cpu_deepspeed.py"]
    text = ok(run([*launcher, *_arguments(data, out, "weight = 1.0", steps=6, **extra)]))
    assert text.count("head of the auxiliary loss") == 1  # rank 0 alone reports
    assert (out / FILE).is_file() and not any("rprobe" in key for key in load_file(out / "model.safetensors"))
    logs = _logs(out)
    seen = ["llava_patch/probe/loss" in entry for entry in logs]
    assert any(seen) and not all(seen)
    assert all(math.isfinite(e["loss"]) and 4 < e["llava_patch/probe/model_loss"] < 9 for e in logs)  # ln 512 is 6.2
    assert all(0.1 < e["llava_patch/probe/loss"] < 10 for e in logs if "llava_patch/probe/loss" in e)
