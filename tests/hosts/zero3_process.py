"""ZeRO-3 in one process: `zero3_process.py FOLDER` patches models whose weights DeepSpeed has partitioned."""

import sys
from pathlib import Path

import cpu_deepspeed  # noqa: F401
import deepspeed
import models
import torch

import llava_patch
from llava_patch import Routing, SkipLinks, patch
from llava_patch.errors import CheckpointError, SettingError

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
    refused(SettingError, "a fusion (SkipLinks) is not: use stage 2", lambda: patch(model, fusion=SkipLinks(stride=2)))
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


if __name__ == "__main__":
    root = Path(sys.argv[1])
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{root}/rendezvous", rank=0, world_size=1
    )
    check(models.hf_model, "hf", root / "hf")
    models.llava_model(root)  # the first one makes the tower's folder, which moves the random numbers on
    check(lambda: models.llava_model(root), "llava", root / "llava")
    print("every check passed")
