"""A projector that peft trains, in full (`modules_to_save`) or by LoRA, and a fusion, patched before or after."""

import pytest
import torch

from llava_patch import DeepStack, SkipLinks, patch
from llava_patch.fusion.linear import FusedLinear
from tests.support.models import IMAGE

peft = pytest.importorskip("peft")
NAMES = {"hf": "multi_modal_projector", "llava": "mm_projector"}
LINEARS = {"hf": r".*multi_modal_projector\.linear_[12]", "llava": r".*mm_projector\.[02]"}


def _peft(host, kind, changed=True):
    """peft's model; with `changed` what it trains is not what it began with."""
    if kind == "in full":
        options = {"target_modules": r".*layers\.3\.self_attn\.q_proj", "modules_to_save": [NAMES[host.name]]}
    else:
        options = {"target_modules": LINEARS[host.name], "use_dora": kind == "dora"}
    model = peft.get_peft_model(host.model, peft.LoraConfig(r=4, **options)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if changed and parameter.requires_grad and "magnitude" not in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _logits(model, host):
    with torch.no_grad():
        return model(**host.batch([(2, IMAGE, 5), (6, IMAGE, 3)]).inputs).logits


def _learn(model, host):
    """Names of what has got a gradient that is not zero."""
    model(**host.batch([(2, IMAGE, 5), (6, IMAGE, 3)], labels=True).inputs).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("kind", ["in full", "lora", "dora"])
@pytest.mark.parametrize("fusion", [SkipLinks(stride=2), DeepStack(taps=(2, 4), start=0)], ids=["columns", "layers"])
def test_patched_afterwards(host, kind, fusion):
    model = _peft(host, kind)
    before, flags = _logits(model, host), {n: p.requires_grad for n, p in model.named_parameters()}
    handle = patch(model, fusion=fusion)
    assert torch.equal(_logits(model, host), before)  # new weights are zero
    assert "does nothing" not in handle.report()
    with model.disable_adapter():
        _logits(model, host)  # the original is as wide
    trained = _learn(model, host)
    if isinstance(fusion, SkipLinks):
        own = [p for n, p in model.named_parameters() if n in trained and p.ndim == 2 and p.shape[1] > 64]
        assert own and any(p.grad[:, 32:].any() for p in own)  # the taps' columns learn
    else:
        assert any(f"{NAMES[host.name]}_stack" in name for name in trained)
    handle.remove()
    assert torch.equal(_logits(model, host), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("order", ["before", "afterwards"])
@pytest.mark.parametrize("kind", ["in full", "lora", "dora"])
def test_a_shared_projector_takes_the_taps_as_peft_has_it(host, kind, order):
    """What computes under peft is what projects the taps; nothing is added, and nothing else learns."""
    shared = DeepStack(taps=(2, 4), start=0, projector="shared")
    handle = patch(host.model, fusion=shared) if order == "before" else None
    model = _peft(host, kind)
    handle = handle or patch(model, fusion=shared)
    assert not any("_stack" in name for name in model.state_dict())
    patched = _logits(model, host)
    with model.disable_adapter():
        assert not torch.equal(_logits(model, host), patched)
    learnt = _learn(model, host)
    assert any(NAMES[host.name] in name for name in learnt)
    assert all("lora_" in name or "modules_to_save" in name for name in learnt)
    handle.remove()
    before = _logits(model, host)
    assert not torch.equal(before, patched)
    projector = handle.anatomy.projector
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in projector.modules())


@pytest.mark.parametrize("kind", ["in full", "lora"])
def test_patched_before(host, kind):
    stock = _logits(host.model, host)
    handle = patch(host.model, fusion=SkipLinks(stride=2))
    model = _peft(host, kind, changed=False)
    assert torch.equal(_logits(model, host), stock)
    assert "does nothing" not in handle.report()
    assert any(n in _learn(model, host) for n in (f"base_model.model.{name}" for name in handle.trainable()))
    handle.remove()
    assert torch.equal(_logits(model, host), stock)
    assert not any(isinstance(part, FusedLinear) for part in model.modules())
    projector = handle.anatomy.projector
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in projector.modules())


def test_patched_before_and_merged(host):
    handle = patch(host.model, fusion=SkipLinks(stride=2))
    model = _peft(host, "lora")
    fused = _logits(model, host)
    merged = model.merge_and_unload()
    assert torch.allclose(_logits(merged, host), fused, atol=1e-4)
    assert isinstance(handle.anatomy.first_linear()[2], FusedLinear)
    handle.remove()
    _logits(merged, host)
