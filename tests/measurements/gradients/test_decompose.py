"""The decomposition against plain backward passes of a model patched otherwise, and that it leaves nothing behind."""

import copy
import dataclasses
import random

import pytest
import torch
from torch.nn import functional as F

from llava_patch import AuxiliaryProbe, DenseConnector, DirectFusion, Routing, SkipLinks, patch
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.gradients.decompose import block_parameters, decompose, measured_block
from tests.support.fusions import ALL, randomise

FUSIONS = {name: fusion for name, fusion in ALL.items() if name != "merge-alone"}
SAMPLES = [[3, "image", 5], [2, "image", 2, "image", 3]]


def batch_of(handle, host):
    host.tokens = handle.tokens_per_image
    return host.batch(SAMPLES, labels=True).inputs


def loss_of(host, inputs):
    return lambda: host.model(**inputs, use_cache=False).loss


def plain_gradient(host, fusion, detach, block, routing=None):
    """The block's gradient by backward() in a model whose fusion itself detaches so many taps."""
    changed = dataclasses.replace(fusion, detach=detach, train_tower="all")
    with patch(host.model, fusion=changed, routing=routing) as handle:
        randomise(handle)
        inputs = batch_of(handle, host)
        module = handle.anatomy.vision_parts().blocks[block - 1]
        host.model.zero_grad()
        module.requires_grad_(True)
        loss_of(host, inputs)().backward()
        found = torch.cat([p.grad.flatten().clone() for p in module.parameters()])
        host.model.zero_grad()
    return found


@pytest.mark.parametrize("name", FUSIONS)
def test_main_and_full_are_what_autograd_gives_on_its_own(host, name):
    """Main: the gradient with every tap detached; full: with none or with the fusion's own."""
    fusion = FUSIONS[name]
    with patch(host.model, fusion=fusion) as handle:
        count, block = len(handle.taps.groups), min(b for b in handle.taps.blocks if b)
        block = min(block, handle.taps.main)
        attached = [b for g in handle.taps.groups if not g.detached for b in g.blocks]
    apart = plain_gradient(host, fusion, count, block)
    joined = plain_gradient(host, fusion, 0, block)
    own = plain_gradient(host, fusion, fusion.detach, block) if not isinstance(fusion, SkipLinks) else None
    with patch(host.model, fusion=fusion) as handle:  # its tower is frozen, and under no_grad on llava
        randomise(handle)
        work = loss_of(host, batch_of(handle, host))
        if name == "stack-one":  # block 8 is above the main feature
            assert handle.taps.blocks == (8,)
        main, full = decompose(host.model, work, block, full="attached")
        if any(b >= block for b in attached) and own is not None:
            same, ours = decompose(host.model, work, block)
            assert torch.equal(same, main) and torch.equal(ours, own)
    assert main.dtype == torch.float32 and main.norm() > 0
    assert torch.equal(main, apart) and torch.equal(full, joined)
    assert not torch.equal(main, full)


def test_full_as_the_run_has_it(host):
    """Skip links at 2, 4, 6 that detach two leave 6: full is then neither all nor nothing."""
    fusion = SkipLinks(stride=2, detach=2)
    own, joined = plain_gradient(host, fusion, 2, 2), plain_gradient(host, fusion, 0, 2)
    with patch(host.model, fusion=fusion) as handle:
        randomise(handle)
        main, full = decompose(host.model, loss_of(host, batch_of(handle, host)), 2)
    assert torch.equal(full, own) and not torch.equal(full, joined) and not torch.equal(full, main)


@pytest.mark.parametrize("variant", ["lf", "pc"])
def test_a_routed_model(host, variant):
    fusion, routing = SkipLinks(stride=2), Routing(variant=variant, split=3, side_layers=1, fusion_layers=1)
    routing = dataclasses.replace(routing, freeze="none")
    apart, joined = (plain_gradient(host, fusion, detach, 2, routing) for detach in (3, 0))
    with patch(host.model, fusion=fusion, routing=routing) as handle:
        randomise(handle)
        host.model.requires_grad_(False)  # what a measurement of its own does
        main, full = decompose(host.model, loss_of(host, batch_of(handle, host)), 2, full="attached")
        assert not any(p.requires_grad for p in host.model.parameters())
    assert main.norm() > 0 and torch.equal(main, apart) and torch.equal(full, joined)


@pytest.mark.parametrize("block", [1, 5, 7])
def test_any_block_that_a_tap_is_reached_through(host, block):
    fusion = SkipLinks(layers=(2, 8), detach=1)
    apart, joined = (plain_gradient(host, fusion, detach, block) for detach in (2, 0))
    with patch(host.model, fusion=fusion) as handle:
        randomise(handle)
        main, full = decompose(host.model, loss_of(host, batch_of(handle, host)), block, full="attached")
        sizes = [p.numel() for p in block_parameters(host.model, block).values()]
    assert len(main) == sum(sizes) and torch.equal(main, apart) and torch.equal(full, joined)


def dropping(host):
    """Dropout in the projector, and the losses of the passes that follow."""
    projector = find(host.model).projector
    projector.register_forward_hook(lambda module, args, output: F.dropout(output, 0.5, training=True))


def test_both_passes_drop_the_same_and_the_generator_is_where_it_was(host):
    dropping(host)
    with patch(host.model, fusion=SkipLinks(stride=2)) as handle:
        randomise(handle)
        work, losses = loss_of(host, batch_of(handle, host)), []

        def noted():
            losses.append(work())
            return losses[-1]

        torch.manual_seed(3)
        state, python = torch.get_rng_state(), random.getstate()
        decompose(host.model, noted, 2)
        assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
        assert torch.equal(*losses)
        torch.rand(1)
        assert not torch.equal(work(), losses[0])  # the dropout is real


def snapshot(model):
    """All that a measurement could leave behind."""
    return {
        "values": {n: p.detach().clone() for n, p in model.state_dict().items()},
        "parameters": [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
        "modules": [(n, id(m), m.training, m._forward_hooks.copy(), dict(vars(m))) for n, m in model.named_modules()],
    }


def same(before, after):
    assert all(torch.equal(v, after["values"][n]) for n, v in before["values"].items())
    for old, new in zip(before["parameters"], after["parameters"], strict=True):
        assert old[:3] == new[:3] and old[3] is new[3]
    for old, new in zip(before["modules"], after["modules"], strict=True):
        assert old[:4] == new[:4] and old[4].keys() == new[4].keys()
        assert all(new[4][k] is v for k, v in old[4].items() if k.startswith("_gradient") or k == "forward")


@pytest.mark.parametrize("train_tower", ["frozen", "all"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(host, train_tower, fails):
    with patch(host.model, fusion=SkipLinks(stride=2, train_tower=train_tower)) as handle:
        randomise(handle)
        work = loss_of(host, batch_of(handle, host))
        work().backward()
        grads = {n: p.grad.clone() for n, p in host.model.named_parameters() if p.grad is not None}
        before = snapshot(host.model)
        if fails:
            calls = iter([work])
            with pytest.raises(StopIteration):
                decompose(host.model, lambda: next(calls)(), 2)
        else:
            decompose(host.model, work, 2)
        same(before, snapshot(host.model))
        assert grads and all(torch.equal(g, host.model.get_parameter(n).grad) for n, g in grads.items())
        host.model.zero_grad()
        work().backward()  # and the next step is the same
        assert all(torch.equal(g, host.model.get_parameter(n).grad) for n, g in grads.items())


def test_hooks_on_the_runs_own_parameters_see_nothing(host):
    """A warm-up zeroes gradients, DDP and DeepSpeed collect them: all hang on the parameters."""
    with patch(host.model, fusion=SkipLinks(stride=2, train_tower="all")) as handle:
        randomise(handle)
        work = loss_of(host, batch_of(handle, host))
        plain = decompose(host.model, work, 2)
        seen = []
        for parameter in host.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: seen.append(1) or torch.zeros_like(grad))
                parameter.register_post_accumulate_grad_hook(lambda p: seen.append(2))
        held = decompose(host.model, work, 2)
        assert not seen and all(torch.equal(a, b) for a, b in zip(plain, held, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("train_tower", ["frozen", "all", 2])
def test_gradient_checkpointing_changes_nothing(host, reentrant, train_tower):
    dropping(host)
    with patch(host.model, fusion=SkipLinks(stride=2, train_tower=train_tower)) as handle:
        randomise(handle)
        host.model.train()
        work = loss_of(host, batch_of(handle, host))
        plain = decompose(host.model, work, 2)
        host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        host.model.enable_input_require_grads()
        before = snapshot(host.model)
        under = decompose(host.model, work, 2)
        functions = [
            m._gradient_checkpointing_func for m in host.model.modules() if "_gradient_checkpointing_func" in vars(m)
        ]
        assert functions and all("False" in str(f) or reentrant for f in functions)
        same(before, snapshot(host.model))
        assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_a_scaled_loss_gives_the_same_gradient(host):
    with patch(host.model, fusion=SkipLinks(stride=2)) as handle:
        randomise(handle)
        work = loss_of(host, batch_of(handle, host))
        plain, scaled = decompose(host.model, work, 2), decompose(host.model, work, 2, scale=2.0**10)
        assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))  # powers of two: exact


def test_mixed_precision(host):
    with patch(host.model, fusion=SkipLinks(stride=2)) as handle:
        randomise(handle)
        work = loss_of(host, batch_of(handle, host))
        plain = decompose(host.model, work, 2, full="attached")

        def autocast():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return work()

        mixed = decompose(host.model, autocast, 2, full="attached")
        for a, b in zip(plain, mixed, strict=True):
            assert b.dtype == torch.float32 and torch.cosine_similarity(a, b, dim=0) > 0.98
        host.model.to(torch.bfloat16)
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch_of(handle, host).items()}
        main, full = decompose(host.model, loss_of(host, inputs), 2)
        assert main.dtype == full.dtype == torch.float32 and main.isfinite().all()


def test_the_auxiliary_loss_does_not_count_the_measurement(tower_folder):
    from tests.support import models

    host = models.Host("hf", models.hf_model())
    handle = patch(host.model, fusion=SkipLinks(stride=2), probe=AuxiliaryProbe(weight=0.1))
    randomise(handle)
    host.model.train()
    work = loss_of(host, batch_of(handle, host))
    work()
    sums, without = handle.auxiliary._sums.clone(), handle.auxiliary._without
    decompose(host.model, work, 2)
    assert torch.equal(handle.auxiliary._sums, sums) and handle.auxiliary._without == without == 1
    work()
    assert handle.auxiliary._without == 2 and handle.auxiliary._sums[1] == 2


def test_which_block_is_measured(host):
    def chosen(fusion, *args):
        with patch(host.model, fusion=fusion):
            return measured_block(host.model, *args)

    assert chosen(SkipLinks(stride=2)) == 2
    assert chosen(DirectFusion(layers=(5, 3))) == 3
    assert chosen(DenseConnector()) == 1  # its groups begin at the embedding, which is no block
    assert chosen(SkipLinks(stride=2), 6) == 6
    for fusion, args, message in (
        (SkipLinks(layers=(2, 4), detach=2), (), 'set Gradients.full = "attached"'),
        (SkipLinks(stride=2), (8,), "the main path ends at block 7"),
        (SkipLinks(layers=(2, 4)), (5, "attached"), "choose a lower block"),
        (DenseConnector(groups=(0,)), (), "taps the embedding alone"),
        (SkipLinks(layers=(), merge_size=2), (), "no skip taps"),
    ):
        with pytest.raises(SettingError, match=message):
            chosen(fusion, *args)
    assert chosen(SkipLinks(layers=(2, 4), detach=2), None, "attached") == 2
    with pytest.raises(SettingError, match="no skip taps: bind a fusion"):
        measured_block(host.model)


def test_weights_that_have_no_gradient(host):
    with patch(host.model, fusion=SkipLinks(stride=2)) as handle:
        work = loss_of(host, batch_of(handle, host))
        blocks = handle.anatomy.vision_parts().blocks
        blocks[1].mlp.fc1.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks it
        with pytest.raises(SettingError, match="ZeRO-3 has partitioned them: use stage 2"):
            decompose(host.model, work, 2)
        for parameter in blocks[2].parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.int8)
        with pytest.raises(HostError, match="block 3 of the vision tower has no floating-point weights"):
            decompose(host.model, work, 3)
        for parameter in blocks[2].parameters():  # the patch's end sets their flags again
            parameter.data = parameter.data.float()


def test_what_cannot_be_measured(host):
    with patch(host.model, fusion=SkipLinks(stride=2)) as handle:
        randomise(handle)
        before = snapshot(host.model)
        inputs = batch_of(handle, host)
        with pytest.raises(InputError, match="must be one number"):
            decompose(host.model, lambda: host.model(**inputs).logits, 2)
        text = copy.copy(host.batch([[6]], labels=True).inputs)
        if host.name == "hf":
            with pytest.raises(InputError, match="the batch has no image"):
                decompose(host.model, loss_of(host, text), 2)
        with torch.no_grad():
            assert decompose(host.model, loss_of(host, inputs), 2)[0].norm() > 0  # gradients are on inside
        same(before, snapshot(host.model))
