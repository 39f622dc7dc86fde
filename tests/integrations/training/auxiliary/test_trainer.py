"""Hugging Face's own Trainer with the auxiliary loss, and what is saved and loaded of it."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from llava_patch import AuxiliaryProbe, SkipLinks, patch
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.integrations.training.auxiliary import RegionCollator, follow
from llava_patch.integrations.training.auxiliary import trainer as head_file
from llava_patch.integrations.training.auxiliary.trainer import check
from tests.support.auxiliary import batch
from tests.support.models import HF_IMAGE_TOKEN, IMAGE, Host, hf_model
from tests.support.probes import processor

from .test_data import Words

WEIGHT = 0.5


class Records(torch.utils.data.Dataset):
    """Pages in few colours, each with a region of the same size."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        page = Image.new("RGB", (56, 56), (40 * (index % 4), 90, 20))
        region = {"box": [0, 0, 40, 14], "text": "some text"}
        return {"text": torch.full((4,), 3 + index), "image": page, "rprobe": region}


def _collate(records):
    ids = torch.stack([torch.cat([torch.full((16,), HF_IMAGE_TOKEN), one["text"]]) for one in records])
    pixels = processor()([one["image"] for one in records], return_tensors="pt")["pixel_values"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
            "labels": ids.masked_fill(ids == HF_IMAGE_TOKEN, -100)}  # fmt: skip


def _trainer(out, probe, **more):
    model = hf_model().train()
    handle = patch(model, probe=probe)
    values = {"per_device_train_batch_size": 4, "max_steps": 12, "logging_steps": 3, "learning_rate": 3e-3,
              "report_to": "none", "use_cpu": True, "remove_unused_columns": False, "save_strategy": "no",
              "gradient_accumulation_steps": 2, "weight_decay": 0.1, **more}  # fmt: skip
    collator = RegionCollator(_collate, handle, processor(), Words())
    trainer = Trainer(model, TrainingArguments(str(out), **values), train_dataset=Records(), data_collator=collator)
    return trainer, handle


def test_a_run_logs_both_losses_learns_and_goes_on(tmp_path):
    trainer, handle = _trainer(tmp_path / "a", AuxiliaryProbe(weight=WEIGHT), save_strategy="steps", save_steps=6)
    follow(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all(
        {"llava_patch/probe/model_loss", "llava_patch/probe/loss"} <= set(entry) for entry in logs
    )
    assert logs[-1]["llava_patch/probe/loss"] < 0.5 * logs[0]["llava_patch/probe/loss"]
    assert logs[-1]["llava_patch/probe/model_loss"] < logs[0]["llava_patch/probe/model_loss"]
    for entry in logs:  # all batches weigh the same here; the Trainer rounds to four places
        assert entry["loss"] == pytest.approx(
            entry["llava_patch/probe/model_loss"] + WEIGHT * entry["llava_patch/probe/loss"], abs=1e-4
        )
    folder = tmp_path / "a" / "checkpoint-6"
    assert not any("rprobe" in name for name in load_file(folder / "model.safetensors"))

    other, again = _trainer(tmp_path / "b", AuxiliaryProbe(weight=WEIGHT), save_strategy="steps", save_steps=6)
    follow(other)
    with torch.no_grad():
        next(again.auxiliary.head.parameters()).add_(1.0)
    here = dict(again.anatomy.model.named_parameters())
    with safe_open(folder / head_file.FILE, framework="pt") as stream:
        fingerprint = json.loads(stream.metadata()["fingerprint"])
    assert fingerprint and set(fingerprint) <= set(here)
    with pytest.raises(CheckpointError, match="made on another base model"):
        head_file.load_head(again, folder)
    other.train(resume_from_checkpoint=str(folder))  # the model's weights too, which the stock Trainer leaves out on HF
    ended, here = handle.anatomy.model.state_dict(), again.anatomy.model.state_dict()
    assert all(torch.equal(tensor, here[name]) for name, tensor in ended.items())
    assert [e["loss"] for e in other.state.log_history if "loss" in e] == [e["loss"] for e in logs]
    head_file.save_head(again, tmp_path / "c", writes=True)
    expected = [p.clone() for p in again.auxiliary.head.parameters()]
    with torch.no_grad():
        for parameter in again.auxiliary.head.parameters():
            parameter.zero_()
    head_file.load_head(again, tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(expected, again.auxiliary.head.parameters(), strict=True))
    (tmp_path / "c" / head_file.FILE).unlink()
    with pytest.raises(CheckpointError, match="without the auxiliary loss's head"):
        head_file.load_head(again, tmp_path / "c")


def test_weight_zero_is_a_run_without_it(tmp_path):
    runs = []
    for probe in (None, AuxiliaryProbe(weight=0.0)):
        model = hf_model().train()
        collator = _plain
        if probe is not None:
            collator = RegionCollator(_collate, patch(model, probe=probe), processor(), Words())
        arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=5, logging_steps=1,
                                      learning_rate=3e-3, report_to="none", use_cpu=True, save_strategy="no",
                                      remove_unused_columns=False, max_grad_norm=0.1)  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Records(), data_collator=collator)
        if probe is not None:
            follow(trainer)
        trainer.train()
        logs = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        runs.append((logs, model.state_dict()))
    assert runs[0][0] == runs[1][0] and all(torch.equal(t, runs[1][1][n]) for n, t in runs[0][1].items())


def _plain(records):
    return _collate([{k: v for k, v in one.items() if k != "rprobe"} for one in records])


def test_what_a_trainer_must_not_do(tmp_path):
    trainer, handle = _trainer(tmp_path, AuxiliaryProbe(), remove_unused_columns=True)
    with pytest.raises(SettingError, match="remove_unused_columns = False"):
        follow(trainer)
    trainer.args.remove_unused_columns = False
    trainer.compute_loss_func = print
    with pytest.raises(SettingError, match="compute_loss_func"):
        follow(trainer)
    trainer.args.label_smoothing_factor = 0.1
    with pytest.raises(SettingError, match="label_smoothing_factor"):
        check(handle, trainer.args)
    trainer.args.label_smoothing_factor = 0.0
    handle.anatomy.projector.requires_grad_(False)
    handle.anatomy.tower.requires_grad_(False)
    with pytest.raises(SettingError, match="neither the projector nor the vision tower trains"):
        check(handle, trainer.args)
    handle.remove()
    with pytest.raises(SettingError, match="has no auxiliary loss"):
        follow(trainer)


def test_peft_before_and_after(tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=".*vision_tower.*")
    model = get_peft_model(hf_model(), lora)
    handle = patch(model, probe=AuxiliaryProbe())
    assert not any("lora" in name for name, _ in handle.auxiliary.head.named_parameters())
    host = Host("hf", handle.model)
    model.train()
    model(**batch(host)).loss.backward()
    assert all(p.grad is not None for p in handle.auxiliary.head.parameters())
    model = hf_model()
    handle = patch(model, probe=AuxiliaryProbe())
    get_peft_model(model, lora)
    handle.anatomy.projector.requires_grad_(True)
    with pytest.raises(SettingError, match=r"patch after get_peft_model\(\)"):
        check(handle, TrainingArguments(str(tmp_path), use_cpu=True))


def test_saved_models_and_adapters_hold_nothing_of_the_head(host, tmp_path):
    from llava_patch.core.records import read_settings

    handle = patch(host.model, fusion=SkipLinks(stride=2), probe=AuxiliaryProbe(weight=0.2))
    host.model.config._name_or_path = "base"
    given = host.batch([(3, IMAGE, 5)]).inputs
    expected = host.model(**given).logits
    handle.save(tmp_path / "adapter")
    assert not any("rprobe" in name for name in load_file(tmp_path / "adapter" / "llava_patch.safetensors"))
    record = read_settings(tmp_path / "adapter")
    assert record["probe"] == {**record["probe"], "method": "AuxiliaryProbe", "weight": 0.2}
    assert not any("rprobe" in name for name in record["fingerprint"])
    handle.save(tmp_path / "full", form="full")
    assert not any("rprobe" in name for name in load_file(tmp_path / "full" / "model.safetensors"))
    config = json.loads((tmp_path / "full" / "config.json").read_text())["llava_patch"]
    assert config["fusion"] and "probe" not in config
    if host.name == "hf":
        from llava_patch import get_handle

        model = type(host.model).from_pretrained(tmp_path / "full")
        assert get_handle(model).probe is None and torch.equal(model(**given).logits, expected)


def test_a_training_recipe_at_evaluation_and_in_inspect(tmp_path, monkeypatch, capsys):
    """Gin files of a training run are reused for evaluation, where the loss has no place."""
    from typer.testing import CliRunner

    from llava_patch import get_handle
    from llava_patch.cli.main import app
    from llava_patch.integrations import loading

    hf_model().save_pretrained(tmp_path / "stock")
    loading._say_once.cache_clear()
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "AuxiliaryProbe.weight = 0.3")
    doctor = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"}).output
    assert "AuxiliaryProbe" in doctor  # its settings may be broken over several lines
    model = type(hf_model()).from_pretrained(tmp_path / "stock")
    assert get_handle(model) is None
    assert capsys.readouterr().err.count("AuxiliaryProbe is a training loss, without effect here") == 1

    record = {"format": 1, "fusion": None, "routing": None, "pruning": None, "form": "full",
              "probe": {"method": "AuxiliaryProbe", "weight": 0.3}}  # fmt: skip
    (tmp_path / "stock" / "llava_patch.json").write_text(json.dumps(record))
    text = CliRunner().invoke(app, ["inspect", str(tmp_path / "stock")], env={"COLUMNS": "300"}).output
    assert "probe: AuxiliaryProbe" in text and re.search(r"weight\W+0\.3\b", text)
    assert get_handle(type(hf_model()).from_pretrained(tmp_path / "stock")) is None
