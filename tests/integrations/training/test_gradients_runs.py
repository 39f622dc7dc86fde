"""LLaVA's unmodified train.py measures gradient statistics where gin binds them, and trains as it would without."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from tests.support.paths import LAUNCHERS
from tests.support.tiny_train import TRAIN, arguments, make_data, ok, run

ZERO2 = {
    "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 2, "overlap_comm": True,
    "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto"},
}  # fmt: skip
TAPS = ("SkipLinks.stride = 2", "SkipLinks.detach = 1", 'SkipLinks.train_tower = "all"', "SkipLinks.tower_lr = 5e-4")
MEASURED = ("Gradients.window = 2", 'Gradients.full = "attached"')


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("train"))


def _command(data, out, *bindings, **extra):
    flags = [word for binding in bindings for word in ("--gin_param", binding)]
    extra = {"weight_decay": 0.1, "per_device_train_batch_size": 2, **extra}
    return [TRAIN, *arguments(data, 2, out, **extra), *flags]


def _ranks(command):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", LAUNCHERS / "cpu_deepspeed.py"]
    return [*launcher, *command]


def _history(out):
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries if "loss" in e]


def _same(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.timeout(400)
def test_two_ranks_with_zero_2_train_the_same(data, tmp_path):
    """bf16, reentrant checkpointing, two micro-batches a step, pure text among the batches."""
    pytest.importorskip("deepspeed")
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps(ZERO2))
    extra = {"steps": 4, "bf16": True, "use_cpu": False, "deepspeed": config, "gradient_accumulation_steps": 2,
             "group_by_modality_length": True}  # fmt: skip
    plain, measured = (tmp_path / f"llava-{name}" for name in ("plain", "measured"))
    ok(run(_ranks(_command(data, plain, *TAPS, **extra))))
    text = ok(run(_ranks(_command(data, measured, *TAPS, *MEASURED, **extra))))
    assert text.count("gradient statistics of block 2 in") == 1
    assert _same(plain, measured) and _history(plain) == _history(measured) and len(_history(plain)) == 4
    lines = [json.loads(line) for line in (measured / "gradients" / "gradients.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4] and all(step["main"] > 0 for step in steps)
    # The projector's new columns start at zero, and the first step of the warm-up has the learning rate 0.
    assert [step["skip"] > 0 for step in steps] == [False, False, True, True]
    assert max(step["learning_rate"] for step in steps) == pytest.approx(5e-4)  # tower_lr
    assert (measured / "checkpoint-4" / "llava_patch_gradients.safetensors").is_file()


@pytest.mark.timeout(200)
def test_a_run_stops_early_on_its_whole_schedule(data, tmp_path):
    """Of 8 steps it takes 3, with the cosine of 8; through DeepStack's shared projector, which adds nothing."""
    stack = ("DeepStack.start = 1", "DeepStack.interval = 1", 'DeepStack.projector = "shared"',
             'DeepStack.train_tower = "all"')  # fmt: skip
    out = tmp_path / "llava-stopped"
    text = ok(run(_command(data, out, *stack, *MEASURED, "Gradients.stop = 3", steps=8)))
    state = json.loads((out / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (3, 8) and "gradient statistics of block 2 in" in text
    rates = [rate for _, _, rate in _history(out)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=max(rates))
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, 8)
    expected = []
    for _ in range(3):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == expected and len(set(rates)) == 3
    lines = (out / "gradients" / "gradients.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3] and all(step["skip"] > 0 for step in steps)
    tensors = load_file(out / "model.safetensors")
    assert any("mm_projector.0" in name for name in tensors) and not any("stack" in name for name in tensors)
    record = json.loads((out / "llava_patch.json").read_text())["fusion"]
    assert (record["method"], record["projector"]) == ("DeepStack", "shared")


@pytest.mark.timeout(200)
def test_without_taps_nothing_is_written(data, tmp_path):
    out = tmp_path / "llava-out"
    done = run(_command(data, out, "Gradients.every = 5", steps=2))
    assert done.returncode != 0 and not out.exists()
    assert "this model has no skip taps: bind a fusion, as in SkipLinks.stride = 2" in done.stderr
