"""The head on its own: whose tokens it gets, where they sit, what it costs idle, and on which device it runs."""

import logging

import pytest
import torch

from llava_patch import AuxiliaryProbe, DeepStack, SkipLinks, patch
from llava_patch.core.errors import InputError
from llava_patch.probe.auxiliary import attach
from llava_patch.probe.auxiliary.head import Seen, token_errors, zero_gradient_pass
from llava_patch.probe.auxiliary.regions import Region, collate
from llava_patch.probe.sequence import build_sequence
from llava_patch.probe.view import encode_views, target_tokens
from tests.support.auxiliary import batch, pixels, regions
from tests.support.models import Host, hf_model
from tests.support.probes import Characters, processor, unique_page


def _sequences(head, monkeypatch):
    """What the head is called with; the calls go on."""
    calls, original = [], head.forward

    def forward(image_tokens, text_tokens, sequence, injections=None):
        calls.append((image_tokens, text_tokens, sequence, injections))
        return original(image_tokens, text_tokens, sequence, injections)

    monkeypatch.setattr(head, "forward", forward)
    return calls


@pytest.mark.parametrize("fusion", [None, "merge", "stack"])
def test_the_sequence_is_r_probes(host, fusion, monkeypatch):
    """Of the same image, box and text: order, places, tokens, and what DeepStack adds."""
    fusion = {"merge": SkipLinks(stride=2, merge_size=2), "stack": DeepStack(taps=(2, 4, 6), start=0, interval=1)}.get(
        fusion
    )
    handle = patch(host.model, fusion=fusion, probe=AuxiliaryProbe())
    marker = handle.auxiliary.marker(processor(), Characters(), "resize")
    page, box, name = unique_page(), (15.0, 15.0, 27.0, 27.0), "here"
    view = encode_views(handle.anatomy, marker.transform, [page])[0]
    target = target_tokens(view, [marker.transform.box(box, page.size, name)], name)[None]
    text = torch.tensor(Characters()("!?", add_special_tokens=False)["input_ids"])
    start = torch.tensor([view.text_start])
    expected = build_sequence(target, torch.ones_like(target), view.positions[None], torch.tensor([2]), start, 2)

    calls = _sequences(handle.auxiliary.head, monkeypatch)
    marked = collate([marker.mark(Region((box,), "!?"), page.size, name)], [0])
    given = marker.transform.pixel_values([page])
    host.model.train()
    tokens = handle.anatomy.encode_images(given)
    injections = None if view.injections is None else view.injections[:, None]
    token_errors(handle.auxiliary.head, handle.anatomy.embed_tokens, Seen(tokens, given, injections), marked)
    image_tokens, text_tokens, sequence, added = calls[0]
    for ours, theirs in zip(vars(sequence).values(), vars(expected).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(image_tokens[0], view.tokens) and torch.equal(text_tokens[0], handle.anatomy.embed_tokens(text))
    assert (added is None) == (fusion is None or not isinstance(fusion, DeepStack))
    assert added is None or torch.equal(added[0], view.injections)


def test_each_region_gets_what_belongs_to_its_image(host):
    """Tokens, pixels and DeepStack's additions: the regions of a batch in another order have the same errors."""
    handle = patch(host.model, fusion=DeepStack(taps=(2, 4, 6), start=0, interval=1), probe=AuxiliaryProbe(weight=1.0))
    given = regions(host)
    other = {name: value.flip(0) for name, value in given.items()}
    with torch.no_grad():
        tokens = handle.anatomy.encode_images(pixels(host))
        added = torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(0))
        seen = Seen(tokens, pixels(host), added)
        head, embed = handle.auxiliary.head, handle.anatomy.embed_tokens
        errors, flipped = token_errors(head, embed, seen, given), token_errors(head, embed, seen, other)
    # Rows of a batch in another order: matrix products may round differently.
    assert torch.allclose(errors, torch.cat([flipped[3:], flipped[:3]]), rtol=1e-4)
    assert not torch.allclose(errors[:2], errors[2:4], rtol=1e-2)


def test_the_idle_head_runs_on_two_tokens(host, monkeypatch):
    handle = patch(host.model, probe=AuxiliaryProbe())
    head, used = handle.auxiliary.head, []
    for module in head.modules():
        own = list(module.parameters(recurse=False))
        if own:
            module.register_forward_pre_hook(lambda m, args: used.append(m))
    token_errors(head, handle.anatomy.embed_tokens, _seen(handle, host), regions(host))
    real = list(used)
    used.clear()
    calls = _sequences(head, monkeypatch)
    nothing = zero_gradient_pass(head, handle.anatomy.embed_tokens)
    assert used == real  # ZeRO-3 gathers weights in one order on all ranks
    assert calls[0][0].shape[:2] == (1, 1) and calls[0][2].order.shape == (1, 2)
    assert float(nothing.detach()) == 0.0
    nothing.backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def _seen(handle, host):
    return Seen(handle.anatomy.encode_images(pixels(host)), pixels(host))


@pytest.mark.parametrize("number", [9, -1])
def test_an_image_that_the_batch_does_not_have(host, number):
    patch(host.model, probe=AuxiliaryProbe())
    host.model.train()
    given = regions(host)
    given["image"] = torch.tensor([0, number])
    count = len(pixels(host))
    with pytest.raises(InputError, match=f"belongs to image {number} of the batch, which has {count} "):
        host.model(**batch(host, rprobe=given))


def test_a_run_without_any_region_is_told_once(host, monkeypatch, caplog):
    monkeypatch.setattr(attach, "SILENT_BATCHES", 3)
    handle = patch(host.model, probe=AuxiliaryProbe())
    host.model.train()
    with caplog.at_level(logging.WARNING, logger="llava_patch"):
        for _ in range(2):
            host.model(**batch(host))
        assert "none of the first" not in caplog.text
        for _ in range(5):
            host.model(**batch(host))
        assert caplog.text.count("none of the first 3 training batches") == 1
        assert "'rprobe'" in caplog.text and "remove_unused_columns" in caplog.text
        handle.remove()
        caplog.clear()
        patch(host.model, probe=AuxiliaryProbe())
        host.model(**batch(host, rprobe=regions(host)))
        for _ in range(5):
            host.model(**batch(host))
    assert not caplog.text


def test_regions_change_nothing_outside_of_training(host):
    handle = patch(host.model, probe=AuxiliaryProbe(weight=1.0))
    host.model.eval()
    assert torch.equal(host.model(**batch(host, rprobe=regions(host))).loss, host.model(**batch(host)).loss)
    host.model.train()
    with torch.no_grad():
        assert torch.equal(host.model(**batch(host, rprobe=regions(host))).loss, host.model(**batch(host)).loss)
    assert handle.auxiliary.take_logs() == {}


def test_weight_zero_goes_with_what_the_loss_does_not():
    from llava_patch import Routing

    model = hf_model()
    handle = patch(model, routing=Routing(split=3), probe=AuxiliaryProbe(weight=0))
    assert handle.auxiliary.head is None


def test_a_head_on_another_device_than_tokens_embedding_and_loss(monkeypatch):
    """A device_map over several devices, played with fake tensors, whose operations refuse mixed devices."""
    from types import SimpleNamespace

    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    host = Host("hf", hf_model())
    handle = patch(host.model, probe=AuxiliaryProbe())
    auxiliary, head = handle.auxiliary, handle.auxiliary.head
    given, seen = regions(host), _seen(handle, host)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    for module in head.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("lazy"))
                    store[name] = torch.nn.Parameter(fake) if store is module._parameters else fake
    with mode:
        fakes = {name: mode.from_tensor(value) for name, value in given.items()}
        here = Seen(mode.from_tensor(seen.tokens.detach()), mode.from_tensor(seen.pixels))
        embed = torch.nn.Embedding(96, 64)
        assert token_errors(head, embed, here, fakes).device.type == "lazy"
        labels = torch.zeros(3, 4, dtype=torch.int64)
        auxiliary.anatomy = SimpleNamespace(embed_tokens=embed)
        noted = []
        monkeypatch.setattr(auxiliary, "_note", lambda loss, weight, errors: noted.append(errors))
        there = {n: FakeTensor(mode, v.to("meta"), torch.device("lazy")) for n, v in given.items()}
        for regions_given in (there, None):
            auxiliary._seen = here
            outputs = SimpleNamespace(loss=torch.zeros(()))
            assert auxiliary._add(outputs, regions_given, {"labels": labels}).loss.device.type == "cpu"
        assert noted[0].device.type == "cpu" and noted[1] is None
