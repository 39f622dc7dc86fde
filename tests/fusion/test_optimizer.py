"""Optimizer groups of a tower that trains, and gradients that reach it."""

from types import SimpleNamespace

import pytest
import torch

from llava_patch import Routing, SkipLinks, get_handle, patch
from llava_patch.core.errors import SettingError
from llava_patch.integrations.training import llava as llava_trainer
from tests.support.models import IMAGE

SAMPLES = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)]


def as_llava_makes_them(model, weight_decay=0.1, projector_lr=None):
    """LLaVATrainer.create_optimizer: decay or not (norms and biases), times projector or not."""
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    kinds = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            projector = projector_lr is not None and "projector" in name
            kinds.setdefault((projector, "bias" in name or id(p) in norms), []).append(p)
    return [
        {"params": ps, "weight_decay": 0.0 if plain else weight_decay, **({"lr": projector_lr} if projector else {})}
        for (projector, plain), ps in kinds.items()
    ]


def layout(groups):
    return {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def arranged(model, **settings):
    """What LLaVA's trainer steps with: handle, optimizer, layout before and after."""
    handle = patch(model, fusion=SkipLinks(stride=2, **settings))
    optimizer = torch.optim.AdamW(as_llava_makes_them(model, projector_lr=5e-3), lr=1e-3)
    before, groups = layout(optimizer.param_groups), list(optimizer.param_groups)
    llava_trainer.arrange_groups(SimpleNamespace(optimizer=optimizer), handle)
    after = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(after) == len({id(p) for p in after})  # none twice
    assert {id(p) for p in after} == {id(p) for p in model.parameters() if p.requires_grad}  # every one that trains
    assert all(g["params"] for g in optimizer.param_groups)
    return handle, optimizer, before, groups


def tower_rates(handle, optimizer):
    """{part of the tower: learning rates}; part 0 is the embeddings."""
    parts, rates = handle.anatomy.vision_parts(), {}
    where = {id(p): i for i, b in enumerate(parts.blocks, 1) for p in b.parameters()}
    where |= {id(p): 0 for m in parts.before for p in m.parameters()}
    for i, (lr, _) in layout(optimizer.param_groups).items():
        if i in where:
            rates.setdefault(where[i], set()).add(lr)
    return rates


@pytest.mark.parametrize("peft", [False, True])
def test_each_block_has_its_learning_rate(host, peft):
    model = host.model
    if peft:
        lib = pytest.importorskip("peft")
        model = lib.get_peft_model(model, lib.LoraConfig(r=2, target_modules=r".*\.layers\.\d\.self_attn\.q_proj"))
        model.base_model.requires_grad_(True)
    handle, optimizer, before, _ = arranged(model, train_tower="all", tower_lr=1e-4, layer_decay=0.5)
    rates = tower_rates(handle, optimizer)
    assert sorted(rates) == list(range(8))  # block 8 is above the main feature, 7
    for block, found in rates.items():
        assert found == {1e-4 * 0.5 ** (7 - block)}
    tower = {id(p) for p in handle.anatomy.vision_model.parameters()}
    after = layout(optimizer.param_groups)
    assert all(after[i][1] == before[i][1] for i in before)  # weight decay is LLaVA's
    assert {d for i, (_, d) in after.items() if i in tower} == {0.0, 0.1}
    assert all(after[i] == before[i] for i in before if i not in tower)
    assert 5e-3 in {lr for i, (lr, _) in after.items() if i not in tower}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [({"tower_lr": 1e-4}, {6: 1e-4, 7: 1e-4}), ({"layer_decay": 0.5}, {6: 5e-4, 7: 1e-3})],
    ids=["lr", "decay"],
)
def test_one_setting_alone(host, settings, rates):
    handle, optimizer, _, _ = arranged(host.model, train_tower=2, **settings)
    assert tower_rates(handle, optimizer) == {b: {r} for b, r in rates.items()}


def test_without_the_settings_the_groups_stay(host):
    _, optimizer, _, groups = arranged(host.model, train_tower="all", unfreeze_after=0.0)
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))


def test_a_scheduler_keeps_the_ratios(host):
    from transformers import get_cosine_schedule_with_warmup

    _, optimizer, before, _ = arranged(host.model, train_tower="all", tower_lr=1e-4, layer_decay=0.5)
    first = [g["lr"] for g in optimizer.param_groups]
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, 10)
    for step in range(8):
        optimizer.step()
        schedule.step()
        factors = {round(g["lr"] / lr, 9) for g, lr in zip(optimizer.param_groups, first, strict=True)}
        assert len(factors) == 1
        assert step != 2 or factors == {1.0}
    assert factors != {1.0}


def test_groups_for_a_loop_of_ones_own(host):
    handle = patch(host.model, fusion=SkipLinks(stride=2, train_tower="all", layer_decay=0.5, unfreeze_after=0.5))
    groups = handle.param_groups(1e-3, weight_decay=0.1, projector_lr=2e-3)
    optimizer = torch.optim.AdamW(groups)
    names = {id(p): n for n, p in host.model.named_parameters()}
    members = [names[id(p)] for g in groups for p in g["params"]]
    assert sorted(members) == sorted(handle.trainable()) and all(g["params"] for g in groups)
    adapter = {id(p) for p in handle.adapter_parameters()}
    for group in groups:
        assert len({id(p) in adapter for p in group["params"]}) == 1  # the adapter's groups hold nothing else
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
            assert group["lr"] == 2e-3 or id(p) not in adapter
    assert tower_rates(handle, optimizer)[5] == {1e-3 * 0.5**2}


def test_groups_of_a_model_without_fusion(host):
    handle = patch(host.model, routing=Routing(split=3, freeze="none"))
    groups = handle.param_groups(1e-3)
    assert len(groups) == 2 and {g["weight_decay"] for g in groups} == {0.0}
    assert sum(len(g["params"]) for g in groups) == len(handle.trainable())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("train_tower", ["all", 2])
def test_gradient_checkpointing_loses_no_gradient(host, train_tower, reentrant):
    """Reentrant checkpoints give none where no input requires one, as below the first block that trains."""
    inputs = host.batch(SAMPLES, labels=True).inputs
    handle = patch(host.model, fusion=SkipLinks(stride=2, train_tower=train_tower))
    host.model.train()
    vision = handle.anatomy.vision_model

    def gradients():
        host.model.zero_grad()
        host.model(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in vision.named_parameters() if p.grad is not None}

    expected = gradients()
    host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    host.model.enable_input_require_grads()
    found = gradients()
    trained = {n for n, p in vision.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() == trained and len(trained) >= 2 * 16
    assert all(torch.equal(found[n], expected[n]) for n in trained)
    parts = [part for part in vision.modules() if "_gradient_checkpointing_func" in vars(part)]
    assert parts
    handle.remove()
    assert not any("WhereGradients" in type(part._gradient_checkpointing_func).__name__ for part in parts)


def test_what_trains_may_differ_from_one_run_to_the_next(host):
    handle = patch(host.model, fusion=SkipLinks(stride=2))
    assert patch(host.model, fusion=SkipLinks(stride=2, train_tower=1, tower_lr=1e-4)) is handle
    assert handle.fusion.train_tower == 1 and host.model.config.llava_patch["fusion"]["tower_lr"] == 1e-4
    host.model(**host.batch(SAMPLES, labels=True).inputs).loss.backward()
    vision = handle.anatomy.vision_model
    assert {n.split("layers.")[1][0] for n, p in vision.named_parameters() if p.grad is not None} == {"6"}
    with pytest.raises(SettingError, match="already carries fusion"):
        patch(host.model, fusion=SkipLinks(stride=3))
    handle.remove()
    assert get_handle(host.model) is None


def test_a_float16_tower_trains_in_float32(host):
    handle = patch(host.model, fusion=SkipLinks(stride=2))
    handle.anatomy.vision_model.half()  # as LLaVA's script does without --bf16
    llava_trainer.make_tower_trainable(handle)
    assert next(handle.anatomy.vision_model.parameters()).dtype == torch.float16
    patch(host.model, fusion=SkipLinks(stride=2, train_tower="all"))
    llava_trainer.make_tower_trainable(handle)
    assert {p.dtype for p in handle.anatomy.vision_model.parameters()} == {torch.float32}


def deepspeed(**config):
    return {"hf_deepspeed_config": SimpleNamespace(config=config)}


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"tower_lr": 1e-4}, deepspeed(optimizer={"type": "AdamW"}), r"SkipLinks.tower_lr needs.*own \"optimizer\""),
        ({}, {"tune_mm_mlp_adapter": True}, "the trained tower would be lost"),
        ({"unfreeze_after": 0.1}, {"optim": "adafactor"}, "SkipLinks.unfreeze_after = 0.1 .*--optim adamw_torch"),
        ({"unfreeze_after": 0.1}, deepspeed(zero_optimization={"stage": 0}), "not stage 0"),
        (
            {"unfreeze_after": 0.1},
            deepspeed(zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}}),
            "keeps on nvme",
        ),
    ],
)
def test_runs_that_cannot_honour_a_setting_are_refused(host, settings, arguments, message):
    handle = patch(host.model, fusion=SkipLinks(stride=2, train_tower="all", **settings))
    llava_trainer.check_fusion(handle, SimpleNamespace(optim="adamw_torch"))
    with pytest.raises(SettingError, match=message):
        llava_trainer.check_fusion(handle, SimpleNamespace(**arguments))


@pytest.mark.parametrize(("projector", "message"), [(True, "nothing but the projector"), (False, "does not train")])
def test_a_warm_up_needs_both_sides(host, projector, message):
    handle = patch(host.model, fusion=SkipLinks(stride=2, unfreeze_after=0.1))
    for p in host.model.parameters() if projector else handle.adapter_parameters():
        p.requires_grad_(False)
    if projector:
        handle.anatomy.projector.requires_grad_(True)
    with pytest.raises(SettingError, match=f"SkipLinks.unfreeze_after = 0.1.*{message}"):
        llava_trainer.check_fusion(handle, SimpleNamespace())


def test_deepstacks_projector_is_part_of_the_adapter(host):
    handle = patch(host.model, fusion=SkipLinks(stride=2))
    one = handle.adapter_parameters()
    stack = torch.nn.Linear(2, 2)
    setattr(handle.anatomy.projector_owner, f"{handle.anatomy.projector_name}_stack", stack)
    assert handle.adapter_parameters() == [*one, *stack.parameters()]
