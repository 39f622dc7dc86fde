"""The projector learns first: nothing else moves, and what waited then starts like a new run."""

import copy

import pytest
import torch

from llava_patch import SkipLinks, patch
from llava_patch.core.errors import SettingError
from llava_patch.fusion.training import steps_of
from tests.support.models import IMAGE

STEPS, HELD = 6, 3


def total_norm(tensors):
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


class Run:
    """A training run of one model: AdamW with weight decay, clipping, a schedule, two micro-batches a step."""

    def __init__(self, host, share=0.5, wrap=lambda model: model):
        self.host, self.model = host, host.model
        settings = SkipLinks(stride=2, train_tower=2, layer_decay=0.5, unfreeze_after=share)
        self.handle = patch(self.model, fusion=settings)
        self.forward = wrap(self.model)
        groups = self.handle.param_groups(1e-2, weight_decay=0.1, projector_lr=2e-2)
        self.optimizer = torch.optim.AdamW(groups)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.held = self.handle.warm_up(self.optimizer, STEPS) if share else None
        self.norms = []

    def steps(self, first, last):
        for step in range(first, last):
            if self.held is not None:
                self.held.begin_step(step)
            for micro in range(2):
                batch = self.host.batch([(2, IMAGE, 5)], seed=10 * step + micro, labels=True)
                self.forward(**batch.inputs).loss.backward()
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    def weights(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def adapter(self):
        ids = {id(p) for p in self.handle.adapter_parameters()}
        return {n for n, p in self.model.named_parameters() if id(p) in ids}


def test_only_the_projector_moves_then_everything(host):
    run = Run(host)
    start = run.weights()
    run.steps(0, HELD)
    middle = run.weights()
    assert {n for n in start if not torch.equal(start[n], middle[n])} == run.adapter()
    assert all(p.requires_grad for n, p in host.model.named_parameters() if n in run.handle.trainable())
    decays = [g["weight_decay"] for g in run.optimizer.param_groups]
    run.steps(HELD, STEPS)
    end = run.weights()
    assert {n for n in start if not torch.equal(middle[n], end[n])} == set(run.handle.trainable())
    assert sorted({g["weight_decay"] for g in run.optimizer.param_groups}) == [0.0, 0.1] and 0.1 in decays
    assert not run.held.active and not any(p._backward_hooks for p in host.model.parameters())


def test_after_the_switch_it_equals_a_run_that_starts_there(host):
    """For what waited: the same data and place in the schedule, a fresh optimizer state."""
    run = Run(host)
    run.steps(0, HELD)
    weights, optimizer = run.weights(), copy.deepcopy(run.optimizer.state_dict())
    adapter = run.adapter()
    run.steps(HELD, STEPS)
    expected = run.weights()

    run.handle.remove()
    fresh = Run(host, share=0.5)
    fresh.held = None  # nothing waits in this one
    host.model.load_state_dict(weights)
    for _ in range(HELD):
        fresh.schedule.step()
    state = torch.optim.AdamW(fresh.handle.param_groups(1e-2, weight_decay=0.1, projector_lr=2e-2))
    state.load_state_dict(optimizer)  # the adapter goes on with its moments
    ids = {id(p) for p in fresh.handle.adapter_parameters()}
    fresh.optimizer.state.update({p: s for p, s in state.state.items() if id(p) in ids})
    assert len(fresh.optimizer.state) == len(adapter)
    fresh.steps(HELD, STEPS)
    found = fresh.weights()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("at", [1, HELD, HELD + 1])
def test_a_run_goes_on_in_its_phase(host, at):
    run = Run(host)
    run.steps(0, at)
    weights, optimizer = run.weights(), copy.deepcopy(run.optimizer.state_dict())
    run.steps(at, STEPS)
    expected = run.weights()
    run.handle.remove()
    resumed = Run(host)
    host.model.load_state_dict(weights)
    for _ in range(at):
        resumed.schedule.step()
    resumed.optimizer.load_state_dict(optimizer)
    resumed.steps(at, STEPS)
    assert all(torch.equal(p, expected[n]) for n, p in resumed.weights().items())


def test_the_clipped_norm_is_the_adapters_alone(host):
    run = Run(host)
    run.handle.anatomy.first_linear()[2].weight.data[:, 32:].normal_(0, 0.1)
    run.held.begin_step(0)
    inputs = host.batch([(2, IMAGE, 5)], labels=True).inputs
    run.model(**inputs).loss.backward()
    held = total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    own = total_norm([p.grad for p in run.handle.adapter_parameters()])
    assert torch.allclose(held, own, rtol=1e-6)  # sums over more zeros
    run.held.end()
    run.model(**inputs).loss.backward()
    assert total_norm([p.grad for p in run.model.parameters() if p.grad is not None]) > 1.1 * held


def test_no_share_changes_nothing(host):
    """A share of 0 and none at all: the same groups, the same weights after training."""
    found = []
    stock = copy.deepcopy(host.model.state_dict())
    for share in (None, 0.0):
        run = Run(host, share=share)
        run.steps(0, 2)
        found.append((run.weights(), [len(g["params"]) for g in run.optimizer.param_groups]))
        with pytest.raises(SettingError, match="is not set"):
            run.handle.warm_up(run.optimizer, 4)
        run.handle.remove()
        host.model.load_state_dict(stock)
    assert found[0][1] == found[1][1]
    assert all(torch.equal(found[0][0][n], found[1][0][n]) for n in found[0][0])


def test_under_ddp_it_is_the_same(host, tmp_path):
    """Its buckets see zeros too; one process, so the sums are the same."""
    stock = copy.deepcopy(host.model.state_dict())
    plain = Run(host)
    plain.steps(0, STEPS)
    expected = plain.weights()
    plain.handle.remove()
    host.model.load_state_dict(stock)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        run = Run(host, wrap=torch.nn.parallel.DistributedDataParallel)
        run.steps(0, STEPS)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(p, expected[n]) for n, p in run.weights().items())


def test_remove_lets_gradients_through(host):
    run = Run(host)
    run.held.begin_step(0)
    assert run.held.active
    run.handle.remove()
    assert not run.held.active and not any(p._backward_hooks for p in host.model.parameters())


def test_optimizers_that_it_cannot_reset_are_refused(host):
    handle = patch(host.model, fusion=SkipLinks(stride=2, unfreeze_after=0.5))
    with pytest.raises(SettingError, match="needs torch's Adam or AdamW"):
        handle.warm_up(torch.optim.SGD(host.model.parameters(), lr=1.0), 4)
    with pytest.raises(SettingError, match="mixes the projector"):
        handle.warm_up(torch.optim.AdamW(host.model.parameters()), 4)
    with pytest.raises(SettingError, match="nothing but the projector"):
        handle.warm_up(torch.optim.AdamW(handle.adapter_parameters()), 4)


def test_a_share_is_rounded_up():
    assert [steps_of(share, total) for share, total in ((0.1, 30), (0.1, 3), (0.5, 5), (1.0, 7))] == [3, 1, 3, 7]
