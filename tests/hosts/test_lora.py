"""peft's LoRA and a patch on one model, in both orders, on both hosts."""

import copy

import pytest
import torch

from llava_patch import Routing, get_handle, patch
from llava_patch.core.errors import SettingError
from llava_patch.integrations.training import llava as training
from tests.support import models
from tests.support.models import IMAGE

peft = pytest.importorskip("peft")
BESIDE = Routing(split=3, freeze="none")


def _lora(model, **options):
    """LoRA on some projections of every decoder layer, with an update that is not zero."""
    where = r"(?!.*vision_tower).*\.(layers|side_branch)\.\d+\..*(q_proj|v_proj|down_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=where, **options)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def _inputs(host):
    return host.batch([(2, IMAGE, 5), (6, IMAGE, 3)], labels=True).inputs


def _flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def _trained(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_lora_first_then_the_patch(host, options):
    model = _lora(host.model, **options)
    inputs = _inputs(host)
    with torch.no_grad():
        before = model(**inputs).logits
    flags = _flags(model)
    handle = patch(model, routing=BESIDE)
    branch = host.decoder.side_branch[0]
    assert not [n for n, _ in branch.named_parameters() if "lora_" in n]
    assert type(branch.self_attn.q_proj) is torch.nn.Linear
    for name in ("q_proj", "k_proj", "v_proj"):  # with the update merged in where there is one
        merged = copy.deepcopy(getattr(host.decoder.layers[3].self_attn, name))
        if hasattr(merged, "merge"):
            merged.merge()
            merged = merged.get_base_layer()
        assert torch.equal(getattr(branch.self_attn, name).weight, merged.weight)
    assert all(p.requires_grad for p in branch.parameters())
    model.train()
    model(**inputs).loss.backward()
    trained = _trained(model)
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_B" in n for n in trained) and any("side_branch.0.mlp.down_proj.weight" in n for n in trained)
    model.eval()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert _flags(model) == flags


def test_the_patch_first_then_lora(host):
    """LoRA lands on the side branch as well, and trains there as everywhere; the branch's own weights are frozen."""
    inputs = _inputs(host)
    base = copy.deepcopy(host.model)
    handle = patch(host.model, routing=BESIDE)
    model = _lora(host.model)
    names = [n for n in handle.trainable() if "side_branch" in n]
    assert names and all("lora_" in n for n in handle.trainable())
    model.train()
    model(**inputs).loss.backward()
    assert {n for n in _trained(model) if "side_branch" in n} == {f"base_model.model.{n}" for n in names}
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        merged = model.merge_and_unload()  # in place: what model had of LoRA is gone after it
        assert models.close(merged(**inputs).logits, expected)
    handle = get_handle(merged)
    assert not any("lora_" in n for n, _ in merged.named_parameters())
    handle.remove()
    with torch.no_grad():
        assert models.close(merged(**inputs).logits, _lora(base).merge_and_unload()(**inputs).logits)


def test_remove_leaves_the_flags_that_peft_has_set(host):
    handle = patch(host.model, routing=BESIDE)
    model = _lora(host.model)
    handle.remove()
    assert all(flag == ("lora_" in name) for name, flag in _flags(model).items())
    assert not hasattr(host.decoder, "side_branch")


@pytest.mark.parametrize("freeze", ["all_but_single", "side_and_fusion"])
def test_a_strategy_that_would_freeze_lora_is_refused(host, freeze):
    model = _lora(host.model)
    flags = _flags(model)
    with pytest.raises(SettingError, match=rf'Routing.freeze = "{freeze}" would freeze the LoRA layers'):
        patch(model, routing=Routing(split=3, freeze=freeze))
    assert _flags(model) == flags and get_handle(model) is None and not hasattr(host.decoder, "side_branch")


def test_lora_that_does_not_train_may_be_frozen(host):
    model = _lora(host.model)
    model.requires_grad_(False)
    handle = patch(model, routing=Routing(split=3))
    assert all("side_branch" in name for name in handle.trainable())


def test_a_script_that_puts_lora_everywhere_leaves_the_side_branch_whole(host):
    """LLaVA's script does so with a model that was loaded patched."""
    patch(host.model, routing=Routing(split=3))
    expected = {n: p.clone() for n, p in host.decoder.side_branch.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(host.model, config)
    patch(model, routing=Routing(split=3, freeze="none"))  # what trains may change; the rest may not
    handle = training.prepare(model, None, None, None)
    found = dict(host.decoder.side_branch.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) and found[n].requires_grad for n in expected)
    assert any("lora_" in n for n in handle.trainable())
    excluded = model.peft_config["default"].exclude_modules
    assert peft.tuners.tuners_utils.match_target_against_key(excluded, "model.side_branch.0.self_attn.q_proj")
    assert not peft.tuners.tuners_utils.match_target_against_key(excluded, "model.layers.0.self_attn.q_proj")


def test_quantised_weights_are_refused(host):
    linear = host.decoder.layers[3].mlp.up_proj
    linear.weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SettingError, match=r"quantised \(mlp.up_proj.weight is torch.int8\)"):
        patch(host.model, routing=Routing(split=3))
    assert get_handle(host.model) is None
