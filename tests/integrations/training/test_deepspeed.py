"""LLaVA's unmodified train.py under DeepSpeed ZeRO-2 and ZeRO-3: two ranks, bf16, gradient checkpointing, LoRA."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import LAUNCHERS

from .test_launch_scripts import HALVES, TRAIN, _arguments, _losses, data  # noqa: F401

pytest.importorskip("deepspeed")

CPU_DEEPSPEED = LAUNCHERS / "cpu_deepspeed.py"
TIMEOUT = 180  # seconds; a run takes about 20 alone on two cores, and a rank that waits for another waits for ever
AUTO = "auto"
# What LLaVA's scripts/zero2.json and zero3.json say.
ZERO2 = {
    "fp16": {"enabled": AUTO, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": AUTO}, "train_micro_batch_size_per_gpu": AUTO, "train_batch_size": AUTO,
    "gradient_accumulation_steps": AUTO,
    "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
                          "reduce_bucket_size": AUTO},
}  # fmt: skip
ZERO3 = {**ZERO2, "zero_optimization": {
    **ZERO2["zero_optimization"], "stage": 3, "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}}  # fmt: skip


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory):  # noqa: F811
    """The data set with half of its images gone: one sample a rank, and often only one rank has an image."""
    rows = json.loads((data[0] / "v1.json").read_text())
    for row in rows[::2]:
        row.pop("image", None)
        row["conversations"][0]["value"] = "What is a number?"
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    path.write_text(json.dumps(rows))
    return path


def _train(data, mixed, out, *flags, zero=None, steps=4, **extra):  # noqa: F811
    """Two ranks to the end; returns what they printed."""
    extra = {"data_path": mixed, "group_by_modality_length": False, "per_device_train_batch_size": 1, "bf16": True,
             "learning_rate": 1e-2, **extra}  # fmt: skip
    if zero is None:
        if not HALVES:
            pytest.skip("DDP over gloo takes no bf16 in this torch (2.1), and LLaVA's script nothing else on the CPU")
        extra["use_cpu"] = True
    else:
        config = out.parent / f"{out.name}.json"
        config.write_text(json.dumps(zero))
        extra |= {"deepspeed": config, "use_cpu": False}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *launcher,
        str(CPU_DEEPSPEED),
        str(TRAIN),
        *_arguments(data, 2, out, steps, **extra),
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}
    log = out.parent / f"{out.name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too, not only their launcher
            process.wait()
            pytest.fail(f"no end after {TIMEOUT} s: ranks wait for one another\n{log.read_text()[-2000:]}")
    assert code == 0, log.read_text()[-6000:]
    return log.read_text()


def _update(weights, base):
    """How far the side branch moved from layer 3, as one vector."""
    moved = [
        (tensor.float() - base[name.replace("side_branch.0", "layers.3")].bfloat16().float()).flatten()
        for name, tensor in sorted(weights.items())
        if "side_branch" in name
    ]
    return torch.cat(moved)


@pytest.mark.timeout(600)
def test_zero_2_and_zero_3_train_what_ddp_trains(data, mixed, tmp_path, record_property):  # noqa: F811
    base = torch.load(data[1].language_model / "pytorch_model.bin", weights_only=True)
    losses, updates = {}, {}
    for name, zero in (("ddp", None), ("zero2", ZERO2), ("zero3", ZERO3))[0 if HALVES else 1 :]:  # see `_train`
        out = tmp_path / f"llava-{name}"
        text = _train(data, mixed, out, "--gin_param", "Routing.split = 3", zero=zero)
        assert text.count("parameters train") == 1
        assert "34,944 of 404,352 parameters train" in text  # whole tensors are counted, also where they are in parts
        losses[name] = _losses(out)
        weights = load_file(out / "model.safetensors")
        for key, tensor in base.items():
            assert torch.equal(weights[key], tensor.bfloat16()), (name, key)  # all_but_single: nothing else moved
        updates[name] = _update(weights, base)
        adapter = load_file(out / "llava_patch_adapter" / "llava_patch.safetensors")
        assert sum("side_branch" in key for key in adapter) == 9
        assert all(torch.equal(adapter[key], weights[key]) for key in adapter)
    assert len(losses["zero2"]) == 4 and all(math.isfinite(loss) for loss in losses["zero2"])
    record_property("figure", "; ".join(f"losses by {name} {found}" for name, found in losses.items()))
    # The same arithmetic in parts, but for the order of sums: roundings of bf16, 2^-9 of a value.
    assert losses["zero3"] == pytest.approx(losses["zero2"], rel=2**-9)
    assert (updates["zero3"] - updates["zero2"]).norm() < 0.02 * updates["zero2"].norm()
    assert updates["zero2"].abs().max() > 5e-3  # of the learning rate's size: it did train
    # DDP runs under autocast and steps on bf16 weights, DeepSpeed on float32 copies: they differ by roundings (2^-9 of
    # a value; measured 1e-4 of the loss), and the directions by those of four steps of the size of 20 roundings each.
    if "ddp" in losses:
        assert losses["zero2"] == pytest.approx(losses["ddp"], rel=1e-3)
        assert torch.cosine_similarity(updates["zero2"], updates["ddp"], dim=0) > 0.99
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    import llava_patch

    model = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "llava-zero3" / "llava_patch_adapter")
    assert llava_patch.get_handle(model).routing.split == 3
    assert torch.equal(_update({k: v.bfloat16() for k, v in model.state_dict().items()}, base), updates["zero3"])


LORA = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "mm_projector_lr": 2e-3}  # finetune_lora.sh
NONE = ("--gin_param", "Routing.split = 3", "--gin_param", "Routing.freeze = 'none'")


@pytest.mark.timeout(400)
def test_all_weights_train_where_a_rank_has_no_image_under_zero_2(data, mixed, tmp_path):  # noqa: F811
    """Gradients come in one order on both ranks: another is an error or, of equal shapes, one weight's in another's."""
    base = torch.load(data[1].language_model / "pytorch_model.bin", weights_only=True)
    losses, moved = {}, {}
    for name, zero in (("ddp", None), ("zero2", ZERO2)):
        out = tmp_path / f"llava-{name}"
        _train(data, mixed, out, *NONE, "--gin_param", "Routing.variant = 'kv'", zero=zero)
        losses[name], weights = _losses(out), load_file(out / "model.safetensors")
        layers = [key for key in base if key.startswith("model.layers.") and "proj" in key]
        moved[name] = {key: (weights[key].float() - base[key].bfloat16().float()).flatten() for key in layers}
        moved[name]["side_branch"] = _update(weights, base)
    assert len(losses["ddp"]) == 4 and losses["zero2"] == pytest.approx(losses["ddp"], rel=1e-3)  # roundings, as above
    alike = {key: float(torch.cosine_similarity(moved["zero2"][key], moved["ddp"][key], dim=0)) for key in moved["ddp"]}
    # Measured: 0.999 (not in norms, which are near 1 and lose more to bf16); the side branch, whose gradients are small
    # beside the roundings of autocast, 0.98. With queries' and keys' gradients exchanged on one rank: 0.90 to 0.98.
    assert alike.pop("side_branch") > 0.97
    assert min(alike.values()) > 0.995, alike


@pytest.mark.timeout(400)
def test_lora_beside_the_side_branch_under_zero_3(data, mixed, tmp_path):  # noqa: F811
    out = tmp_path / "llava-lora"
    text = _train(data, mixed, out, *NONE, zero=ZERO3, **LORA)
    assert "whose folder holds our weights" in text
    losses = _losses(out)
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)

    # What the trained model was: the base, LoRA's updates, and the tensors that LLaVA saves beside them.
    base = torch.load(data[1].language_model / "pytorch_model.bin", weights_only=True)
    adapter = load_file(out / "adapter_model.safetensors")
    beside = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    expected = {}
    for name, tensor in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected[name] = tensor.float()
        if f"{prefix}A.weight" in adapter:
            delta = adapter.pop(f"{prefix}B.weight").float() @ adapter.pop(f"{prefix}A.weight").float()
            assert delta.abs().max() > 0, name
            expected[name] += LORA["lora_alpha"] / LORA["lora_r"] * delta
    assert not adapter  # none on the side branch
    expected |= {name.removeprefix("base_model.model."): tensor.float() for name, tensor in beside.items()}
    assert (
        sum("side_branch" in name for name in expected) == 9 and sum("mm_projector" in name for name in expected) == 4
    )
    assert _update(expected, base).abs().max() > 2e-3

    from llava.model.builder import load_pretrained_model

    loader = {"device_map": "cpu", "device": "cpu"}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tokenizer, model, *_ = load_pretrained_model(str(out), str(data[1].language_model), "llava-lora", **loader)
    assert not any("missing adapter keys" in str(w.message) for w in warned)
    loaded = {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" not in name}
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        # LLaVA loads in half precision, where peft merges: two roundings.
        assert torch.allclose(loaded[name].float(), tensor, rtol=2**-9, atol=2**-14), name

    # merge_lora_weights.py: save what was loaded; the full checkpoint loads patched, with the same tensors
    model.save_pretrained(tmp_path / "llava-merged")
    tokenizer.save_pretrained(tmp_path / "llava-merged")
    from llava_patch import get_handle

    merged = load_pretrained_model(str(tmp_path / "llava-merged"), None, "llava-merged", **loader)[1]
    assert get_handle(merged).routing == get_handle(model).routing
    again = merged.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.items())


@pytest.mark.timeout(400)
def test_stage_1_goes_on_under_zero_2(data, tmp_path):  # noqa: F811
    """Of the engine's state what is frozen stays out: nearly all of the model."""
    settings = {"tune_mm_mlp_adapter": True, "version": "plain", "pretrain_mm_mlp_adapter": None, "save_steps": 1,
                "save_total_limit": 9, "steps": 2}  # fmt: skip
    flags = ("--gin_param", "SkipLinks.stride = 2")
    _train(data, data[0] / "plain.json", tmp_path / "whole", *flags, zero=ZERO2, **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    _train(data, data[0] / "plain.json", tmp_path / "resumed", *flags, zero=ZERO2, **settings)
    one, other = (torch.load(tmp_path / name / "mm_projector.bin", weights_only=True) for name in ("whole", "resumed"))
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "resumed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    state = next((tmp_path / "whole" / "checkpoint-1").glob("global_step1/*model_states.pt"))
    assert state.stat().st_size < 200_000


@pytest.mark.timeout(300)
def test_lora_instead_of_ours(data, tmp_path):  # noqa: F811
    """With nothing of ours configured LLaVA's LoRA script runs as it is."""
    from tests.support.tiny_train import ok as _ok
    from tests.support.tiny_train import run as _run

    out = tmp_path / "llava-lora"
    _ok(_run([TRAIN, *_arguments(data, 2, out, steps=2, bf16=True, **LORA)]))
    adapter = load_file(out / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert (out / "non_lora_trainables.bin").is_file() and not list(out.glob("*llava_patch*"))


@pytest.mark.timeout(400)
def test_deep_stack_where_a_rank_has_no_image(data, mixed, tmp_path):  # noqa: F811
    """Every rank gives both projectors and the tower a gradient, in the same order of modules."""
    bindings = ("DeepStack.start = 1", "DeepStack.interval = 1", 'DeepStack.train_tower = "all"')
    flags = [word for binding in bindings for word in ("--gin_param", binding)]
    found, weights = {}, {}
    for name, zero in (("ddp", None), ("zero3", ZERO3)):
        out = tmp_path / f"llava-{name}"
        _train(data, mixed, out, *flags, zero=zero, learning_rate=1e-3)
        found[name], weights[name] = _losses(out), load_file(out / "model.safetensors")
    assert len(found["ddp"]) == 4 and found["zero3"] == pytest.approx(found["ddp"], rel=1e-3)  # roundings, as above
    for kind in weights.values():
        assert kind["model.mm_projector_stack.2.weight"].abs().max() > 1e-4  # it started at zero
