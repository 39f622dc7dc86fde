"""What `follow` does to a Trainer: steps, learning rates, checkpoints of both forms, and what it refuses."""

import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llava_patch import AuxiliaryProbe, Routing, patch
from llava_patch.core.errors import SettingError
from llava_patch.integrations.training.auxiliary import RegionCollator, follow
from llava_patch.probe.auxiliary.attach import HEAD
from tests.support.models import hf_model
from tests.support.probes import processor

from .test_data import Words
from .test_trainer import Records, _collate, _plain, _trainer

RATE = 2e-3


def _logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
def test_a_resumed_run_with_lr_and_share_ends_as_the_whole_one(tmp_path, safetensors):
    probe = AuxiliaryProbe(weight=0.5, share=0.5, lr=RATE, seed=3)
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "max_steps": 6, "learning_rate": 3e-2,
               "gradient_accumulation_steps": 1}  # fmt: skip
    if not safetensors:
        if not hasattr(TrainingArguments, "save_safetensors"):
            pytest.skip("transformers 5 writes safetensors only")
        options["save_safetensors"] = False
    whole, handle = _trainer(tmp_path / "whole", probe, **options)
    follow(whole)
    whole.train()
    chosen = []
    for step in range(6):
        handle.auxiliary.begin_step(step)
        chosen.append(handle.auxiliary.computes)
    assert ["llava_patch/probe/loss" in entry for entry in _logs(whole)] == chosen and len(set(chosen[3:])) == len(
        set(chosen)
    ) == 2
    head = {id(p) for p in handle.auxiliary.head.parameters()}
    for group in whole.optimizer.param_groups:
        inside = {id(p) in head for p in group["params"]}
        assert inside == {group["initial_lr"] == RATE}
    assert any(group["initial_lr"] == RATE for group in whole.optimizer.param_groups)
    decayed = [g["weight_decay"] for g in whole.optimizer.param_groups if g["initial_lr"] == RATE]
    assert sorted(decayed) == [0.0, 0.1]

    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again, resumed = _trainer(tmp_path / "again", probe, **options)
    follow(again)
    again.train(resume_from_checkpoint=True)
    ended, here = handle.anatomy.model.state_dict(), resumed.anatomy.model.state_dict()
    assert any(name.startswith(HEAD) for name in ended)
    assert all(torch.equal(tensor, here[name]) for name, tensor in ended.items())
    assert [e["loss"] for e in _logs(again)] == [e["loss"] for e in _logs(whole)]


def test_the_head_comes_off_when_training_ends(tmp_path):
    """LLaVA's script then saves, beside LoRA, every parameter that trains and is not LoRA's."""
    trainer, handle = _trainer(tmp_path, AuxiliaryProbe(), max_steps=1)
    follow(trainer, release=True)
    trainer.train()
    model = handle.anatomy.model
    assert not any(HEAD in name for name, _ in model.named_parameters())
    assert not any(HEAD in name for name in model.state_dict())
    assert handle.auxiliary.head is None
    kept, other = _trainer(tmp_path, AuxiliaryProbe(), max_steps=1)
    follow(kept)
    kept.train()
    assert other.auxiliary.head is not None and hasattr(other.anatomy.model, HEAD)


def test_a_head_that_peft_froze_trains(tmp_path):
    trainer, handle = _trainer(tmp_path, AuxiliaryProbe())
    handle.auxiliary.head.requires_grad_(False)
    follow(trainer)
    assert all(p.requires_grad for p in handle.auxiliary.head.parameters())


class Stream(torch.utils.data.IterableDataset):
    """Records one after the other."""

    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_that_rank_0_cuts_up_are_refused(tmp_path, monkeypatch, given, stream, world):
    more = {} if given is None else {"accelerator_config": {"dispatch_batches": given}}
    trainer, _ = _trainer(tmp_path, AuxiliaryProbe(), **more)
    if stream:
        trainer.train_dataset = Stream()
    monkeypatch.setattr(TrainingArguments, "world_size", world)
    if world == 2 and (given or (given is None and stream)):
        with pytest.raises(SettingError, match=r'accelerator_config=\{"dispatch_batches": False\}'):
            follow(trainer)
    else:
        follow(trainer)


def _with_optimizer(out, make, **probe):
    model = hf_model().train()
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = patch(model, probe=AuxiliaryProbe(**probe))
    arguments = TrainingArguments(str(out), report_to="none", use_cpu=True, remove_unused_columns=False)
    collator = RegionCollator(_collate, handle, processor(), Words())
    optimizer = make(handle, model) or early
    return Trainer(
        model, arguments, train_dataset=Records(), data_collator=collator, optimizers=(optimizer, None)
    )  # fmt: skip


def test_an_optimizer_of_the_callers_must_train_the_head(tmp_path):
    def all_at(rate):
        return lambda handle, model: torch.optim.AdamW(model.parameters(), lr=rate)

    def grouped(handle, model):
        optimizer = torch.optim.AdamW(handle.param_groups(1e-3))
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # has changed "lr" already
        return optimizer

    with pytest.raises(SettingError, match=r"does not train the auxiliary loss's head: .*handle\.param_groups"):
        follow(_with_optimizer(tmp_path, lambda *_: None))
    with pytest.raises(SettingError, match=r"lr = 0.002, but .* at 0.001: .*handle\.param_groups"):
        follow(_with_optimizer(tmp_path, all_at(1e-3), lr=RATE))
    follow(_with_optimizer(tmp_path, all_at(1e-3)))
    follow(_with_optimizer(tmp_path, grouped, lr=RATE))


def test_weight_zero_is_stopped_by_nothing(tmp_path):
    """A run without a head is the baseline: what only the loss cannot do is no reason to stop it."""
    model = hf_model().train()
    handle = patch(model, routing=Routing(split=3), probe=AuxiliaryProbe(weight=0, lr=RATE))
    inner = lambda records: _plain(records)  # noqa: E731
    collator = RegionCollator(inner, handle, object(), None)  # neither is asked
    bad = {**Records()[0], "rprobe": {"box": [0, 0, 5000, 14], "text": 3}}
    assert "rprobe" not in collator([bad, Records()[1]])
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, label_smoothing_factor=0.1, max_steps=1
    )
    follow(Trainer(model, arguments, train_dataset=Records(), data_collator=collator))  # remove_unused_columns as well
