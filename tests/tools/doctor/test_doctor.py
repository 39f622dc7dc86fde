"""Every advice of the doctor can be provoked, and what is in order gives none."""

import importlib.util
import json
import sys
import types
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llava_patch import Routing, SkipLinks, patch
from llava_patch.cli import main as cli
from llava_patch.cli.main import app
from llava_patch.core import memory
from llava_patch.core.paths import locks_dir
from llava_patch.hosts import compat
from llava_patch.integrations import import_hook as autostart
from llava_patch.tools.doctor import NOTE, OK, PROBLEM, Row, configured, machine, software
from llava_patch.tools.doctor import examine as examine_module
from llava_patch.tools.doctor.examine import examine, summary

HOOK = Row("start-up hook", "on")


def _row(rows, what):
    found = [row for row in rows if row.what == what]
    assert len(found) == 1, [row.what for row in rows]
    return found[0]


@pytest.fixture
def no_imports(monkeypatch):
    """Leave out what takes seconds, and `test_all_is_well_here` tries for real."""
    monkeypatch.setattr(software, "start_imports", dict)


def _run(*arguments, **environment):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "300", **environment})


# --- packages and hosts -----------------------------------------------------------------------------------------------


def test_all_is_well_here():
    rows = examine()
    assert not [row for row in rows if row.state == PROBLEM]
    assert len({row.what for row in rows}) == len(rows)
    assert _row(rows, "supported versions").found == "yes"
    assert _row(rows, "start-up hook").state == OK
    assert _row(rows, "imports: training").found == _row(rows, "imports: lmms-eval").found == "all there"


@pytest.mark.parametrize(
    "name, there, state, advice",
    [
        ("transformers", "4.36.2", PROBLEM, "pip install 'transformers"),
        ("gin-config", None, PROBLEM, "pip install 'gin-config"),
        ("peft", "0.3.0", NOTE, "supported is"),
        ("deepspeed", None, OK, "several GPUs only"),
        ("lmms-eval", "0.3.1", NOTE, "0.7 only"),
        ("filelock", "4.3.1", PROBLEM, "pip install 'filelock<4.3"),  # lmms-eval is here
        ("matplotlib", None, OK, "llava_patch[figures] only"),
    ],
)
def test_packages(monkeypatch, name, there, state, advice):
    real = software.installed
    monkeypatch.setattr(software, "installed", lambda wanted: there if wanted == name else real(wanted))
    row = _row(software.check_packages(), name)
    assert row.state == state and advice in row.advice


def test_run_from_source(monkeypatch):
    def not_installed(name):
        raise software.PackageNotFoundError(name)

    monkeypatch.setattr(software, "requires", not_installed)
    assert _row(software.check_packages(), "llava_patch").state == NOTE


def test_a_torchvision_of_another_torch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(software.importlib, "import_module", broken)
    row = software.check_torchvision()
    assert row.state == PROBLEM and "torchvision::nms" in row.found and "pip uninstall torchvision" in row.advice


def test_llava_as_wheel_checkout_or_broken(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    places = [str(tmp_path / "site-packages" / "llava")]
    spec = types.SimpleNamespace(submodule_search_locations=places, origin=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llava" else real(name))
    assert "a wheel" in _row(software.check_hosts(), "host llava").found
    (tmp_path / ".git").mkdir()
    places[:] = [str(tmp_path / "llava")]
    assert f"the git checkout {tmp_path}" in _row(software.check_hosts(), "host llava").found
    monkeypatch.setattr(software, "_import", lambda module, name: ImportError(f"no {name}"))
    rows = software.check_hosts()
    assert [row.state for row in rows] == [PROBLEM, PROBLEM] and "no LlavaLlama" in rows[1].found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _row(software.check_hosts(), "host llava").found == "not installed"


def test_a_llava_with_towers_of_its_own(monkeypatch):
    assert _row(software.check_hosts(), "host llava").state == OK
    monkeypatch.setattr(
        compat, "brings_towers", lambda builder: builder.__name__.endswith("multimodal_encoder.builder")
    )
    row = _row(software.check_hosts(), "host llava")
    assert row.state == NOTE and "vision towers of its own" in row.found and "its CLIP and its SigLIP" in row.advice


def test_in_llavas_own_environment_every_version_is_within_the_bounds(monkeypatch):
    pinned = software.read_lock(locks_dir() / "llava_pinned.txt")
    monkeypatch.setattr(software, "installed", lambda name: pinned.get(name))
    there = [row for row in software.check_packages() if row.what in pinned]
    # The demo's gradio is an extra that an environment for LLaVA's training has at another version.
    assert len(there) > 10 and {row.state for row in there if row.what != "gradio"} == {OK}
    (row,) = software.check_measured()
    assert row.state == OK and "llava_pinned.txt" in row.found


def test_a_transformers_whose_own_classes_are_refused(monkeypatch):
    real = software._import
    monkeypatch.setattr(
        software, "_import", lambda module, name: AttributeError(name) if name == "LlavaModel" else real(module, name)
    )
    row = _row(software.check_hosts(), "host hf")
    assert row.state == NOTE and "4.52 or newer" in row.advice


def test_versions_that_are_not_supported(monkeypatch):
    assert examine_module._supported().state == OK
    monkeypatch.setattr(compat, "unsupported", lambda: "transformers 4.36.2 is outside the supported range")
    row = examine_module._supported()
    assert row.state == PROBLEM and "outside the supported range" in row.advice
    monkeypatch.setattr(software.autostart, "disabled", lambda: False)
    monkeypatch.setattr(software, "installed", lambda name: None)
    assert "fails" in _row(software.check_attention(), "train_mem.py").found  # nothing falls back to sdpa there


def test_a_torch_that_cannot_be_imported(monkeypatch, capsys):
    real = software._import

    def broken(module, name):
        return OSError("libcudart.so.12: cannot open") if module == "torch" else real(module, name)

    monkeypatch.setattr(software, "_import", broken)
    rows = examine()
    assert rows[-1].what == "torch: import" and rows[-1].state == PROBLEM and "libcudart" in rows[-1].found
    assert _row(rows, "python")
    monkeypatch.setattr(sys, "argv", ["llava-patch", "gin-files", "dpvr_lf_7b"])

    def fails(*arguments, **options):
        raise OSError("libcudart.so.12: cannot open")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "llava-patch: torch cannot be imported (OSError: libcudart" in capsys.readouterr().err
    monkeypatch.setattr(software, "_import", real)
    with pytest.raises(SystemExit, match="1"):  # torch is fine: it was something else
        cli.main()
    assert "unexpected OSError: libcudart" in capsys.readouterr().err


def test_filelock_matters_to_lmms_eval_alone(monkeypatch):
    there = {"filelock": "4.3.1"}
    monkeypatch.setattr(software, "installed", lambda name: there.get(name))
    assert _row(software.check_packages(), "filelock").state == OK


@pytest.mark.parametrize(
    "flash, capability, disabled, state, gets, advice",
    [
        (None, None, False, OK, "sdpa", "nothing to do"),
        (None, None, True, NOTE, "fails", "LLAVA_PATCH_DISABLE"),
        ("works", None, False, NOTE, "needs a GPU", "train.py"),
        ("works", (7, 5), False, NOTE, "fails on this GPU", "train.py"),
        ("works", (8, 0), False, OK, "flash_attention_2", ""),
        ("broken", (9, 0), False, NOTE, "fails", "train.py"),
    ],
)
def test_attention(monkeypatch, flash, capability, disabled, state, gets, advice):
    real = importlib.util.find_spec
    there = lambda name: (object() if flash else None) if name == "flash_attn" else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", there)
    monkeypatch.setattr(software, "_import", lambda *_: ImportError("undefined symbol") if flash == "broken" else print)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(autostart, "disabled", lambda: disabled)
    rows = software.check_attention()
    row = _row(rows, "train_mem.py")
    assert row.state == state and gets in row.found and advice in row.advice
    assert (_row(rows, "flash attention").state == PROBLEM) == (flash == "broken")


def test_a_missing_hook(monkeypatch, tmp_path):
    bare = tmp_path / "python"  # an interpreter without site: .pth files do not run
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    row = software.check_hook()
    assert row.state == NOTE and row.found.startswith("missing")
    asked, _ = configured.read([], ["Routing.split = 3"])
    ignored = _row(configured.check_ignored(asked, row, {}), "ignored: all bindings without the hook")
    assert ignored.state == PROBLEM and "Routing.split = 3" in ignored.found


# --- configuration ----------------------------------------------------------------------------------------------------


def test_what_is_configured(monkeypatch):
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Routing.split = 7; Flags.lora_r = 16; Saturation.max_samples = 8")
    asked, error = configured.read([], ["SkipLinks.stride = 3"])
    rows = configured.check_configured(asked, error) + configured.check_ignored(asked, HOOK, {})
    assert "split=7" in _row(rows, "would patch: routing").found
    assert "stride=3" in _row(rows, "would patch: fusion").found
    assert "--lora_r 16" in _row(rows, "training flags").found and _row(rows, "training flags").state == NOTE
    row = _row(rows, "measurement: Saturation")
    assert row.state == NOTE and "max_samples=8" in row.found and "saturation" in row.advice


def test_a_fusion_that_would_stay_at_zero():
    asked, error = configured.read([], ["SkipLinks.stride = 6", "Routing.split = 18"])
    row = _row(configured.check_configured(asked, error), "does nothing yet: SkipLinks")
    assert row.state == NOTE and "Routing.freeze = 'none'" in row.advice
    asked, error = configured.read([], ["SkipLinks.stride = 6", "Routing.split = 18", "Routing.freeze = 'none'"])
    assert not [r for r in configured.check_configured(asked, error) if r.what.startswith("does nothing")]


def test_every_measurement_has_a_reader():
    from llava_patch.settings.gin_config import MEASUREMENTS

    assert set(configured.readers()) == set(MEASUREMENTS)


def test_a_measurement_that_the_split_reads():
    asked, _ = configured.read([], ["Routing.split = 'auto'", "Saturation.max_samples = 8"])
    assert _row(configured.check_ignored(asked, HOOK, {}), "measurement: Saturation").state == OK


def test_the_auxiliary_loss_outside_training():
    asked, _ = configured.read([], ["AuxiliaryProbe.weight = 0.1"])
    row = _row(configured.check_ignored(asked, HOOK, {}), "ignored outside training: AuxiliaryProbe")
    assert row.state == NOTE and "training loss" in row.advice


def test_what_is_ignored():
    rows = configured.check_ignored(None, HOOK, {"LLAVA_PATCH_GIN_PARAMS": "x", "LLAVA_PATCH_DISABLE": "yes"})
    assert "did you mean LLAVA_PATCH_GIN_PARAM?" in _row(rows, "ignored: LLAVA_PATCH_GIN_PARAMS").advice
    assert "only 1" in _row(rows, "ignored: LLAVA_PATCH_DISABLE").advice
    assert configured.check_ignored(None, HOOK, {"LLAVA_PATCH_DISABLE": "1", "OTHER": "x"}) == []


def test_disabled_with_bindings(monkeypatch):
    monkeypatch.setenv("LLAVA_PATCH_DISABLE", "1")
    asked, _ = configured.read([], ["Routing.split = 3"])
    row = _row(configured.check_ignored(asked, software.check_hook(), {}), "ignored: all bindings")
    assert row.state == NOTE and "unset it" in row.advice


def test_other_nodes(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    hosts = tmp_path / "hostfile"
    hosts.write_text("# nodes\nnode1 slots=8\nnode2 slots=8\n")
    environment = {"LLAVA_PATCH_GIN_FILE": "a.gin", "DLTS_HOSTFILE": str(hosts)}
    what = "other nodes: LLAVA_PATCH_GIN_FILE"
    row = _row(configured.check_deepspeed(environment), what)
    assert row.state == NOTE and "2 nodes" in row.found and "LLAVA_PATCH_GIN_FILE=a.gin" in row.advice
    (tmp_path / ".deepspeed_env").write_text("LLAVA_PATCH_GIN_FILE=b.gin\n")
    assert "another value: b.gin" in _row(configured.check_deepspeed(environment), what).found
    (tmp_path / ".deepspeed_env").write_text('LLAVA_PATCH_GIN_FILE="a.gin"\n')
    assert _row(configured.check_deepspeed(environment), what).state == OK
    assert configured.check_deepspeed({}) == []


# --- machine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, bf16, gigabytes, state, advice, fits",
    [
        ((8, 0), True, 80, OK, "--bf16 True", True), ((7, 5), False, 15, NOTE, "--fp16 True", False),
        ((6, 1), False, 24, NOTE, "slow in half precision", True),
    ],
)  # fmt: skip
def test_gpus(monkeypatch, capability, bf16, gigabytes, state, advice, fits):
    about = types.SimpleNamespace(
        name="A GPU", total_memory=gigabytes * 10**9, major=capability[0], minor=capability[1]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    rows = machine.check_device()
    assert f"{gigabytes} GB, compute capability {capability[0]}.{capability[1]}" in _row(rows, "GPU").found
    assert (_row(rows, "GPU").state == OK) == fits and _row(rows, "GPU 1")
    precision = _row(rows, "precision")
    assert precision.state == state and advice in precision.advice


@pytest.mark.parametrize(
    "gigabytes, state, advice", [(8, NOTE, "needs about 14"), (24, NOTE, "not in float32"), (64, OK, "float32 too")]
)
def test_memory_for_7b(monkeypatch, gigabytes, state, advice):
    monkeypatch.setattr(memory, "machine_memory", lambda: gigabytes * 10**9)
    row = _row(machine.check_memory(), "memory")
    assert row.state == state and advice in row.advice


def test_idle_cores(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(16)))
    assert "OMP_NUM_THREADS" in _row(machine.check_memory(), "CPU").advice


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path / "cache"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(0, 0, 2 * 10**9))
    assert "little room" in machine.check_disk().advice
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert "cannot be written" in machine.check_disk().advice


# --- checkpoint -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    from tests.support import models

    folder = tmp_path_factory.mktemp("doctor")
    models.hf_model().save_pretrained(folder / "base")
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "base")
    return patch(model, fusion=SkipLinks(stride=2), routing=Routing(split=2)).save(folder / "adapter")


def test_what_a_load_would_patch(no_imports, adapter):
    rows = examine(str(adapter))
    assert "hf: an adapter" in _row(rows, "checkpoint").found
    assert "split=2" in _row(rows, "load would patch: routing").found
    assert not [row for row in rows if row.state == PROBLEM]
    rows = examine(str(adapter), gin_param=["Routing.split = 3"])
    assert _row(rows, "load would refuse: routing").state == PROBLEM
    stock = str(Path(adapter).parent / "base")
    rows = examine(stock, gin_param=["Routing.split = 3"])
    assert "split=3" in _row(rows, "load would patch: routing").found
    assert _row(examine(stock), "load would patch").found.startswith("nothing")


def test_checkpoints_that_cannot_work(no_imports, adapter, tmp_path, monkeypatch):
    assert _row(examine(str(tmp_path)), "checkpoint").state == PROBLEM
    import shutil

    lost = tmp_path / "lost"
    shutil.copytree(adapter, lost)
    record = json.loads((lost / "llava_patch.json").read_text())
    (lost / "llava_patch.json").write_text(json.dumps({**record, "base": "/nowhere/base"}))
    row = _row(examine(str(lost)), "checkpoint: base")
    assert row.state == PROBLEM and '"base"' in row.advice
    hosts = {"hf": Row("host hf", "cannot be imported", PROBLEM, "reinstall transformers")}
    assert _row(examine_module.check_checkpoint(str(adapter), None, hosts), "checkpoint: host").state == PROBLEM
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    assert "does not fit" in _row(examine_module.check_checkpoint(str(adapter), None, {}), "checkpoint: memory").advice


def _gemma(folder):
    from transformers import Gemma2Config, LlavaConfig, LlavaForConditionalGeneration

    from tests.support import models

    text = Gemma2Config(**{**models.TEXT, "num_key_value_heads": 2, "head_dim": 16})
    config = LlavaConfig(vision_config=models.vision_config(), text_config=text, image_token_index=95)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def test_a_decoder_that_would_be_refused(adapter, tmp_path, no_imports):
    gemma = _gemma(tmp_path / "gemma")
    row = _row(examine(gemma), "checkpoint: patching it")
    assert row.state == NOTE and "Gemma2Model" in row.found and "stock model" in row.advice
    row = _row(examine(gemma, gin_param=["Routing.split = 3"]), "checkpoint: patching it")
    assert row.state == PROBLEM and "Gemma2Model" in row.found
    assert _row(examine(gemma, gin_param=["SkipLinks.stride = 2"]), "checkpoint: patching it").state == OK
    stock = str(Path(adapter).parent / "base")
    assert "LlamaModel: works" in _row(examine(stock), "checkpoint: patching it").found
    row = _row(examine(stock, gin_param=["Routing.split = 77"]), "checkpoint: patching it")
    assert row.state == PROBLEM and "Routing.split = 77" in row.found
    assert _row(examine(stock, gin_param=["Routing.split = 'auto'"]), "checkpoint: patching it").state == OK


def test_a_model_that_is_no_host(tmp_path, no_imports):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next_video", "text_config": {}}))
    row = _row(examine(str(tmp_path)), "checkpoint")
    assert row.state == PROBLEM and "llava_next_video" in row.advice


# --- the command ------------------------------------------------------------------------------------------------------


def test_exit_codes_and_screen(no_imports, monkeypatch):
    done = _run()
    assert done.exit_code == 0 and "start-up hook" in done.output and version("transformers") in done.output
    done = _run("--gin-file", "missing.gin")
    assert done.exit_code == 1 and "missing.gin" in done.output and "1 problem" in done.output


def test_json_is_stable(no_imports):
    done = _run("--json", "--gin-param", "Routing.split = 7")
    values = json.loads(done.output)
    assert values["format"] == 1 and values["problems"] == 0
    assert all(set(row) == {"what", "found", "state", "advice"} for row in values["rows"])
    assert {row["state"] for row in values["rows"]} <= {"ok", "note", "problem"}
    names = [row["what"] for row in values["rows"]]
    always = {
        "python", "torch", "transformers", "supported versions", "torchvision", "host hf", "host llava", "attention",
        "train_mem.py", "start-up hook", "configured", "would patch: routing", "GPU", "precision", "CPU", "cache",
    }  # fmt: skip
    assert always <= set(names)
    again = json.loads(_run("--json", "--gin-param", "Routing.split = 7").output)
    assert [row["what"] for row in again["rows"]] == names


def test_the_outcome_in_a_line():
    assert summary([Row("a", "b")]) == "all well"
    assert "1 to note" in summary([Row("a", "b", NOTE)])
    assert "2 problems" in summary([Row("a", "b", PROBLEM)] * 2)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("config.json", "[]", "config.json"), ("config.json", "{", "config.json"),
        ("model.safetensors", "x", "model.safetensors"),
        ("model.safetensors.index.json", "{}", "weight_map is missing"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_a_row_that_names_the_file(name, content, says, tmp_path):
    values = {"model_type": "llava", "text_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / name).write_text(content)
    (row,) = examine_module.check_checkpoint(str(tmp_path), None, {})
    assert row.state == PROBLEM and says in row.advice


def test_a_checkpoint_that_is_not_there_is_a_row_that_says_what_to_do(tmp_path):
    (row,) = examine_module.check_checkpoint(str(tmp_path / "nosuch"), None, {})
    assert row.state == PROBLEM and "no such folder" in row.advice
    (row,) = examine_module.check_checkpoint("nosuch/model", None, {})
    assert row.state == PROBLEM and "hf download nosuch/model" in row.advice
