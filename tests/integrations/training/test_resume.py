"""LLaVA's unmodified train(), broken off and resumed in one process: the losses and weights of a run that was not."""

import inspect
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import gin
from llava_patch import Routing, SkipLinks, patch
from llava_patch.core.errors import CheckpointError
from llava_patch.integrations.training import resume
from llava_patch.integrations.training.resume import FILE
from llava_patch.settings import active
from tests.support import models
from tests.support.models import IMAGE, Host
from tests.support.run_folders import cut
from tests.support.tiny_train import arguments, losses, make_data

BOTH = ("SkipLinks.stride = 2", "Routing.split = 3", 'Routing.freeze = "none"')
TOKENS = {"mm_use_im_patch_token": True, "mm_use_im_start_end": True, "pretrain_mm_mlp_adapter": None}
LORA = {"lora_enable": True, "lora_r": 4, "mm_projector_lr": 2e-3, "learning_rate": 2e-3}
RUNS = {
    "lora, fusion and routing": (BOTH, LORA),
    "lora, DeepStack, the tower": (
        ("DeepStack.start = 1", "DeepStack.interval = 1", "DeepStack.train_tower = 2"),
        LORA,
    ),
    "lora, more tokens": (('DenseConnector.kind = "dci"',), {**LORA, **TOKENS}),
    "stage 1": (("DeepStack.start = 1", "DeepStack.interval = 1"), {"stage": 1, "mm_use_im_patch_token": True}),
    "the side branch": (("Routing.split = 3",), {}),
    "everything": (('SkipLinks.train_tower = "all"', "SkipLinks.unfreeze_after = 0.5"), {}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("train"))


def train(data, out, bindings=BOTH, stage=2, **more):
    """Four steps of LLaVA's own train(), a checkpoint after the second and the fourth."""
    from llava.train.train import train as llavas

    settings = {"save_steps": 2, "save_total_limit": 9, "warmup_ratio": None, "evaluation_strategy": None, **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments(data, stage, out, **{"steps": 4, **settings})])
        patch.setenv("LLAVA_PATCH_GIN_PARAM", ";".join(bindings))
        gin.clear_config()
        active.reset()
        active.begin_training()
        llavas()
    return losses(out)


def tensors(folder):
    """What a checkpoint holds, the optimizer's state included."""
    found = {f"{path.name} {name}": t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return found | {f"{number} {name}": t for number, values in state.items() for name, t in values.items()}


def same(one, other):
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def beside_lora(data, tmp_path_factory):
    """A run beside LoRA that was not broken off."""
    out = tmp_path_factory.mktemp("resume") / "whole"
    train(data, out, **LORA)
    return out


def _resumable(whole, out, *numbers):
    for number in numbers:
        shutil.copytree(whole / f"checkpoint-{number}", out / f"checkpoint-{number}")
    return out


@pytest.mark.parametrize(("bindings", "more"), RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_run_that_was_not_broken_off(data, tmp_path, bindings, more):
    # Nothing seeds what the script draws before there is a Trainer: LoRA's matrices, new tokens' rows.
    expected = train(data, tmp_path / "whole", bindings, **more)
    out = _resumable(tmp_path / "whole", tmp_path / "resumed", 2)
    assert train(data, out, bindings, **more) == expected
    assert same(tmp_path / "whole" / "checkpoint-4", out / "checkpoint-4")


def test_what_was_not_written_to_the_end_is_set_aside(data, beside_lora, tmp_path, caplog):
    out = _resumable(beside_lora, tmp_path / "out", 2, 4)
    state = out / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:99])
    (out / "checkpoint-12").mkdir()
    (out / "checkpoint-12" / "adapter_config.json").write_text("{}")
    assert train(data, out, save_total_limit=1, **LORA) == losses(beside_lora)
    assert f"{out}/checkpoint-12/trainer_state.json: cannot be read (No such file" in caplog.text
    assert f"{out}/checkpoint-4/trainer_state.json: not valid JSON" in caplog.text
    assert f"goes on from {out}/checkpoint-2" in caplog.text
    assert [path.name for path in (out / "unfinished-checkpoint-12").iterdir()] == ["adapter_config.json"]
    assert (out / "unfinished-checkpoint-4" / "trainer_state.json").stat().st_size == 99
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    assert same(beside_lora / "checkpoint-4", out / "checkpoint-4")

    out = tmp_path / "nothing"
    (out / "checkpoint-12").mkdir(parents=True)
    assert len(train(data, out, steps=1, **LORA)) == 1 and "Training begins anew" in caplog.text


def test_what_was_cut_off_is_passed_over_and_by_hand_refused(data, beside_lora, tmp_path, caplog):
    for name in ("optimizer.pt", "rng_state.pth", "adapter_model.safetensors", FILE, "llava_patch.json"):
        out = _resumable(beside_lora, tmp_path / name, 2, 4)
        cut(out / "checkpoint-4" / name)
        with pytest.raises(CheckpointError, match=rf"{name}: .*not written to its end; go on from {out}/checkpoint-2"):
            resume.train(SimpleNamespace(args=SimpleNamespace()), None, str(out / "checkpoint-4"))
    assert train(data, out, **LORA) == losses(beside_lora)  # the last of them
    assert f"{out}/checkpoint-4/llava_patch.json: not valid JSON" in caplog.text
    assert same(beside_lora / "checkpoint-4", out / "checkpoint-4")
    with pytest.raises(CheckpointError, match="checkpoint-9: no such folder"):
        resume.train(SimpleNamespace(args=SimpleNamespace()), None, str(out / "checkpoint-9"))


def test_a_run_that_goes_on_from_its_last_step_takes_no_other(data, beside_lora, tmp_path, caplog):
    out = _resumable(beside_lora, tmp_path / "out", 2, 4)
    assert train(data, out, **LORA) == losses(beside_lora)
    assert "all 4 steps are done" in caplog.text and not (out / "checkpoint-5").exists()
    for name in ("non_lora_trainables.bin",):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (beside_lora, out))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (beside_lora, out))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_that_lacks_what_trained_is_refused(data, beside_lora, tmp_path):
    out = _resumable(beside_lora, tmp_path / "out", 2)
    with pytest.raises(CheckpointError, match=r"written with fusion = SkipLinks\(.* go on with fusion = None"):
        train(data, out, BOTH[1:], **LORA)
    (out / "checkpoint-2" / "llava_patch.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"mm_projector\.0\.weight has shape \(64, 128\) there and \(64, 32\) here"
    ):
        train(data, out, BOTH[1:], **LORA)
    (out / "checkpoint-2" / FILE).unlink()
    with pytest.raises(CheckpointError, match="which peft's and LLaVA's files there do not hold"):
        train(data, out, **LORA)


def test_a_checkpoint_is_whole_or_has_no_state(data, tmp_path, monkeypatch):
    """Killed while it is written: ours is there before the file by which the Trainer knows a checkpoint."""
    from transformers import Trainer

    def killed(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "out", **LORA)
    left = {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()}
    assert FILE in left and "llava_patch.json" in left and "trainer_state.json" not in left


@pytest.mark.parametrize(("stage", "more"), [(2, LORA), (1, {})], ids=["lora", "stage 1"])
def test_the_best_checkpoint_comes_back_whole(data, tmp_path, monkeypatch, stage, more):
    import llava.train.train as script

    if stage == 1 and "metrics" in inspect.signature(Trainer._save_checkpoint).parameters:
        pytest.skip(
            "up to 4.46 the Trainer finds its best checkpoint while it saves one, which LLaVA's stage 1 leaves out"
        )
    make = script.make_supervised_data_module

    def with_evaluation(**given):
        made = make(**given)
        return {**made, "eval_dataset": torch.utils.data.Subset(made["train_dataset"], range(4))}

    monkeypatch.setattr(script, "make_supervised_data_module", with_evaluation)
    # The loss falls, so that the highest one makes the first checkpoint the best.
    when = "eval_strategy" if hasattr(TrainingArguments, "eval_strategy") else "evaluation_strategy"  # up to 4.40
    best = {when: "steps", "eval_steps": 2, "load_best_model_at_end": True, "prediction_loss_only": True,
            "metric_for_best_model": "eval_loss", "greater_is_better": True}  # fmt: skip
    out = tmp_path / "out"
    train(data, out, BOTH[:1], stage=stage, **more, **best)
    first, last = (load_file(out / f"checkpoint-{number}" / FILE) for number in (2, 4))
    name = "mm_projector.bin" if stage == 1 else "non_lora_trainables.bin"
    saved = torch.load(out / name, weights_only=True)
    found = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    assert found.keys() >= first.keys() and not all(torch.equal(first[name], last[name]) for name in first)
    assert all(torch.equal(found[name], first[name]) for name in first)


def _plain_trainer(name, tower, out):
    """A Trainer that knows nothing of the patch under its LoRA, with the projector trained in full by peft."""
    import peft
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    host = Host(name, models.hf_model() if name == "hf" else models.llava_model(tower))
    patch(host.model, fusion=SkipLinks(stride=2))
    options = {"modules_to_save": ["multi_modal_projector" if name == "hf" else "mm_projector"], "lora_dropout": 0.1}
    model = peft.get_peft_model(host.model, peft.LoraConfig(target_modules=r".*layers\.5.*q_proj", **options))
    patch(model, routing=Routing(split=3, freeze="none"))
    samples = [host.batch([(2 + i % 3, IMAGE, 4)], labels=True, seed=i).inputs for i in range(8)]
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 1,
                "report_to": "none", "learning_rate": 1e-2, "use_cpu": True,
                "remove_unused_columns": False}  # fmt: skip
    run = TrainingArguments(str(out), **settings)
    return Trainer(model, run, train_dataset=samples, data_collator=lambda rows: rows[0])


@pytest.mark.parametrize("name", ["hf", "llava"])
def test_any_trainer_goes_on_beside_lora(name, tower_folder, tmp_path):
    models.llava_model(tower_folder)  # the first time it draws a tower, before it draws a model
    whole = _plain_trainer(name, tower_folder, tmp_path / "whole")
    whole.train()
    out = _resumable(tmp_path / "whole", tmp_path / "resumed", 2)
    (out / "checkpoint-3").mkdir()
    resumed = _plain_trainer(name, tower_folder, out)
    resumed.train(resume_from_checkpoint=True)
    found = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, resumed)]
    assert found[0] == found[1] and len(found[0]) == 4
    assert same(tmp_path / "whole" / "checkpoint-4", out / "checkpoint-4")
    assert any("side_branch" in name for name in load_file(out / "checkpoint-4" / FILE))
