"""LLaVA's unmodified train.py with a vision tower that trains: resumed, continued, under LoRA, ZeRO-2 and ZeRO-3."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPVisionModel

from tests.support.tiny_train import TRAIN, arguments, losses, make_data, ok, run

from .test_deepspeed import ZERO2, ZERO3, _train

SETTINGS = ("SkipLinks.stride = 2", "SkipLinks.tower_lr = 2e-3", "SkipLinks.layer_decay = 0.9")
TOWER = "model.vision_tower.vision_tower."
LOADER = {"device_map": "cpu", "device": "cpu"}


def gin(*bindings):
    return [word for binding in (*SETTINGS, *bindings) for word in ("--gin_param", binding)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run: the tower in float32, half of its steps with the projector alone."""
    out = tmp_path_factory.mktemp("tower") / "llava-trained"
    ok(run([TRAIN, *flags(data, out)]))
    return out


def flags(data, out):
    return [
        *arguments(data, 2, out, steps=4, save_steps=1, save_total_limit=9, gradient_accumulation_steps=2,
                   mm_projector_lr=2e-3, weight_decay=0.1, bf16=False),
        *gin("SkipLinks.train_tower = 'all'", "SkipLinks.unfreeze_after = 0.5"),
    ]  # fmt: skip


def used(name):
    return name.startswith(TOWER) and "layers.7." not in name and "post_layernorm" not in name


def moved(before, after):
    return {n for n in before if not torch.equal(before[n].to(after[n].dtype), after[n])}


def _original(data):
    """The tower as it was, under the names that this transformers has: its files have those of older ones."""
    return CLIPVisionModel.from_pretrained(data[1].tower).float().state_dict()


def tower_of(folder, base=None):
    """The tower's weights as LLaVA's loader brings them back, in half precision."""
    from llava.model.builder import load_pretrained_model

    base = None if base is None else str(base)
    model = load_pretrained_model(str(folder), base, folder.name, **LOADER)[1]
    return model, {n: t for n, t in model.state_dict().items() if n.startswith(TOWER)}


def same_half(loaded, weights):
    return loaded and all(torch.equal(t, weights[n].half()) for n, t in loaded.items())


@pytest.mark.timeout(300)
def test_trained_saved_and_resumed(data, trained, tmp_path):
    steps = [load_file(trained / f"checkpoint-{i}" / "model.safetensors") for i in (1, 2, 3, 4)]
    assert moved(steps[0], steps[1]) == {n for n in steps[0] if "mm_projector" in n}
    everything = {n for n in steps[0] if "vision_tower" not in n or used(n)}
    assert moved(steps[1], steps[2]) == everything == moved(steps[2], steps[3])
    original = _original(data)
    [name] = [n for n in steps[3] if n.endswith("embeddings.class_embedding")]
    shift = steps[3][name] - original[name.removeprefix(TOWER)]
    assert 0 < shift.abs().max() < 1e-2 and all(torch.isfinite(t).all() for t in steps[3].values())
    assert all(t.dtype == torch.float32 for n, t in steps[3].items() if n.startswith(TOWER))

    resumed = tmp_path / "llava-resumed"
    shutil.copytree(trained / "checkpoint-1", resumed / "checkpoint-1")
    text = ok(run([TRAIN, *flags(data, resumed)]))
    assert "the projector learns alone in 2 of 4 steps" in text and "everything learns from step 3 on" in text
    assert not moved(steps[3], load_file(resumed / "model.safetensors"))

    model, tower = tower_of(trained)
    assert same_half(tower, steps[3]) and not same_half(tower, steps[1])
    from llava_patch import SkipLinks, patch
    from llava_patch.patching.handle import get_handle

    # The next run freezes the tower: what it saves is still not the original one.
    settings = get_handle(model).fusion
    assert settings.train_tower == "all"
    patch(model, fusion=SkipLinks(stride=settings.stride))
    model.save_pretrained(tmp_path / "llava-next")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        if (trained / name).is_file():
            shutil.copyfile(trained / name, tmp_path / "llava-next" / name)
    again, tower = tower_of(tmp_path / "llava-next")
    assert get_handle(again).fusion.train_tower == "frozen" and same_half(tower, steps[3])
    # The run trained everything and left no adapter. One on the language model, whose tower is loaded last:
    assert not (trained / "llava_patch_adapter").exists()
    model.config._name_or_path = str(data[1].language_model)
    get_handle(model).save(tmp_path / "llava-adapter")
    again, tower = tower_of(tmp_path / "llava-adapter")
    assert same_half(tower, steps[3])


@pytest.mark.timeout(300)
def test_beside_lora(data, tmp_path):
    out = tmp_path / "llava-lora"
    lora = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "mm_projector_lr": 2e-3}
    ok(run([TRAIN, *arguments(data, 2, out, steps=2, bf16=True, **lora), *gin("SkipLinks.train_tower = 2")]))
    beside = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    beside = {n.removeprefix("base_model.model."): t for n, t in beside.items()}
    assert {n.split("layers.")[1][0] for n in beside if n.startswith(TOWER)} == {"5", "6"}
    original = _original(data)
    expected = {n: t for n, t in beside.items() if n.startswith(TOWER)}
    assert moved({n: original[n.removeprefix(TOWER)] for n in expected}, expected)
    expected = {f"{TOWER}{n}": t for n, t in original.items()} | expected
    model, tower = tower_of(out, data[1].language_model)
    assert same_half(tower, expected)

    merged, script = tmp_path / "llava-merged", TRAIN.parents[2] / "scripts" / "merge_lora_weights.py"
    where = ["--model-path", out, "--model-base", data[1].language_model, "--save-model-path", merged]
    if script.is_file():
        ok(run([script, *where]))
    else:  # LLaVA's package of the index leaves it out
        model.save_pretrained(merged)
        AutoTokenizer.from_pretrained(data[1].language_model, use_fast=False).save_pretrained(merged)
    assert same_half(tower_of(merged)[1], expected)
    (out / "non_lora_trainables.bin").rename(out / "gone.bin")
    from llava_patch.core.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"vision tower was trained, but non_lora_trainables\.bin is missing"):
        tower_of(out, data[1].language_model)


@pytest.mark.timeout(600)
def test_zero_2_and_zero_3_go_on_from_a_finished_checkpoint(data, trained, tmp_path):
    """With the projector and the tower in parts from the beginning under ZeRO-3, and frozen blocks below."""
    before = load_file(trained / "model.safetensors")
    bindings = gin("SkipLinks.train_tower = 2", "SkipLinks.unfreeze_after = 0.3")
    extra = {"model_name_or_path": trained, "pretrain_mm_mlp_adapter": None, "learning_rate": 2e-3, "weight_decay": 0.1,
             "save_steps": 1, "save_total_limit": 9}  # fmt: skip
    found, weights, norms = {}, {}, {}
    for name, zero in (("zero2", ZERO2), ("zero3", ZERO3)):
        out = tmp_path / f"llava-{name}"
        text = _train(data, data[0] / "v1.json", out, *bindings, zero=zero, steps=3, warmup_ratio=0, **extra)
        assert "the projector learns alone in 1 of 3 steps" in text and "everything learns from step 2 on" in text
        found[name], weights[name] = losses(out), load_file(out / "model.safetensors")
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        norms[name] = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
        tower = {n.split("layers.")[1][0] for n in moved(before, weights[name]) if n.startswith(TOWER)}
        assert tower == {"5", "6"}  # the rest is the finished run's, not the original
    resumed = tmp_path / "llava-resumed"  # right at the switch
    shutil.copytree(tmp_path / "llava-zero3" / "checkpoint-1", resumed / "checkpoint-1")
    _train(data, data[0] / "v1.json", resumed, *bindings, zero=ZERO3, steps=3, warmup_ratio=0, **extra)
    assert not moved(weights["zero3"], load_file(resumed / "model.safetensors"))
    # The same arithmetic, but gathered weights lie elsewhere in memory and a kernel may sum in another order: roundings
    # of bf16, 2^-9 of a value (measured 3e-4 of the loss; the same runs in float32 agree to 2e-5).
    assert len(found["zero2"]) == 3 and found["zero3"] == pytest.approx(found["zero2"], rel=2**-9)
    assert norms["zero3"] == pytest.approx(norms["zero2"], rel=1e-2)
    if norms["zero2"]:  # reported from 4.38 on
        assert norms["zero2"][0] < norms["zero2"][1] / 3  # the projector's alone
    changes = [
        torch.cat([(w[n].float() - before[n].bfloat16().float()).flatten() for n in sorted(before) if used(n)])
        for w in weights.values()
    ]
    assert changes[0].abs().max() > 1e-3 and torch.cosine_similarity(*changes, dim=0) > 0.95
