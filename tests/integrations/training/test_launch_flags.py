"""`Flags` bound in gin reach LLaVA's unmodified train.py, alone or beside a patch; seeds."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava_patch import SkipLinks
from llava_patch.core.errors import SettingError
from llava_patch.integrations.training import script_flags
from llava_patch.settings import active
from llava_patch.settings import gin_config as config
from tests.support.tiny_train import TRAIN, arguments, losses, make_data, ok, run


def test_arguments_and_the_line_that_reports_them():
    values = config.launch_flags(lora_enable=True, learning_rate=2e-4, freeze=[1, 2], name="a b")
    added = script_flags.arguments(values)
    assert added == ["--lora_enable", "True", "--learning_rate", "0.0002", "--freeze", "1", "2", "--name"] + ["a b"]
    line = script_flags.describe(["--learning_rate=1", "--lora-enable", "--bf16", "True", "--freeze", "3", "4"], added)
    assert line.startswith("llava_patch: flags from gin: --lora_enable True --learning_rate 0.0002 ")
    assert line.endswith("(instead of the script's --learning_rate 1 --freeze 3 4)")
    assert "\n" not in line and "instead" not in script_flags.describe(["--bf16", "True"], added)


def test_flags_alone_are_a_configuration_and_in_the_operative_one(tmp_path):
    read = config.read([], ["Flags.lora_r = 16", "Flags.optim = 'adamw_torch'"])
    assert read and not read.patches and read.flags == {"lora_r": 16, "optim": "adamw_torch"}
    (tmp_path / "again.gin").write_text(read.operative)
    assert config.read([str(tmp_path / "again.gin")], []).flags == read.flags


@pytest.mark.parametrize("value", ["{}", "()", "[{}]"])
def test_values_that_no_command_line_holds(value):
    with pytest.raises(SettingError, match=r"^Flags.lora_r = .*do not bind it, or bind None$"):
        config.read([], [f"Flags.lora_r = {value}"])


def test_none_takes_an_included_binding_back():
    assert config.read(["paper_stage2.gin"], []).flags["deepspeed"] == "./scripts/zero3.json"
    assert "deepspeed" not in config.read(["paper_stage2.gin"], ["Flags.deepspeed = None"]).flags


def test_flags_cannot_bring_gin_files():
    with pytest.raises(SettingError, match=r"Flags.gin_file: .*include"):
        config.read([], ["Flags.gin_file = 'a.gin'"])


def test_outside_training_flags_are_named_as_without_effect(monkeypatch, capsys):
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Flags.lora_r = 16; SkipLinks.stride = 4")
    assert active.configuration().fusion == SkipLinks(stride=4)
    active.configuration()
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "llava_patch: Flags.lora_r: flags of LLaVA's training script, without effect here"
    ]


def test_a_sweep_is_not_a_training_configuration(monkeypatch):
    monkeypatch.setenv("LLAVA_PATCH_GIN_FILE", "sweep_split_7b.gin")
    with pytest.raises(SettingError, match=r"describes a sweep: run it with `llava-patch sweep`"):
        active.configuration()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("flags"))


def _lora(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.timeout(600)
def test_lora_by_gin_alone_and_its_seeds(data, tmp_path):
    def train(name, seed):
        bindings = ["Flags.lora_r = 4", f"Flags.seed = {seed}", "Flags.evaluation_strategy = 'no'"]  # an old name
        params = [word for binding in bindings for word in ("--gin_param", binding)]
        out = tmp_path / name
        command = [TRAIN, *arguments(data, 2, out, steps=2, seed=7), "--gin_file", "lora_r16_7b.gin", *params]
        return ok(run(command)), out

    text, first = train("llava-lora-a", 1)
    lines = [line for line in text.splitlines() if line.startswith("llava_patch: flags from gin")]
    assert len(lines) == 1
    assert "--lora_enable True --lora_r 4 --lora_alpha 32 --learning_rate 0.0002" in lines[0]
    assert "--eval_strategy no" in lines[0]
    assert lines[0].endswith("(instead of the script's --learning_rate 0.001 --seed 7)")
    adapter = json.loads((first / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 32)
    assert "Flags.lora_r = 4" in (first / "llava_patch_operative.gin").read_text()
    assert not (first / "llava_patch.json").exists()  # flags alone: no patch

    # LoRA's matrices are made before LLaVA's Trainer seeds anything; they add nothing yet, so that the first losses
    # differ by the order of the data alone.
    again, another = train("llava-lora-b", 1)[1], train("llava-lora-c", 2)[1]
    assert losses(first) == losses(again) and losses(first)[0] != losses(another)[0]
    weights, same, other = _lora(first), _lora(again), _lora(another)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    start = next(name for name in weights if "lora_A" in name)
    assert not torch.allclose(weights[start], other[start], atol=1e-2)


@pytest.mark.timeout(300)
def test_the_seed_decides_the_data_order_under_a_patch(data, tmp_path):
    """The side branch starts as a copy, so only the order of the data can make the first losses differ."""

    def first_loss(name, seed):
        out = tmp_path / name
        ok(run([TRAIN, *arguments(data, 2, out, steps=1, seed=seed), "--gin_param", "Routing.split = 3"]))
        return losses(out)[0]

    assert first_loss("llava-a", 1) != first_loss("llava-b", 2)


@pytest.mark.timeout(300)
def test_an_unknown_flag_stops_before_anything_is_written(data, tmp_path):
    done = run([TRAIN, *arguments(data, 2, tmp_path / "out", steps=1), "--gin_param", "Flags.lora_rr = 16"])
    assert done.returncode != 0
    assert "Flags.lora_rr: the training script has no flag --lora_rr; did you mean Flags.lora_r?" in done.stderr
    assert not (tmp_path / "out").exists()
