"""Gradients of a routed model: who gets one, and no autograd where nothing trains."""

import pytest
import torch
from models import IMAGE, LAYERS

from llava_patch import Routing, SkipLinks, patch

SAMPLES = [(2, IMAGE, 5), (7,), (3, IMAGE, 4)]


def _loss(host, samples=SAMPLES):
    return host.model(**host.batch(samples, labels=True).inputs, use_cache=False).loss


def _with_gradient(model):
    return [n for n, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "settings",
    [
        {"routing": Routing(split=3)},
        {"routing": Routing(split=2, side_layers=2, fusion_layers=2, freeze="side_and_fusion")},
        {"routing": Routing(split=3, freeze="none")},
        {"routing": Routing(split=0)},
        {"fusion": SkipLinks(stride=2)},
        {"fusion": SkipLinks(stride=2, train_tower="all")},
        {"fusion": SkipLinks(stride=2, detach=0, train_tower=2)},
        {"fusion": SkipLinks(stride=2), "routing": Routing(split=3)},
        {"fusion": SkipLinks(stride=3, train_tower="all"), "routing": Routing(split=3, freeze="none")},
    ],
    ids=str,
)
def test_a_parameter_has_a_gradient_iff_it_is_listed(host, settings):
    handle = patch(host.model, **settings)
    host.model.train()
    _loss(host).backward()
    assert _with_gradient(host.model) == handle.trainable()
    assert handle.trainable()
    handle.remove()


def test_the_side_branch_learns_through_one_fusion_layer(host):
    with patch(host.model, routing=Routing(split=3)):
        host.model.train()
        _loss(host).backward()
        assert all(p.grad.abs().sum() > 0 for p in host.decoder.side_branch.parameters())


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_no_graph_below_the_split(host, reentrant):
    """Also when checkpointing and enable_input_require_grads make the embeddings require a gradient."""
    host.model.train()
    host.model.enable_input_require_grads()
    if reentrant is not None:
        host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen = {}
    with patch(host.model, routing=Routing(split=3)):
        hooks = [
            layer.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out.requires_grad}))
            for i, layer in enumerate(host.decoder.layers)
        ]
        _loss(host).backward()
        assert [seen[i] for i in range(LAYERS - 1)] == [False] * (LAYERS - 1)
        assert all(p.grad is not None for p in host.decoder.side_branch.parameters())
        for hook in hooks:
            hook.remove()


def test_a_gradient_that_is_wanted_below_the_split_is_kept(host):
    for parameter in host.model.parameters():
        parameter.requires_grad_(False)
    with patch(host.model, routing=Routing(split=3)):
        host.model.train()
        host.decoder.layers[0].mlp.down_proj.weight.requires_grad_(True)
        _loss(host).backward()
        assert host.decoder.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("freeze", ["all_but_single", "none"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(host, freeze, reentrant):
    handle = patch(host.model, routing=Routing(split=2, fusion_layers=2, freeze=freeze))
    host.model.train()
    _loss(host).backward()
    plain = {n: p.grad.clone() for n, p in host.model.named_parameters() if p.grad is not None}
    host.model.zero_grad()
    host.model.enable_input_require_grads()
    host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _loss(host).backward()
    again = {n: p.grad for n, p in host.model.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.allclose(again[name], gradient, rtol=1e-4, atol=1e-7), name
    handle.remove()


def test_a_batch_without_image_gives_zero_gradients_not_none(host):
    with patch(host.model, routing=Routing(split=3)):
        host.model.train()
        batch = host.batch([(7,), (4,)], labels=True)
        host.model(**batch.inputs, use_cache=False).loss.backward()
        for parameter in host.decoder.side_branch.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_frozen_parameters_do_not_move(host):
    handle = patch(host.model, routing=Routing(split=3))
    host.model.train()
    before = {n: p.detach().clone() for n, p in host.model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in host.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(host).backward()
        optimizer.step()
    trained = set(handle.trainable())
    for name, parameter in host.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    handle.remove()
