"""DDP, DeepSpeed ZeRO, FSDP and FSDP2 train a patched model as one process does, on both hosts; what they cannot."""

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava_patch import DeepStack, Routing, SkipLinks, patch
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.hosts import zero
from llava_patch.integrations.training import engine as engines
from llava_patch.integrations.training import llava as llava_trainer
from tests.support.models import LAYERS
from tests.support.paths import LAUNCHERS, ROOT

pytest.importorskip("deepspeed")

# Every method on every kind of engine, on one of the hosts; on `llava` one rank often has no image.
JOBS = [
    "llava:zero3:kv", "llava:fsdp:kv", "llava:fsdp2:kv",
    "llava:zero3:lf_fastv", "llava:fsdp2_checkpoints:lf_fastv",
    "hf:fsdp_checkpoints:lf", "hf:fsdp_flat:lf", "hf:fsdp:skip", "hf:fsdp2:skip", "hf:zero3_offload:deep_kv",
]  # fmt: skip
RUNS = ("llava-kv", "llava-lf_fastv", "hf-lf", "hf-skip", "hf-deep_kv")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder where every job has run, one after the other; pytest's workers share it."""
    if importlib.util.find_spec("torch.distributed.fsdp._flat_param") is None:
        pytest.skip("the CPU's stand-ins are for FSDP of newer torch")
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "engines"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _run_all(folder)
            (folder / "done").touch()
    return folder


def _run_all(folder):
    ones = [run.replace("-", ":one:") for run in RUNS]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(LAUNCHERS / "engines.py"), str(folder), *ones, *JOBS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def _result(folder):
    found = json.loads((folder / "result.json").read_text())
    logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("rank*.log"))
    assert "losses" in found, f"{found}\n{logs}"
    return found["losses"], torch.load(folder / "weights.pt")


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_train_what_one_process_trains(root, job):
    host, _, method = job.split(":")
    losses, weights = _result(root / job.replace(":", "-"))
    expected_losses, expected = _result(root / f"{host}-one-{method}")
    assert losses == pytest.approx(expected_losses, abs=2e-4)  # some versions log four digits
    assert weights.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(weights[name], tensor, rtol=0, atol=1e-6), name  # sums in another order; measured 1.2e-7


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("job", [job for job in JOBS if "fsdp" in job])
def test_an_adapter_saved_under_fsdp_is_whole(root, job):
    """Under the model's own names, whatever FSDP and checkpointing wrap."""
    folder = root / job.replace(":", "-")
    _, weights = _result(folder)
    adapter = load_file(folder / "adapter" / "llava_patch.safetensors")
    assert adapter and all(torch.equal(tensor, weights[name]) for name, tensor in adapter.items())
    record = json.loads((folder / "adapter" / "llava_patch.json").read_text())
    assert not any("wrapped" in name for name in record["fingerprint"])
    if job.endswith(":lf"):
        assert len(record["fingerprint"]) > 40  # matrices of the base, two-dimensional again


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "lora": ({}, "peft's and LLaVA's files would get the first rank's part"),
    "stage 1": ({"tune_mm_mlp_adapter": True}, "FSDP in stage 1.*in parts: use DDP or"),
    "LLaVA-NeXT's": ({"mm_tunable_parts": "mm_mlp_adapter"}, "FSDP in stage 1.*in parts: use DDP or"),
    "unfreeze_after": ({}, "SkipLinks.unfreeze_after holds gradients back"),
    "flat": ({}, "SkipLinks.tower_lr needs optimizer groups.*use_orig_params to true"),
    "sequence": ({"parallelism_config": SimpleNamespace(cp_size=2)}, "parallelism_config.cp_size: ranks that share"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("by", ["--fsdp", "accelerate"])
def test_what_an_engine_cannot_do_is_refused_by_name(host, case, by, monkeypatch):
    given, message = REFUSED[case]
    fusion = {"unfreeze_after": SkipLinks(stride=2, unfreeze_after=0.1),
              "flat": SkipLinks(stride=2, train_tower="all", tower_lr=1e-3)}.get(case)  # fmt: skip
    handle = patch(host.model, fusion=fusion, routing=Routing(split=LAYERS - 1, freeze="none"))
    llava_trainer.check_run(handle, SimpleNamespace(**{k: v for k, v in given.items() if k == "tune_mm_mlp_adapter"}))
    if case == "lora":
        peft = pytest.importorskip("peft")
        peft.get_peft_model(host.model, peft.LoraConfig(target_modules=r".*layers\.0\.self_attn\.q_proj"))
    if by == "accelerate":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if case == "flat":
        monkeypatch.setenv("FSDP_USE_ORIG_PARAMS", "false")
    arguments = SimpleNamespace(**given, fsdp="full_shard auto_wrap" if by == "--fsdp" else [])
    with pytest.raises(SettingError, match=message):
        llava_trainer.check_run(handle, arguments)


def test_a_tower_outside_the_model_does_not_train(host):
    """LLaVA's script puts it there for --fsdp; anywhere else it trains under FSDP too."""
    handle = patch(host.model, fusion=SkipLinks(stride=2, train_tower="all"))
    arguments = SimpleNamespace(fsdp="full_shard")
    llava_trainer.check_fusion(handle, arguments)
    if host.name == "llava":
        tower = host.model.model._modules.pop("vision_tower")
        host.model.model.vision_tower = [tower]
        with pytest.raises(SettingError, match=r"SkipLinks\.train_tower does not work with --fsdp"):
            llava_trainer.check_fusion(handle, arguments)


def test_llavas_script_cannot_save_under_fsdp_2(monkeypatch):
    engines.check_llavas_script(SimpleNamespace(fsdp="full_shard auto_wrap"))
    monkeypatch.setenv("FSDP_VERSION", "2")
    engines.check_llavas_script(SimpleNamespace(fsdp=""))
    with pytest.raises(SettingError, match=r"FSDP2 \(fsdp_version: 2\) with LLaVA's script.*fsdp_version: 1"):
        engines.check_llavas_script(SimpleNamespace(fsdp="full_shard auto_wrap"))


def test_what_the_flags_of_newer_versions_say_of_fsdp_counts_before_the_environment(host, monkeypatch):
    """From transformers 5.0 on; from 5.10 on --fsdp alone is FSDP2."""
    first, flat, second = (
        SimpleNamespace(fsdp=True, fsdp_plugin_args=plugin)
        for plugin in (
            {"fsdp_version": 1, "use_orig_params": True},
            {"fsdp_version": 1, "use_orig_params": False},
            {"fsdp_version": 2},
        )
    )
    with pytest.raises(SettingError, match=r"FSDP2 \(fsdp_version: 2\) with LLaVA's script"):
        engines.check_llavas_script(second)
    handle = patch(host.model, fusion=SkipLinks(stride=2, train_tower="all", tower_lr=1e-3))
    with pytest.raises(SettingError, match=r"tower_lr needs optimizer groups.*use_orig_params to true"):
        engines.check(handle, flat)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_USE_ORIG_PARAMS", "false")
    engines.check_llavas_script(first)
    monkeypatch.setenv("FSDP_VERSION", "1")
    engines.check(handle, first)
    engines.check(handle, second)


def test_a_model_that_fsdp_has_taken_over_is_not_patched(host, monkeypatch, tmp_path):
    handle = patch(host.model, fusion=DeepStack(start=1, interval=1))
    weight = host.model.get_input_embeddings().weight
    weight._fsdp_flattened = True  # as FSDP1 marks them
    with pytest.raises(SettingError, match=r"FSDP has already taken this model over.*before Fully"):
        patch(host.model, routing=Routing(split=LAYERS))
    assert not zero.in_pieces(host.model)
    weight.data = weight.data.flatten()[:7]  # and what it leaves of them between two steps
    with pytest.raises(CheckpointError, match="summon_full_params"):
        handle.save(tmp_path / "adapter")
