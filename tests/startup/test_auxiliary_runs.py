"""LLaVA's unmodified train.py with R-Probe as an auxiliary loss: nothing at weight 0, logs, resume, several ranks."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_train import TRAIN, arguments, make_data, ok, run

HERE = Path(__file__).parent
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
def test_weight_zero_changes_nothing_and_a_resumed_run_ends_as_an_uninterrupted_one(data, tmp_path):
    stock, none, whole, resumed = (tmp_path / f"llava-{n}" for n in ("stock", "none", "whole", "resumed"))
    ok(run(_arguments(data, stock)))
    text = ok(run(_arguments(data, none, "weight = 0")))
    assert "AuxiliaryProbe.weight = 0: no head is built" in text
    assert _same(stock, none)
    assert [(e["loss"], e["grad_norm"]) for e in _logs(stock)] == [(e["loss"], e["grad_norm"]) for e in _logs(none)]
    assert not (none / FILE).exists()

    options = ("weight = 0.5", "share = 0.7", "lr = 2e-3")
    text = ok(run(_arguments(data, whole, *options, save_steps=2, save_total_limit=3, per_device_train_batch_size=4)))
    assert text.count("head of the auxiliary loss") == 1
    assert not _same(stock, whole)
    logs = _logs(whole)
    assert all(math.isfinite(e["loss"]) and e["ntp_loss"] > 0 for e in logs) and len(logs) == 4
    assert any("rprobe_loss" in e for e in logs) and not all("rprobe_loss" in e for e in logs)  # share
    for entry in logs:  # HF rounds the loss to four places
        assert entry["loss"] == pytest.approx(entry["ntp_loss"] + 0.5 * entry.get("rprobe_loss", 0.0), abs=1e-4)
    stock_names = set(load_file(stock / "model.safetensors"))
    for folder in (whole, whole / "checkpoint-2"):
        assert set(load_file(folder / "model.safetensors")) == stock_names  # the head lies apart
        with safe_open(folder / FILE, framework="pt") as stream:
            assert json.loads(stream.metadata()["settings"])["weight"] == 0.5
        record = json.loads((folder / "llava_patch.json").read_text())
        assert record["probe"]["share"] == 0.7 and record["fusion"] is None
        assert "llava_patch" not in json.loads((folder / "config.json").read_text())

    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    again = _arguments(data, resumed, *options, save_steps=2, save_total_limit=3, per_device_train_batch_size=4)
    ok(run(again))
    assert _same(whole, resumed)
    heads = load_file(whole / FILE), load_file(resumed / FILE)
    assert all(torch.equal(t, heads[1][n]) for n, t in heads[0].items())


ZERO = {
    "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 2, "overlap_comm": True,
    "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto"},
}  # fmt: skip


def _ranks(data, out, *bindings, zero=None, **extra):
    """Two ranks with one sample each, of which often neither or only one has a region."""
    extra = {"bf16": True, "group_by_modality_length": False, "per_device_train_batch_size": 1, **extra}
    if zero is not None:
        pytest.importorskip("deepspeed")
        config = out.parent / f"{out.name}.json"
        config.write_text(json.dumps(zero))
        extra |= {"deepspeed": config, "use_cpu": False}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "cpu_deepspeed.py"]
    return ok(run([*launcher, *_arguments(data, out, *bindings, **extra)]))


@pytest.mark.timeout(400)
def test_ddp_and_zero_2_train_alike_where_ranks_have_no_region(data, tmp_path):
    logs, weights = {}, {}
    for name, zero in (("ddp", None), ("zero2", ZERO)):
        out = tmp_path / f"llava-{name}"
        text = _ranks(data, out, "weight = 1.0", zero=zero, steps=6)
        assert text.count("head of the auxiliary loss") == 1  # rank 0 alone reports
        logs[name] = _logs(out)
        weights[name] = load_file(out / "model.safetensors")
        assert (out / FILE).is_file() and not any("rprobe" in key for key in weights[name])
    seen = ["rprobe_loss" in entry for entry in logs["ddp"]]
    assert any(seen) and not all(seen)
    for here, there in zip(logs["ddp"], logs["zero2"], strict=True):
        # DDP runs under autocast and steps on bf16 weights, DeepSpeed on float32 copies: roundings of 2^-9.
        assert here["ntp_loss"] == pytest.approx(there["ntp_loss"], rel=1e-2)
        assert ("rprobe_loss" in here) == ("rprobe_loss" in there)
        if "rprobe_loss" in here:
            assert here["rprobe_loss"] == pytest.approx(there["rprobe_loss"], rel=3e-2)
    assert set(weights["ddp"]) == set(weights["zero2"])
