"""ZeRO-3 in one process: `zero3_process.py FOLDER` patches models whose weights DeepSpeed has partitioned.

A fusion's training settings are compared with torch alone, under ZeRO-2 too.
"""

import sys
from pathlib import Path

import cpu_deepspeed  # noqa: F401
import deepspeed
import torch

import llava_patch
from llava_patch import DeepStack, Routing, SkipLinks, get_handle, patch
from llava_patch.core.errors import CheckpointError, SettingError
from tests.support import models

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
ROUTING = Routing(split=2, side_layers=2)


def refused(error, words, work):
    try:
        work()
    except error as caught:
        assert words in str(caught), caught
    else:
        raise AssertionError(f"not refused: {words}")


def partition(model):
    deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    assert all(p.numel() == 0 for p in model.parameters())


def whole(model):
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {n: p.detach().clone() for n, p in model.named_parameters()}


def source(name):
    """The layer's tensor that a side branch's tensor is a copy of."""
    return name.replace("side_branch.0", "layers.2").replace("side_branch.1", "layers.3")


def check(make, name, folder):
    model = make()
    model.config._name_or_path = "hub/base"
    host = models.Host(name, model)
    batch = host.batch([(2, models.IMAGE, 5)], labels=True).inputs
    base = whole(model)
    with patch(model, routing=ROUTING), torch.no_grad():
        expected = model(**batch).loss

    partition(model)
    handle = patch(model, routing=ROUTING)
    parameters = dict(model.named_parameters())
    copies = {n: p for n, p in parameters.items() if "side_branch" in n}
    assert len(copies) == 18
    for n, p in copies.items():
        assert torch.equal(p, base[source(n)]) and p.dtype == base[source(n)].dtype
        assert not vars(p)  # nothing of DeepSpeed's
        assert parameters[source(n)].numel() == 0  # the original is in parts again
    added, total = sum(p.numel() for p in copies.values()), sum(p.numel() for p in base.values())
    assert f"{added:,} of {total + added:,} parameters train" in handle.report()
    refused(CheckpointError, "trainer.save_model()", lambda: handle.save(folder / "full", form="full"))
    assert not (folder / "full").exists()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]
    assert all(hasattr(p, "ds_id") for p in copies.values())
    loss = engine(**batch).loss
    assert torch.equal(loss.detach(), expected)
    engine.backward(loss)
    engine.step()
    trained = whole(model)
    for n, p in trained.items():
        assert torch.equal(p, base[source(n)]) == ("side_branch" not in n), n

    handle.save(folder / "adapter")
    fresh = make()
    llava_patch.load(fresh, folder / "adapter")  # compares the base's fingerprint, which was gathered
    assert all(torch.equal(p, trained[n]) for n, p in fresh.named_parameters())
    again = make()
    partition(again)
    llava_patch.load(again, folder / "adapter")  # onto partitioned weights
    assert all(torch.equal(p, trained[n]) for n, p in whole(again).items())
    other = make()
    with torch.no_grad():
        models.Host(name, other).decoder.layers[0].mlp.up_proj.weight.mul_(2)
    partition(other)
    refused(CheckpointError, "made on another base model", lambda: llava_patch.load(other, folder / "adapter"))

    handle.remove()
    refused(SettingError, "before deepspeed.initialize()", lambda: patch(model, routing=ROUTING))


TRAINING = {"train_tower": 2, "tower_lr": 2e-3, "layer_decay": 0.5, "unfreeze_after": 0.4}
FUSIONS = (SkipLinks(stride=2, **TRAINING), DeepStack(start=1, interval=1, **TRAINING))
STEPS = 5  # two with the projector alone


def train(model, batch, stage, fusion):
    """Five steps of AdamW with a warm-up; returns the handle and the weights after each step."""
    handle = patch(model, fusion=fusion)
    generator = torch.Generator().manual_seed(0)
    for n, p in model.named_parameters():
        if "_stack" in n:  # its last layer starts at zero, and then only that one has a gradient
            p.data.copy_(0.2 * torch.randn(p.shape, generator=generator))
    optimizer = torch.optim.AdamW(handle.param_groups(1e-3, weight_decay=0.1, projector_lr=5e-3))
    held = handle.warm_up(optimizer, STEPS)
    engine = wrapped = None
    if stage:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        engine = deepspeed.initialize(
            model=model, optimizer=optimizer, config={**CONFIG, "gradient_clipping": 0.5, "zero_optimization": zero}
        )[0]
        wrapped = engine.optimizer
    after = [whole(model)]
    for step in range(STEPS):
        held.begin_step(step, wrapped)
        if engine is None:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        else:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
        after.append(whole(model))
    return handle, after


def first_layer(model):
    return get_handle(model).anatomy.first_linear()[2]


def _name(model, parameter):
    return next(n for n, p in model.named_parameters() if p is parameter)


def check_fusion(make, name, folder, fusion):
    host = models.Host(name, make())
    batch = host.batch([(2, models.IMAGE, 5)], labels=True).inputs
    start = whole(host.model) if isinstance(fusion, DeepStack) else {}
    handle, expected = train(host.model, batch, None, fusion)
    trained = set(handle.trainable())
    projector = {n for n in trained if "projector" in n}
    assert any("vision_tower" in n for n in trained) and any("norm" in n for n in trained)
    for step in range(STEPS):
        moved = {n for n in trained if not torch.equal(expected[step + 1][n], expected[step][n])}
        assert moved >= projector if step < 2 else moved == trained
        assert moved <= projector or step >= 2
    for stage in (2, 3):
        model = make()
        model.config._name_or_path = "hub/base"
        if stage == 3:
            partition(model)
            with patch(model, fusion=fusion) as handle, torch.no_grad():  # its stock weights were in parts
                grown = handle.adapter_parameters() if isinstance(fusion, DeepStack) else [first_layer(model).weight]
                names = {id(p): n for n, p in model.named_parameters()}
                for parameter in grown[4:-2] or grown:  # DeepStack: its own projector but for the layer of zeros
                    same = names[id(parameter)].replace("_stack", "")
                    assert torch.equal(parameter, start[same] if same in start else expected[0][same]), same
        handle, after = train(model, batch, stage, fusion)
        for step in range(STEPS + 1):
            for n in trained:
                # The same arithmetic in flat parts. Adam's first steps blow gradients that are mere rounding up to the
                # size of the learning rate; those of a bias of keys, which changes no attention, are nothing else.
                off = (after[step][n] - expected[step][n]).norm()
                assert off <= 0.01 * (expected[step][n] - expected[0][n]).norm() or "k_proj.bias" in n, (stage, step, n)
                if step <= 2 and n not in projector:
                    assert torch.equal(after[step][n], after[0][n]), (stage, step, n)
        if stage == 3:
            handle.save(folder / "fused")
            again = make()
            partition(again)
            llava_patch.load(again, folder / "fused")
            assert all(torch.equal(p, after[STEPS][n]) for n, p in whole(again).items())
            for parameter in handle.adapter_parameters():
                parameter.requires_grad_(False)
            assert "does nothing" not in handle.report()  # its new weights, in parts, are not zero
            if isinstance(fusion, DeepStack):
                continue
            linear = handle.anatomy.first_linear()[2]
            assert linear.weight.numel() == 0
            assert torch.equal(
                linear.stock().weight, after[STEPS][_name(model, linear.weight)][:, : linear.main_features]
            )


if __name__ == "__main__":
    root = Path(sys.argv[1])
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{root}/rendezvous", rank=0, world_size=1
    )
    check(models.hf_model, "hf", root / "hf")
    models.llava_model(root)  # the first one makes the tower's folder, which moves the random numbers on
    check(lambda: models.llava_model(root), "llava", root / "llava")
    for fusion in FUSIONS:
        kind = type(fusion).__name__
        check_fusion(models.hf_model, "hf", root / f"hf-{kind}", fusion)
        check_fusion(lambda: models.llava_model(root), "llava", root / f"llava-{kind}", fusion)
    print("every check passed")
