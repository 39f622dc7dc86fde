"""Trainers that know nothing of llava_patch, transformers' and TRL's, on HF: patch, train, go on and open again."""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from transformers.trainer import load_sharded_checkpoint

from llava_patch import Routing, SkipLinks, get_handle, patch
from llava_patch.core.errors import CheckpointError, HostError, SettingError
from llava_patch.settings import active
from tests.support import hf_train
from tests.support.hf_train import losses
from tests.support.models import hf_model, hf_next_model, needs_hf
from tests.support.paths import ROOT

ROUTING = "Routing.split = 4"
METHODS = {"routing": ROUTING, "skiplinks": "SkipLinks.train_tower = 'all'; SkipLinks.tower_lr = 0.001"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    needs_hf()
    return hf_train.write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture
def configured(monkeypatch):
    """Ask for something as the environment does; "" for nothing."""

    def ask(bindings):
        monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", bindings)
        active.reset()

    return ask


def _open(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)


def _same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [hf_model, hf_next_model])
def test_a_patched_model_takes_the_names_that_it_is_saved_under(make, tmp_path):
    model = make()
    handle = patch(model, fusion=SkipLinks(stride=2), routing=Routing(split=3, freeze="none"))
    model.save_pretrained(tmp_path, max_shard_size=sum(p.nbytes for p in model.parameters()) // 2)
    other = make()
    taken_off = patch(other, fusion=SkipLinks(stride=2), routing=Routing(split=3, freeze="none"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_sharded_checkpoint(other, str(tmp_path), strict=False)  # as a Trainer does
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and _same(model, other)
    other.load_state_dict(model.state_dict())  # and its own
    taken_off.remove()
    handle.remove()
    assert not other._load_state_dict_pre_hooks


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_a_run_trains_what_it_should_goes_on_and_opens_again(
    kind, method, data, configured, tmp_path, capsys, record_property
):
    configured(METHODS[method])
    run = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
           "load_best_model_at_end": True, "greater_is_better": True,  # so not the last
           "metric_for_best_model": "eval_loss"}  # fmt: skip
    whole = hf_train.trainer(kind, data, tmp_path / "whole", **run)
    whole.train()
    assert len(losses(whole)) == hf_train.STEPS
    assert "parameters train" in capsys.readouterr().out
    first, last = tmp_path / "whole" / "checkpoint-2", tmp_path / "whole" / "checkpoint-4"
    assert whole.state.best_model_checkpoint == str(first)
    own = get_handle(whole.model)

    again = hf_train.trainer(kind, data, tmp_path / "again", **run)
    again.train(resume_from_checkpoint=str(first))
    record_property("figure", f"{kind}, {method}: losses {losses(whole)}, gone on after step 2 {losses(again)}")
    assert losses(again) == losses(whole)
    ended, here = (load_file(folder / "model.safetensors") for folder in (last, tmp_path / "again" / "checkpoint-4"))
    assert ended.keys() == here.keys() and all(torch.equal(tensor, here[name]) for name, tensor in ended.items())

    before = load_file(data[1] / "model.safetensors")
    changed = {n for n, tensor in ended.items() if n not in before or not torch.equal(tensor, before[n].float())}
    if method == "routing":
        assert changed == {name for name in ended if ".side_branch." in name}
    else:
        assert any("vision_tower" in name for name in changed) and any("language_model" in name for name in changed)
        assert {group["initial_lr"] for group in whole.optimizer.param_groups} == {1e-2, 1e-3}

    whole.save_model(tmp_path / "saved")
    for asked in (METHODS[method], ""):  # opened by the run's own settings, or by the checkpoint's alone
        configured(asked)
        for folder in (first, tmp_path / "saved"):
            model = _open(folder)
            assert get_handle(model).applied() == own.applied() and _same(model, whole.model)
    if method == "routing":
        assert _same(_open(tmp_path / "whole" / "llava_patch_adapter").float(), whole.model)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_loss(method, data, configured, tmp_path):
    configured(METHODS[method])
    ended = []
    for more in ({}, *({"gradient_checkpointing_kwargs": {"use_reentrant": way}} for way in (True, False))):
        made = hf_train.trainer("transformers", data, tmp_path, gradient_checkpointing=bool(more), max_steps=2, **more)
        made.train()
        ended.append(made)
    assert losses(ended[0]) == losses(ended[1]) == losses(ended[2])
    if method == "routing":  # a tapped block has three readers, whose gradients checkpoints add up in another order
        assert _same(ended[0].model, ended[1].model) and _same(ended[0].model, ended[2].model)


def test_the_model_alone_is_saved_and_opens(data, configured, tmp_path):
    configured(ROUTING)
    made = hf_train.trainer(
        "transformers", data, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True
    )
    made.train()
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    configured("")
    assert _same(_open(tmp_path / "checkpoint-1"), made.model)


def test_a_projector_that_learns_first_does_so_under_any_trainer(data, configured, tmp_path, capsys):
    configured("SkipLinks.unfreeze_after = 0.5")
    made = hf_train.trainer("transformers", data, tmp_path)
    made.train()
    assert "the projector learns alone in 2 of 4 steps" in capsys.readouterr().out


def test_the_documented_script_in_two_processes(data, configured, tmp_path):
    """It names nothing of llava_patch; the start-up hook alone does it."""
    script, root = tmp_path / "sft.py", data[0]
    script.write_text(re.search(r"```python\n(# sft\.py.*?)```", (ROOT / "docs/training.md").read_text(), re.S)[1])
    command = [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *(script, data[1], root / "rows.json", tmp_path / "run"),
        *("--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--max_steps", "2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--save_steps", "1"),
    ]
    environment = {**os.environ, "LLAVA_PATCH_GIN_PARAM": ROUTING, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("parameters train") == 1  # the first process alone says it
    configured(ROUTING)
    one = hf_train.trainer("trl", data, tmp_path / "one", max_steps=2, learning_rate=1e-4)
    one.train()
    logged = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert logged == pytest.approx(losses(one), abs=1e-3)  # twice a half of the batch is another order of sums
    configured("")
    for folder in ("run", "run/checkpoint-1"):
        assert get_handle(_open(tmp_path / folder)).routing == get_handle(one.model).routing


@pytest.mark.parametrize("method, targets", [("routing", ["q_proj", "v_proj"]), ("skiplinks", "all-linear")])
def test_lora_beside_the_patch(method, targets, data, configured, tmp_path):
    peft = pytest.importorskip("peft")
    configured(METHODS[method] + ("; Routing.freeze = 'none'" if method == "routing" else ""))

    def run(out, resume=None):
        lora = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)
        made = hf_train.trainer("trl", data, out, peft_config=lora, save_strategy="steps", save_steps=2)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run(tmp_path / "whole")
    own = get_handle(whole.model)
    trained = {n for n, p in own.model.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trained) and any("lora_" not in name for name in trained)
    assert not any("lora_" in name for name in trained if ".side_branch." in name)
    again = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again) == losses(whole) and _same(again.model, whole.model)

    whole.save_model(tmp_path / "saved")
    batch = next(iter(whole.get_eval_dataloader()))
    with torch.no_grad():
        expected = whole.model.eval()(**batch).logits
    for asked in (os.environ["LLAVA_PATCH_GIN_PARAM"], ""):
        configured(asked)
        for folder in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-4"):
            for model in (_open(folder), peft.PeftModel.from_pretrained(_open(data[1]), folder)):
                assert get_handle(model).applied() == own.applied()
                with torch.no_grad():
                    assert torch.equal(model.eval()(**batch).logits, expected)


@pytest.mark.parametrize("method", [dict(routing=Routing(split=4)), dict(fusion=SkipLinks(stride=2))])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_what_peft_saves_without_a_trainer(way, method, data, tmp_path):
    peft = pytest.importorskip("peft")
    model = _open(data[1])
    handle = patch(model, **method)
    lora = peft.LoraConfig(r=2, target_modules=r".*(language_model.*(q_proj|gate_proj)|projector\.linear_1)")
    if way == "get_peft_model":
        model, adapter = peft.get_peft_model(model, lora, "mine"), "mine"
    else:
        model.add_adapter(lora)
        adapter = ""
    with torch.no_grad():  # as training would
        for number, (name, parameter) in enumerate(handle.model.named_parameters()):
            if "lora_" in name or any(parameter is added for added in handle.added_parameters()):
                torch.manual_seed(number)
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path)
    batch = next(iter(hf_train.trainer("transformers", data, tmp_path / "run").get_eval_dataloader()))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    opened = [_open(tmp_path / adapter)]
    if way == "get_peft_model":
        opened.append(peft.PeftModel.from_pretrained(_open(data[1]), tmp_path / adapter))
    for other in opened:
        assert get_handle(other).applied() == handle.applied()
        with torch.no_grad():
            assert torch.equal(other.eval()(**batch).logits, expected)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_that_misses_what_is_configured_is_not_trained(data, configured, tmp_path):
    configured(ROUTING)
    bare = LlavaForConditionalGeneration(_open(data[1]).config)
    made = hf_train.trainer("transformers", data, tmp_path, model=bare)
    with pytest.raises(
        HostError, match=r"Routing\(.*is configured, but the Trainer got a LlavaForConditionalGeneration"
    ):
        made.train()


def test_a_run_goes_on_with_the_settings_that_it_began_with(data, configured, tmp_path):
    """Also where the optimizer, or its sizes, would not tell."""
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "save_only_model": True}
    for asked in (ROUTING, ""):
        configured(asked)
        hf_train.trainer("transformers", data, tmp_path / (asked or "stock"), **run).train()
    for asked, folder, what in (
        ("Routing.split = 3", ROUTING, r"written with routing = Routing\(.*split=4.*go on with routing = .*split=3"),
        (f"{ROUTING}; Routing.variant = 'kv'", ROUTING, r"variant='lf'.*go on with routing = .*variant='kv'"),
        ("SkipLinks.stride = 2", ROUTING, "written with fusion = None"),
        (ROUTING, "stock", "written with routing = None"),
        ("", ROUTING, "written by a patched model"),
    ):
        configured(asked)
        for resumed in (True, str(tmp_path / folder / "checkpoint-1")):
            made = hf_train.trainer("transformers", data, tmp_path / folder, **{**run, "max_steps": 2})
            with pytest.raises(CheckpointError, match=what):
                made.train(resume_from_checkpoint=resumed)
    configured(f"{ROUTING}; Routing.freeze = 'none'")  # what trains may differ
    made = hf_train.trainer("transformers", data, tmp_path / ROUTING, **{**run, "max_steps": 2})
    made.train(resume_from_checkpoint=True)


def test_a_fusion_that_could_not_learn_is_not_trained(data, configured, tmp_path):
    configured("SkipLinks.stride = 2")
    made = hf_train.trainer("transformers", data, tmp_path)
    made.model.model.multi_modal_projector.requires_grad_(False)  # the script's own
    with pytest.raises(SettingError, match="its new weights are zero and frozen"):
        made.train()
