"""After undo the model is what it was: output, state dict, hooks and the attributes of every module."""

import itertools

import pytest
import torch

from llava_patch import AuxiliaryProbe, DeepStack, FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import SettingError
from tests.support.models import IMAGE, LAYERS

SETTINGS = [
    {"fusion": SkipLinks(stride=2)},
    {"fusion": SkipLinks(stride=2, train_tower="all")},
    {"routing": Routing(split=2)},
    {"routing": Routing(split=2, freeze="side_and_fusion", side_layers=2)},
    {"fusion": SkipLinks(stride=3), "routing": Routing(split=3)},
    {"fusion": DeepStack(start=0, interval=1)},
    {"pruning": FastV(layer=2)},
    {"fusion": SkipLinks(stride=2), "probe": AuxiliaryProbe(weight=0.1)},
]


def _snapshot(model):
    def attributes(module):
        return {k: v for k, v in vars(module).items() if not k.startswith("_")}

    hooks = {
        n: [len(v) for k, v in sorted(vars(m).items()) if k.endswith("hooks") and v is not None]
        for n, m in model.named_modules()
    }
    return {
        "attributes": {n: attributes(m) for n, m in model.named_modules()},
        "private": {n: set(vars(m)) for n, m in model.named_modules()},
        "children": {n: [(k, id(c)) for k, c in m.named_children()] for n, m in model.named_modules()},
        "hooks": hooks,
        "config": dict(model.config.to_dict()),
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "tensors": {n: id(p) for n, p in model.named_parameters()},
        "keys": list(model.state_dict()),
    }


def _same(before, after):
    for part in before:
        assert before[part] == after[part], part


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_undo_restores_everything(host, settings):
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 4)])
    with torch.no_grad():
        stock = host.logits(batch)
    before = _snapshot(host.model)
    handle = patch(host.model, **settings)
    during = _snapshot(host.model)
    assert any(before[part] != during[part] for part in before)  # the patch was not empty
    with torch.no_grad():
        if "routing" in settings:
            assert not torch.equal(host.logits(batch), stock)
        for parameter in handle.anatomy.projector.parameters():
            if "fusion" in settings:
                parameter.add_(0.0)
    handle.remove()
    handle.remove()  # twice is once
    _same(before, _snapshot(host.model))
    with torch.no_grad():
        assert torch.equal(host.logits(batch), stock)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_undo_after_an_exception_in_the_middle_of_a_forward(host, settings):
    batch = host.batch([(2, IMAGE, 5)])
    with torch.no_grad():
        stock = host.logits(batch)
    before = _snapshot(host.model)

    def fail(*args):
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory"), patch(host.model, **settings):
        hook = host.decoder.layers[LAYERS - 2].register_forward_hook(fail)
        try:
            host.logits(batch)
        finally:
            hook.remove()
    _same(before, _snapshot(host.model))
    with torch.no_grad():
        assert torch.equal(host.logits(batch), stock)


@pytest.mark.parametrize(
    "settings",
    [
        {"fusion": SkipLinks(stride=2), "routing": Routing(split=7)},
        {"fusion": SkipLinks(stride=2), "routing": Routing(split=4, side_layers=3)},
        {"fusion": SkipLinks(stride=2, train_tower=8), "routing": Routing(split=3, freeze="none")},
    ],
    ids=str,
)
def test_undo_after_an_exception_in_the_middle_of_a_patch(host, settings):
    before = _snapshot(host.model)
    with pytest.raises(SettingError):
        patch(host.model, **settings)
    _same(before, _snapshot(host.model))


def test_a_model_can_be_patched_again(host):
    batch = host.batch([(2, IMAGE, 5)])
    with torch.no_grad():
        first = patch(host.model, routing=Routing(split=2))
        routed = host.logits(batch)
        first.remove()
        with patch(host.model, routing=Routing(split=2)):
            assert torch.equal(host.logits(batch), routed)


def test_extending_a_patch_keeps_one_handle(host):
    before = _snapshot(host.model)
    handle = patch(host.model, fusion=SkipLinks(stride=2))
    assert patch(host.model, routing=Routing(split=2)) is handle
    assert handle.routing == Routing(split=2)
    handle.remove()
    _same(before, _snapshot(host.model))


@pytest.mark.parametrize(
    "settings",
    [{"routing": Routing(split=2)}, {"fusion": SkipLinks(stride=2)}, {"fusion": DeepStack(start=0, interval=1)}],
)
def test_a_patched_model_refuses_to_be_copied(host, settings):
    """One error for all that copies it, alone or inside something else; after remove() it is copied as any model."""
    import copy
    import io
    import pickle

    from llava_patch.core.errors import LlavaPatchError

    ways = {
        "deepcopy": copy.deepcopy,
        "pickle": pickle.dumps,
        "torch.save": lambda model: torch.save(model, io.BytesIO()),
        "inside": lambda model: copy.deepcopy({"ema": torch.nn.ModuleList([model])}),
        "compiled": lambda model: copy.deepcopy(torch.compile(model, backend="eager")),
    }
    with patch(host.model, **settings) as handle:
        for way in ways.values():
            with pytest.raises(LlavaPatchError, match=r"cannot be copied or pickled.*call handle.remove\(\) first"):
                way(host.model)
        parts = (handle.anatomy.wrapper, handle.anatomy.decoder, handle.anatomy.tower, handle.anatomy.vision_model)
        for way, part in itertools.product(("deepcopy", "pickle", "torch.save"), parts):
            with pytest.raises(LlavaPatchError, match="cannot be copied or pickled"):
                ways[way](part)
        for way in ("deepcopy", "pickle"):
            with pytest.raises(LlavaPatchError, match="cannot be copied or pickled"):
                ways[way](handle)
        copy.deepcopy(host.model.config)
        copy.deepcopy(host.model.generation_config)
        torch.save(host.model.state_dict(), io.BytesIO())
    for way, part in itertools.product(ways.values(), (host.model, *parts)):
        way(part)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
def test_two_threads_patch_and_remove_one_model(host):
    """They take turns: whoever is second finds the first one's patch, or a stock model."""
    from concurrent.futures import ThreadPoolExecutor

    batch = host.batch([(2, IMAGE, 5)])
    host.logits(batch)  # transformers 5 hooks the tower's blocks at the first call
    before = _snapshot(host.model)
    settings = {"routing": Routing(split=2), "pruning": FastV(layer=1)}

    def change(i):
        for _ in range(4):
            patch(host.model, **settings).remove()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(change, range(4)))
        _same(before, _snapshot(host.model))
        handles = list(threads.map(lambda i: patch(host.model, **settings), range(4)))
        assert len(set(map(id, handles))) == 1
        routed = host.logits(batch)
        list(threads.map(lambda handle: handle.remove(), handles))
    _same(before, _snapshot(host.model))
    with patch(host.model, **settings):
        assert torch.equal(host.logits(batch), routed)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"routing": Routing(split=3), "pruning": FastV(layer=1)},
        {"fusion": DeepStack(taps=(3, 6), start=0, interval=1), "routing": Routing(variant="kv", split=4)},
    ],
)
def test_two_threads_call_one_patched_model(host, settings):
    from concurrent.futures import ThreadPoolExecutor

    samples = [[(2, IMAGE, 5)], [(1, IMAGE, 3, IMAGE, 4), (7, IMAGE, 2)], [(9,)], [(3, IMAGE, 1)]]
    batches = [host.batch(sample, "left", seed) for seed, sample in enumerate(samples)]
    if not _threads_agree(host, batches):
        pytest.skip("stock models of this transformers are not safe in threads: it swaps forwards while one runs (5.0)")
    with patch(host.model, zero_start=False, **settings):
        expected = [host.logits(batch) for batch in batches]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(host.logits, batches * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def _threads_agree(host, batches):
    """Whether the stock model answers in threads as it does alone."""
    from concurrent.futures import ThreadPoolExecutor

    expected = [host.logits(batch) for batch in batches]
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(host.logits, batches * 4))
    except Exception:  # whatever a forward meets that is not its own
        return False
    return all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def test_a_patched_model_is_freed_with_its_last_reference(tower_folder):
    import gc
    import weakref

    from tests.support import models

    model = models.hf_model()
    patch(model, fusion=SkipLinks(stride=2), routing=Routing(split=2))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_model_that_was_brought_elsewhere_is_stock_there(host, settings):
    """What the patch had put aside follows the model: to another precision here, to a GPU in the same way."""
    batch = host.batch([(2, IMAGE, 5)])
    stock = host.logits(batch)
    handle = patch(host.model, **settings)
    host.model.double()
    handle.remove()
    assert {p.dtype for p in host.model.parameters()} == {torch.float64}
    host.model.float()
    assert torch.equal(host.logits(batch), stock)
