"""Gradient statistics under Hugging Face's Trainer: the run stays as it is, and what is measured is its gradient."""

import dataclasses
import gc
import json
import logging
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from llava_patch import AuxiliaryProbe, patch
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.integrations.training import gradients as training
from llava_patch.integrations.training.auxiliary import follow as follow_auxiliary
from llava_patch.integrations.training.gradients import follow, loss_scale
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.patching.handle import get_handle

from .training_cases import STEPS, history, model, trainer

EVERY_STEP = Gradients(window=2)
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


def _weights(made):
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5.0},
    "checkpointing": {**CHECKPOINTING, "bf16": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_stays_as_it_is_bit_for_bit(case, tmp_path):
    plain = trainer(tmp_path / "plain", **CASES[case])
    plain.train()
    ended = _random_states()
    measured = trainer(tmp_path / "measured", **CASES[case])
    following = follow(measured, EVERY_STEP)
    measured.train()
    assert ended == _random_states()
    assert history(plain) == history(measured) and len(history(plain)) == STEPS
    assert _same(_weights(plain), _weights(measured))
    assert not _same(_weights(plain), model().state_dict())  # it did train
    result = following.result
    assert [step.step for step in result.steps] == list(range(1, STEPS + 1)) and len(result.windows) == 3
    assert all(step.main > 0 and step.skip > 0 for step in result.steps)
    assert [step.learning_rate for step in result.steps] == [rate for _, _, rate in history(plain)]
    assert not {"training_step", "log"} & set(vars(measured))
    assert (tmp_path / "measured" / "gradients" / "gradients.png").stat().st_size > 0


class Applied(TrainerCallback):
    """The measured block's gradient as the optimizer finds it (not clipped)."""

    def __init__(self, following, made):
        self.block = get_handle(made).anatomy.vision_parts().blocks[following.block - 1]
        self.found = []

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.found.append(
            torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.block.parameters()])
        )


@pytest.mark.parametrize("sums", [True, False])  # whether the Trainer has the model divide by the step's labels
def test_the_full_gradient_is_the_one_that_the_step_applies(sums, tmp_path, monkeypatch):
    """24 samples in batches of 2, five to a step: the third step has two batches; some batches have no image."""
    more = {} if sums else CHECKPOINTING
    made = trainer(tmp_path, max_steps=5, max_grad_norm=0.0, gradient_accumulation_steps=5, **more)
    made.model_accepts_loss_kwargs = sums
    collate = made.data_collator

    def without_some(records):
        batch = collate(records)
        if batch["input_ids"][0, 16] % 2:
            del batch["pixel_values"]
        return batch

    made.data_collator = without_some
    measured = _noting(monkeypatch)
    applied = Applied(follow(made, Gradients(window=2, block=3)), made.model)
    made.add_callback(applied)
    made.train()
    assert len(measured) == len(applied.found) == 5
    for (_, ours), theirs in zip(measured, applied.found, strict=True):
        assert theirs.norm() > 0
        if sums:
            assert torch.equal(ours, theirs)  # the same sums in the same order
        else:  # a reentrant checkpoint adds up a block's three readers in another order: a few float32 roundings
            assert (ours - theirs).norm() < 2e-6 * theirs.norm()


def _noting(monkeypatch):
    """Every (main, full) that a window is given."""
    found = []

    class Noting(training.Window):
        def add(self, step, main, full, learning_rate=None):
            found.append((main.clone(), full.clone()))
            return super().add(step, main, full, learning_rate)

    monkeypatch.setattr(training, "Window", Noting)
    return found


def test_a_loss_scale_is_taken_off_again(tmp_path, monkeypatch):
    found = _noting(monkeypatch)
    for scale in (None, 1024.0):  # a power of two: no rounding
        made = trainer(tmp_path, max_steps=1, max_grad_norm=0.0)
        following = follow(made, EVERY_STEP)
        if scale is not None:
            made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            made.accelerator.scaler.scale(torch.ones(()))  # it makes its scale when first used
            assert loss_scale(made) == scale
        made.train()
    assert following.result.steps[0].main > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, caplog):
    settings = Gradients(window=2, every=1, start=2)  # steps 2-3, 4-5: the checkpoint of step 4 is inside a window
    run = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", **run)
    expected = follow(whole, settings)
    whole.train()
    other = trainer(tmp_path / "other", **run)
    following = follow(other, settings)
    folder = tmp_path / "whole" / "checkpoint-4"
    other.train(resume_from_checkpoint=str(folder))
    assert _same(_weights(whole), _weights(other)) and history(whole) == history(other)
    log = [tmp_path / name / "gradients" / "gradients.jsonl" for name in ("whole", "other")]
    assert log[0].read_text() == log[1].read_text()
    assert following.result == expected.result and len(expected.result.windows) == 2
    third = trainer(tmp_path / "other")
    follow(third, dataclasses.replace(settings, window=3))
    with pytest.raises(CheckpointError, match=r"Gradients\.window = 3: keep it at 2"):
        third.train(resume_from_checkpoint=str(folder))
    assert log[0].read_text() == log[1].read_text()  # not cut back by a run that was refused
    (folder / "llava_patch_gradients.safetensors").unlink()
    fourth = trainer(tmp_path / "fourth")
    late = follow(fourth, settings)
    with caplog.at_level(logging.WARNING, logger="llava_patch"):
        fourth.train(resume_from_checkpoint=str(folder))
    assert "no gradient statistics to go on with: they begin at step 5" in caplog.text
    assert [step.step for step in late.result.steps] == [5, 6]


class KeptAt(TrainerCallback):
    """The weights after one step of a run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("epochs", [False, True])
def test_a_run_that_is_to_stop_takes_the_first_steps_of_the_whole_one(epochs, tmp_path):
    """Its schedule is that of the whole run, counted in steps or in epochs; a shorter run has another."""
    length = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4} if epochs else {"max_steps": 6}
    whole, kept = trainer(tmp_path / "whole", **COSINE, **length), KeptAt(3)
    whole.add_callback(kept)
    whole.train()
    stopped = trainer(tmp_path / "stopped", **COSINE, **length)
    following = follow(stopped, Gradients(window=2, steps=3, stop=3))
    stopped.train()
    assert (stopped.state.global_step, stopped.state.max_steps) == (3, 6)
    assert len(history(whole)) == 6 and history(stopped) == history(whole)[:3]
    assert [step.learning_rate for step in following.result.steps] == [rate for _, _, rate in history(whole)[:3]]
    assert _same(_weights(stopped), kept.weights)
    short = trainer(tmp_path / "short", **{**COSINE, **length, "max_steps": 3})
    short.train()
    assert [rate for *_, rate in history(short)] != [rate for *_, rate in history(stopped)]


def test_a_run_that_has_stopped_goes_on_to_a_later_stop_and_no_further(tmp_path):
    whole = trainer(tmp_path / "whole", **COSINE)
    expected = follow(whole, Gradients(window=2))
    whole.train()
    first = trainer(tmp_path / "run", **COSINE)
    follow(first, Gradients(window=2, stop=4))
    first.train()
    for stop, message in ((2, "goes on from step 4: it has ended already; set a later Gradients.stop, or delete"),
                          (7, "this run has 6 steps: leave it out")):  # fmt: skip
        again = trainer(tmp_path / "run", **COSINE)
        follow(again, Gradients(window=2, stop=stop))
        with pytest.raises(SettingError, match=f"Gradients.stop = {stop}, but .*{message}"):
            again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 4
    _ends_where_it_stopped(tmp_path / "run", _weights(first))
    later = trainer(tmp_path / "run", **COSINE)
    following = follow(later, Gradients(window=2, stop=5))
    later.train(resume_from_checkpoint=True)
    assert later.state.global_step == 5 and history(later) == history(whole)[:5]
    assert following.result.steps == expected.result.steps[:5]


def _ends_where_it_stopped(folder, weights):
    """A run that was killed after its stop's checkpoint, before its results."""
    written = [folder / "gradients" / f"gradients.{suffix}" for suffix in ("json", "png")]
    before = json.loads(written[0].read_text())
    for path in written:
        path.unlink()
    again = trainer(folder, **COSINE)
    loader, skips = again.get_train_dataloader(), again.args.ignore_data_skip
    again.get_train_dataloader = lambda: loader
    kind, steps = type(loader), []
    again.training_step = lambda *args, **kwargs: steps.append(args)
    follow(again, Gradients(window=2, stop=4))
    again.train(resume_from_checkpoint=True)
    assert steps == [] and again.state.global_step == 4 and _same(_weights(again), weights)
    assert json.loads(written[0].read_text()) == before and written[1].is_file()
    assert type(loader) is kind and again.args.ignore_data_skip == skips and len(list(loader)) > 0


def test_one_graph_is_held_at_a_time(tmp_path):
    """A marker on a node of a pass's graph lives as long as the graph; cycles would wait for the collector."""
    made = trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2)
    living, most = weakref.WeakSet(), []

    class Marker:
        pass

    def mark(module, args, output):
        marker = Marker()
        output.grad_fn.metadata["marker"] = marker
        living.add(marker)
        most.append(len(living))

    made.model.lm_head.register_forward_hook(mark)
    follow(made, EVERY_STEP)
    gc.disable()
    try:
        made.train()
    finally:
        gc.enable()
    assert most == [1] * 6  # two micro-batches, three passes each


def test_every_so_many_steps_and_means_in_the_log(tmp_path, caplog):
    made = trainer(tmp_path, logging_steps=3)
    with caplog.at_level(logging.WARNING, logger="llava_patch"):
        following = follow(made, Gradients(every=2, window=50))
        made.train()
    assert "3 of the run's 6 steps are measured, but a window takes 50" in caplog.text
    steps = following.result.steps
    assert [step.step for step in steps] == [1, 3, 5]
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    for entry, part in zip(logs, (steps[:2], steps[2:]), strict=True):
        assert entry["llava_patch/grad/main_norm"] == pytest.approx(
            sum(s.main**0.5 for s in part) / len(part), rel=1e-5
        )
        assert entry["llava_patch/grad/skip_norm"] == pytest.approx(
            sum(s.skip**0.5 for s in part) / len(part), rel=1e-5
        )
        assert entry["llava_patch/grad/cosine"] == pytest.approx(sum(s.cosine for s in part) / len(part), rel=1e-5)
    assert following.result.facts["batch"] == 2 and following.result.facts["block"] == 2


def _with_lora(made):
    from peft import LoraConfig, get_peft_model

    inside = get_peft_model(made, LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=".*vision_tower.*"))
    get_handle(inside).apply_freeze()  # peft freezes what is no LoRA
    return inside


def test_beside_lora_and_the_auxiliary_loss(tmp_path):
    for number, wrapped in enumerate((_with_lora, _with_probe)):
        ended = []
        for measures in (False, True):
            torch.manual_seed(3)  # of LoRA's new matrices
            made = trainer(tmp_path / f"{number}-{measures}", wrapped(model()), max_steps=3)
            if wrapped is _with_probe:
                made.data_collator = _with_regions(made.data_collator)
                follow_auxiliary(made)
            if measures:
                following = follow(made, EVERY_STEP)
            made.train()
            logs = [{k: v for k, v in e.items() if k in KEYS} for e in made.state.log_history if "loss" in e]
            ended.append((_weights(made), logs))
        assert _same(ended[0][0], ended[1][0]) and ended[0][1] == ended[1][1]
        assert all(step.main > 0 and step.skip > 0 for step in following.result.steps)
        assert all(("llava_patch/probe/loss" in entry) == (wrapped is _with_probe) for entry in ended[0][1])


KEYS = {"loss", "grad_norm", "learning_rate", "llava_patch/probe/model_loss", "llava_patch/probe/loss"}


def _with_regions(collate):
    def collate_both(records):
        batch = collate(records)
        target = torch.zeros(len(records), 16, dtype=torch.bool)
        target[:, 2:6] = True
        regions = {"image": torch.arange(len(records)), "target": target, "text": batch["input_ids"][:, 16:19],
                   "counts": torch.full((len(records),), 3)}  # fmt: skip
        return {**batch, "rprobe": regions}

    return collate_both


def _with_probe(made):
    patch(made, probe=AuxiliaryProbe(weight=0.5))
    return made


REFUSED = {
    "ZeRO stage 3": {"hf_deepspeed_config": SimpleNamespace(config={"zero_optimization": {"stage": 3}})},
    "torch_autocast": {"hf_deepspeed_config": SimpleNamespace(config={"torch_autocast": {"enabled": True}})},
    "--fsdp": {"fsdp": "full_shard"},
    "one process on 2 GPUs": {"_n_gpu": 2},
    "--torch_compile": {"torch_compile": True},
    "context parallelism": {"parallelism_config": object()},
}


def test_what_cannot_be_measured_is_refused(tmp_path):
    for message, values in REFUSED.items():
        made = trainer(tmp_path)
        vars(made.args).update(values)
        with pytest.raises(SettingError, match=message):
            follow(made, EVERY_STEP)
    cases = {
        "main path ends at block 7": (model(), Gradients(block=8)),
        "detaches every tap from block 6 on": (model(detach=3), Gradients(block=6)),
        "no skip taps": (model(layers=()), EVERY_STEP),
    }
    for message, (patched, settings) in cases.items():
        made = trainer(tmp_path, patched)
        with pytest.raises(SettingError, match=message):
            follow(made, settings)
        assert made.callback_handler.callback_list == "DefaultFlowCallback\nPrinterCallback"
    assert not list(tmp_path.iterdir())


def test_a_run_that_breaks_off_can_be_begun_again(tmp_path):
    made = trainer(tmp_path)
    following = follow(made, EVERY_STEP)
    made.create_optimizer()
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(type(made.optimizer), "step", _fail)
        with pytest.raises(RuntimeError, match="as a full disk would"):
            made.train()
    made.optimizer = made.lr_scheduler = None
    made.train()
    assert len(following.result.steps) == STEPS and "training_step" not in vars(made)


def _fail(*args, **kwargs):
    raise RuntimeError("as a full disk would")
