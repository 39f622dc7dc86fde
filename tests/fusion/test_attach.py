"""Detached Skip-Links on whole models of both hosts."""

import pytest
import torch
from models import IMAGE

from llava_patch import Routing, SkipLinks, patch
from llava_patch.errors import HostError, SettingError

SAMPLES = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [SkipLinks(stride=2), SkipLinks(layers=(1, 5, 8), detach=3)], ids=str)
def test_zero_start_is_stock(host, dtype, settings):
    host.model.to(dtype)
    batch = host.batch(SAMPLES)
    key = "images" if host.name == "llava" else "pixel_values"
    batch.inputs[key] = batch.inputs[key].to(dtype)
    stock = host.logits(batch)
    handle = patch(host.model, fusion=settings)
    assert torch.equal(host.logits(batch), stock)
    handle.anatomy.first_linear()[2].weight[:, 32:].normal_()
    assert not torch.equal(host.logits(batch), stock)  # the taps do reach the projector
    handle.remove()


@torch.no_grad()
def test_the_projector_sees_the_blocks_it_was_promised(host):
    """Columns of the fused feature against hidden states of the tower run by hand."""
    pixels = torch.randn(2, 3, 56, 56)
    from llava_patch.hosts import anatomy

    vision = anatomy.find(host.model).vision_model
    states = vision(pixels, output_hidden_states=True).hidden_states
    seen = []
    with patch(host.model, fusion=SkipLinks(stride=3, detach=1)) as handle:
        linear = handle.anatomy.first_linear()[2]
        hook = linear.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        handle.anatomy.encode_images(pixels)
        hook.remove()
        assert handle.taps.blocks == (3, 6)
    assert torch.equal(seen[0], torch.cat([states[7], states[6], states[3]], -1)[:, 1:])


def _tower_gradients(host, settings):
    torch.manual_seed(0)
    with patch(host.model, fusion=settings) as handle:
        generator = torch.Generator().manual_seed(1)
        weight = handle.anatomy.first_linear()[2].weight
        with torch.no_grad():
            weight[:, 32:] = 0.1 * torch.randn(weight[:, 32:].shape, generator=generator)
        host.model.zero_grad()
        logits = host.model(**host.batch([(2, IMAGE, 5)]).inputs).logits
        logits.square().mean().backward()
        parameters = handle.anatomy.vision_model.named_parameters()
        return logits.detach(), {n: p.grad.clone() for n, p in parameters if p.grad is not None}


def _main_path_gradients(host, settings):
    """The main path alone: the taps are constants from a second run of the tower."""
    from llava_patch.fusion import attach

    original = attach.fuse
    vision_states = []

    def constant_taps(hidden_states, taps):
        if not vision_states:
            vision_states.extend(s.detach().clone() for s in hidden_states)
        parts = [hidden_states[taps.main], *(vision_states[b] for b in reversed(taps.blocks))]
        return torch.cat(parts, -1)

    attach.fuse = constant_taps
    try:
        return _tower_gradients(host, settings)[1]
    finally:
        attach.fuse = original


def test_a_detached_tap_contributes_no_gradient(host):
    everything = SkipLinks(layers=(2, 4, 6), detach=3, train_tower="all")
    logits, detached = _tower_gradients(host, everything)
    main = _main_path_gradients(host, everything)
    assert detached.keys() == main.keys()
    assert all(torch.equal(detached[n], main[n]) for n in main)
    same_logits, attached = _tower_gradients(host, SkipLinks(layers=(2, 4, 6), detach=0, train_tower="all"))
    assert torch.equal(logits, same_logits)  # the forward output does not depend on detach
    assert any(not torch.allclose(attached[n], main[n], rtol=1e-2) for n in main)


def test_the_tower_runs_once(host):
    calls = []
    with patch(host.model, fusion=SkipLinks(stride=2)) as handle:
        hook = handle.anatomy.vision_model.register_forward_hook(lambda *a: calls.append(1))
        host.model(**host.batch([(2, IMAGE, 5)]).inputs)
        hook.remove()
    assert len(calls) == 1


def test_no_grad_is_lifted_only_while_the_tower_trains(host):
    if host.name == "hf":
        pytest.skip("HF runs its tower with gradients")
    pixels = torch.randn(1, 3, 56, 56)
    with patch(host.model, fusion=SkipLinks(stride=2)):
        assert not host.model.get_vision_tower()(pixels).requires_grad
    with patch(host.model, fusion=SkipLinks(stride=2, train_tower=1)) as handle:
        assert host.model.get_vision_tower()(pixels).requires_grad
        handle.anatomy.vision_model.requires_grad_(False)
        assert not host.model.get_vision_tower()(pixels).requires_grad
    assert "forward" not in vars(host.model.get_vision_tower())


def test_a_tower_that_is_loaded_later_is_tapped_then(tower_folder):
    import models
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = models.llava_model(tower_folder)
    late = LlavaLlamaForCausalLM(model.config)
    late.load_state_dict(model.state_dict(), strict=False)
    assert not late.get_vision_tower().is_loaded
    handle = patch(late.eval(), fusion=SkipLinks(stride=2))
    late.get_vision_tower().load_model()
    host = models.Host("llava", late)
    with torch.no_grad():
        batch = host.batch(SAMPLES)
        assert torch.equal(host.logits(batch), models.Host("llava", model).logits(batch))
    handle.remove()
    assert "load_model" not in vars(late.get_vision_tower())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion": SkipLinks(layers=(3, 9))}, "block 9 is outside"),
        ({"fusion": SkipLinks(stride=2, train_tower=8)}, "only 7 blocks"),
        ({"fusion": (SkipLinks(), SkipLinks(stride=3))}, "one fusion"),
        ({"fusion": SkipLinks(train_tower="all", stride=2), "routing": Routing(split=2)}, "contradicts Routing.freeze"),
        ({"fusion": Routing(split=2)}, "expected SkipLinks"),
    ],
)
def test_refused_before_anything_changes(host, arguments, message):
    keys, attributes = list(host.model.state_dict()), dict(vars(host.model))
    with pytest.raises(SettingError, match=message):
        patch(host.model, **arguments)
    assert list(host.model.state_dict()) == keys
    assert vars(host.model).keys() == attributes.keys()


def test_two_fusions_are_refused(host):
    with patch(host.model, fusion=SkipLinks(stride=2)):
        with pytest.raises(SettingError, match="already carries fusion"):
            patch(host.model, fusion=SkipLinks(stride=3))
        assert patch(host.model, fusion=SkipLinks(stride=2)).fusion == SkipLinks(stride=2)


def test_the_hosts_own_layer_fusion_is_not_fused_again(host):
    if host.name == "llava":
        pytest.skip("llava selects one layer")
    host.model.config.vision_feature_layer = [-2, 3]
    with pytest.raises(HostError, match="already fuses several layers"):
        patch(host.model, fusion=SkipLinks(stride=2))


def test_a_projector_of_another_width_is_refused(host):
    from llava_patch.hosts import anatomy

    parent, name, linear = anatomy.find(host.model).first_linear()
    setattr(parent, name, torch.nn.Linear(64, linear.out_features))
    with pytest.raises(SettingError, match="takes 64 channels, but this tower gives 32"):
        patch(host.model, fusion=SkipLinks(stride=2))


def test_a_fusion_that_stays_at_zero_is_reported(host):
    handle = patch(host.model, fusion=SkipLinks(stride=2), routing=Routing(split=3))
    assert "SkipLinks does nothing: its new weights are zero and frozen" in handle.report()
    handle.anatomy.projector.requires_grad_(True)
    assert "does nothing" not in handle.report()
    handle.remove()
    assert repr(handle).endswith("(removed)>")
