"""The loss itself: its gradient, whose pixels it rebuilds, when it is computed, and that it comes off again."""

import pytest
import torch

from llava_patch import AuxiliaryProbe, DeepStack, DenseConnector, Routing, SkipLinks, patch
from llava_patch.core.errors import InputError, SettingError
from llava_patch.probe.auxiliary.attach import HEAD
from llava_patch.probe.auxiliary.head import Seen, token_errors
from llava_patch.probe.auxiliary.regions import Region, collate
from tests.support.auxiliary import batch, pixels, regions
from tests.support.models import IMAGE
from tests.support.probes import Characters, processor, unique_page

NAMES = ("mm_projector", "multi_modal_projector", "vision_tower")


def _gradients(model, loss):
    """Of projector and vision tower, as one dictionary; None where there is none."""
    named = {n: p for n, p in model.named_parameters() if any(k in n for k in NAMES) and p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_the_gradient_is_that_of_both_losses(host, weight):
    handle = patch(host.model, fusion=SkipLinks(stride=2, train_tower="all"), probe=AuxiliaryProbe(weight=weight))
    host.model.train()
    head, embed = handle.auxiliary.head, handle.anatomy.embed_tokens
    total = _gradients(host.model, host.model(**batch(host, rprobe=regions(host))).loss)
    own = _gradients(host.model, host.model(**batch(host)).loss)
    tokens = handle.anatomy.encode_images(pixels(host))
    errors = token_errors(head, embed, Seen(tokens, pixels(host)), regions(host))
    added = _gradients(host.model, errors.mean())
    assert len(errors) == 5
    reached = {n for n, g in added.items() if g is not None}
    assert any("projector" in n for n in reached) and any("vision_tower" in n for n in reached)
    # Float32 sums in another order: both terms go through tower and projector together. Some gradients are zero but for
    # rounding (a key's bias), hence the scale of all.
    scale = max(float(g.abs().max()) for g in total.values() if g is not None)
    for name in reached:
        expected = own[name] + weight * added[name]
        assert torch.allclose(total[name], expected, rtol=1e-4, atol=1e-6 * scale), name
    assert max(float((weight * g).abs().max()) for g in added.values() if g is not None) > 2e-3 * scale


def test_what_is_frozen_gets_no_gradient_and_the_language_model_none_of_this_loss(host):
    handle = patch(host.model, probe=AuxiliaryProbe(weight=1.0))
    host.model.train()
    handle.anatomy.projector.requires_grad_(False)
    handle.anatomy.tower.requires_grad_(False)
    host.model(**batch(host)).loss.backward()
    own = {n: p.grad.clone() for n, p in host.model.named_parameters() if p.grad is not None and HEAD not in n}
    host.model.zero_grad()
    host.model(**batch(host, rprobe=regions(host))).loss.backward()
    assert all(p.grad is None for p in handle.anatomy.projector.parameters())
    assert all(p.grad is None for p in handle.anatomy.tower.parameters())
    for name, parameter in host.model.named_parameters():
        if name in own:
            assert torch.equal(parameter.grad, own[name]), name
    assert all(p.grad.abs().max() > 0 for p in handle.auxiliary.head.decoder.head.parameters())


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("trained", [True, False], ids=["projector", "frozen"])
def test_a_gradient_where_and_only_where_something_trains(host, reentrant, trained):
    """Also under checkpointing, and of zero in the head on a batch without a region, which DDP needs."""
    handle = patch(host.model, probe=AuxiliaryProbe(weight=1.0))
    handle.anatomy.tower.requires_grad_(False)
    handle.anatomy.projector.requires_grad_(trained)
    host.model.train()
    if reentrant is not None:
        host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        host.model.enable_input_require_grads()
        assert getattr(handle.auxiliary.head.decoder.layers[0], "gradient_checkpointing", True)  # older ones have none
    for given in (regions(host), None):
        host.model.zero_grad()
        host.model(**batch(host, rprobe=given), use_cache=False).loss.backward()
        with_gradient = {n for n, p in host.model.named_parameters() if p.grad is not None}
        assert with_gradient == set(handle.trainable())
        moved = [p.grad.abs().max() > 0 for p in handle.auxiliary.head.decoder.layers.parameters()]
        assert all(moved) if given else not any(moved)
    host.model.gradient_checkpointing_disable()


def _answers(handle, monkeypatch, value=0.0):
    """Make the head answer a constant; its calls."""
    calls = []

    def answer(image_tokens, text_tokens, sequence, injections=None):
        calls.append(image_tokens)
        return torch.full((int(sequence.target.sum()), handle.auxiliary.layout.grid.pixels), value)

    monkeypatch.setattr(handle.auxiliary.head, "forward", answer)
    return calls


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_the_targets_are_the_pixels_under_the_box(host, mode, monkeypatch):
    """A page of unique colours and a wide one: the loss of a head that answers zero is the mean of their squares."""
    handle = patch(host.model, probe=AuxiliaryProbe(weight=1.0))
    page = unique_page(112, 56) if mode == "pad" else unique_page()
    marker = handle.auxiliary.marker(processor(), Characters(), mode)
    transform = marker.transform
    # pad: 112 x 112 shrinks to half, so that the page's 28 x 28 at (56, 0) lie on the cell of row 1, column 2.
    box = (56.0, 0.0, 84.0, 28.0) if mode == "pad" else (28.0, 14.0, 42.0, 28.0)
    marked = marker.mark(Region((box,), "!!"), page.size, "here")
    assert marked["target"].nonzero().flatten().tolist() == [6]
    given = host.batch([(3, IMAGE, 5), (2, IMAGE, 4)], labels=True).inputs
    key = "images" if host.name == "llava" else "pixel_values"
    given[key] = torch.cat([given[key][:1], transform.pixel_values([page])])
    calls = _answers(handle, monkeypatch)
    host.model.train()
    host.model(**given, rprobe=collate([marked], [1]))
    assert torch.equal(calls[0][0], handle.anatomy.encode_images(given[key])[1])  # the tokens of that very image
    cut = given[key][1, :, 14:28, 28:42]
    assert handle.auxiliary.take_logs()["rprobe_loss"] == pytest.approx(float(cut.square().mean()), rel=1e-6)


def test_evaluation_and_generation_compute_nothing(host, monkeypatch):
    given = batch(host)
    expected = host.model(**given)
    handle = patch(host.model, probe=AuxiliaryProbe(weight=1.0))
    calls = _answers(handle, monkeypatch)
    found = host.model(**given, rprobe=regions(host))
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    host.model.train()
    with torch.no_grad():
        assert torch.equal(host.model(**given, rprobe=regions(host)).loss, expected.loss)
    assert not calls and not handle.auxiliary.take_logs()
    host.model(**given, rprobe=regions(host))
    assert len(calls) == 1


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_it_comes_off(host, weight):
    given = batch(host)
    names, expected = list(host.model.state_dict()), host.model(**given).logits  # transformers 5 hooks blocks here
    parts = {n: (dict(vars(m)), len(m._forward_hooks)) for n, m in host.model.named_modules()}
    flags = [p.requires_grad for p in host.model.parameters()]
    handle = patch(host.model, probe=AuxiliaryProbe(weight=weight))
    assert (len(host.model.state_dict()) > len(names)) == (weight > 0)
    assert not hasattr(host.model.config, "llava_patch")  # loading needs nothing of it
    handle.remove()
    assert torch.equal(host.model(**given).logits, expected) and list(host.model.state_dict()) == names
    assert {n: (dict(vars(m)), len(m._forward_hooks)) for n, m in host.model.named_modules()} == parts
    assert [p.requires_grad for p in host.model.parameters()] == flags
    patch(host.model, probe=AuxiliaryProbe()).auxiliary.release()
    assert list(host.model.state_dict()) == names
    from llava_patch import get_handle

    get_handle(host.model).remove()
    assert "_keys_to_ignore_on_save" not in vars(host.model)


def test_the_caller_gets_no_other_random_numbers(host):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    patch(host.model, probe=AuxiliaryProbe())
    assert torch.equal(torch.rand(1), expected)


def test_other_kinds_of_tokens(host):
    """STI's averages have no pixels of their own: they stay context; merged tokens have four patches each."""
    handle = patch(host.model, fusion=DenseConnector(kind="sti", groups=(2, 5)), probe=AuxiliaryProbe(weight=1.0))
    layout = handle.auxiliary.layout
    assert (layout.cells >= 0).sum() == 16 and len(layout.cells) == handle.tokens_per_image == 20
    handle.remove()
    handle = patch(host.model, fusion=SkipLinks(stride=2, merge_size=2), probe=AuxiliaryProbe(weight=1.0))
    assert handle.auxiliary.layout.grid.pixels == 28 * 28 * 3
    host.model.train()
    host.tokens = handle.tokens_per_image
    target = torch.tensor([[False, True, False, True]])
    given = {"image": torch.tensor([0]), "target": target, "text": torch.tensor([[5]]), "counts": torch.tensor([1])}
    host.model(**batch(host, rprobe=given)).loss.backward()
    with pytest.raises(InputError, match="knows 4 tokens an image, the model gave 4 and the collator marked 16"):
        host.model(**batch(host, rprobe=regions(host)))
    handle.remove()


def test_what_deep_stack_adds_reaches_the_head(host):
    """With its projector's gradient, in the layers that the head has (two of six here)."""
    stack = DeepStack(taps=(2, 4, 6), start=0, interval=1)
    handle = patch(host.model, fusion=stack, probe=AuxiliaryProbe(weight=1.0))
    added = handle.adapter_parameters()[4:]
    with torch.no_grad():
        for parameter in added:
            parameter.normal_(std=0.1)
    host.model.train()
    own = torch.autograd.grad(host.model(**batch(host)).loss, added)
    both = torch.autograd.grad(host.model(**batch(host, rprobe=regions(host))).loss, added)
    assert handle.auxiliary.head.decoder.injection_layers == (0, 1)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(own, both, strict=True))
    host.model(**batch(host)).loss.backward()
    assert all(p.grad is not None for p in handle.auxiliary.head.parameters())


def test_share_of_the_steps_is_the_same_everywhere(host):
    handle = patch(host.model, probe=AuxiliaryProbe(share=0.25, seed=7))
    with pytest.raises(InputError, match=r"share = 0.25: call handle.auxiliary.begin_step"):
        _ = handle.auxiliary.computes
    chosen = []
    for step in range(2000):
        handle.auxiliary.begin_step(step)
        chosen.append(handle.auxiliary.computes)
    assert 0.22 < sum(chosen) / 2000 < 0.28
    for step in range(500, 600):  # a resumed run
        handle.auxiliary.begin_step(step)
        assert handle.auxiliary.computes == chosen[step]
    handle.auxiliary.begin_step(chosen.index(False))
    host.model.train()
    host.model(**batch(host, rprobe=regions(host)))
    assert "rprobe_loss" not in handle.auxiliary.take_logs()


def test_positions_stay_exact_in_half_precision(host):
    handle = patch(host.model, probe=AuxiliaryProbe())
    exact = handle.auxiliary.head.decoder.inv_freq.clone()
    host.model.bfloat16()
    head = handle.auxiliary.head
    assert head.dtype == torch.bfloat16 and torch.equal(head.decoder.inv_freq, exact)
    host.model.train()
    loss = host.model(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(host).items()},
                      rprobe=regions(host)).loss  # fmt: skip
    loss.backward()
    assert torch.isfinite(loss)


def test_a_step_of_several_batches_is_weighted_as_the_trainer_weights_them(host):
    """With the number of labels of the step given, a batch counts by its share of it."""
    if host.name == "llava":
        pytest.skip("llava's forward does not take num_items_in_batch")
    handle = patch(host.model, probe=AuxiliaryProbe(weight=1.0))
    host.model.train()
    given = batch(host)
    labels = int((given["labels"] != -100).sum())
    alone = host.model(**given, rprobe=regions(host), num_items_in_batch=labels).loss
    own = host.model(**given, num_items_in_batch=labels).loss
    half = host.model(**given, rprobe=regions(host), num_items_in_batch=2 * labels).loss
    assert torch.allclose(half, alone / 2) and alone > own
    logs = handle.auxiliary.take_logs()
    assert logs["ntp_loss"] == pytest.approx(float(own), rel=1e-6)  # each batch weighs as much as it counts


def test_settings_that_contradict_each_other(host):
    with pytest.raises(SettingError, match="would train nothing but its own head"):
        patch(host.model, routing=Routing(split=3), probe=AuxiliaryProbe())
    with pytest.raises(SettingError, match=r"patch\(probe=.*expected AuxiliaryProbe"):
        patch(host.model, probe=SkipLinks())
    handle = patch(host.model, probe=AuxiliaryProbe())
    with pytest.raises(SettingError, match="give both to one call of patch"):
        patch(host.model, fusion=SkipLinks(stride=2))
    with pytest.raises(SettingError, match="already carries probe"):
        patch(host.model, probe=AuxiliaryProbe(weight=3.0))
    handle.remove()
    for bad in ({"weight": -1}, {"share": 0}, {"max_text_tokens": 0}, {"lr": 0}, {"rope": "x"}, {"broken": "x"}):
        with pytest.raises(SettingError, match=f"AuxiliaryProbe.{next(iter(bad))} = "):
            AuxiliaryProbe(**bad)


def test_the_head_has_a_learning_rate_and_leads_in_a_warm_up(host):
    fusion = SkipLinks(stride=2, unfreeze_after=0.5)
    handle = patch(host.model, fusion=fusion, probe=AuxiliaryProbe(lr=3e-3))
    handle.anatomy.tower.requires_grad_(False)
    groups = handle.param_groups(1e-4)
    head = {id(p) for p in handle.auxiliary.head.parameters()}
    rates = {group["lr"] for group in groups if any(id(p) in head for p in group["params"])}
    assert rates == {3e-3} and {group["lr"] for group in groups} == {3e-3, 1e-4}
    held = handle.warm_up(torch.optim.AdamW(groups), 10)
    host.model.train()
    held.begin_step(0)
    host.model(**batch(host, rprobe=regions(host))).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in handle.auxiliary.head.decoder.head.parameters())
    assert not handle.anatomy.lm_head.weight.grad.any()


def test_regions_without_labels_are_refused(host):
    patch(host.model, probe=AuxiliaryProbe())
    host.model.train()
    given = batch(host)
    del given["labels"]
    host.model(**given)
    with pytest.raises(InputError, match="without labels"):
        host.model(**given, rprobe=regions(host))


def test_an_image_is_not_needed_to_hold_the_graph_together(host):
    handle = patch(host.model, probe=AuxiliaryProbe())
    host.model.train()
    host.model(**host.batch([(5,), (3,)], labels=True).inputs).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in handle.auxiliary.head.parameters())
