"""A patched model under torch.compile: equal to eager to the bit, and no graph for every batch."""

import logging

import pytest
import torch

from llava_patch import DeepStack, FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import SettingError
from tests.support.fusions import randomise
from tests.support.models import IMAGE
from tests.support.routings import ALL

BOTH = {"routing": Routing(split=2, freeze="none"), "fusion": DeepStack(taps=(3, 6), start=0, interval=1)}
CASES = [
    ("hf", "train", BOTH),
    ("llava", "train", ALL["lf+fastv"]),
    ("llava", "eval", ALL["kv"]),
    ("hf", "eval", {"pruning": FastV(layer=2, ratio=0.5)}),
    ("hf", "eval", {"fusion": SkipLinks(stride=2)}),
]
# Tokens, images and batch sizes change; the first two settle what of them a graph takes as a variable.
BATCHES = [
    [(2, IMAGE, 7), (3, IMAGE, 2)],
    [(1, IMAGE, 9), (3, IMAGE, 1, IMAGE, 4), (6, IMAGE, 3)],
    [(4, IMAGE, 12, IMAGE, 1), (5, IMAGE, 3)],
    [(4, IMAGE, 9), (3, IMAGE, 1, IMAGE, 6), (5, IMAGE, 30), (2, IMAGE, 8)],
]


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest would keep all that it says
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _run(model, inputs, how):
    """Logits; in training the loss and every gradient."""
    if how == "eval":
        with torch.no_grad():
            return [model(**inputs, use_cache=False).logits]
    model.train()
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _equal(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("host", "how", "settings"), CASES, indirect=["host"])
def test_equal_and_settled_after_two_batches(host, how, settings):
    with patch(host.model, zero_start=False, **settings) as handle:
        if handle.fusion is not None:
            randomise(handle)
        batches = [host.batch(samples, "left", i, how == "train") for i, samples in enumerate(BATCHES)]
        expected = [_run(host.model, batch.inputs, how) for batch in batches]
        model = torch.compile(host.model, backend="eager")
        for i, batch in enumerate(batches):
            with torch._dynamo.config.patch(error_on_recompile=i > 1):
                assert _equal(_run(model, batch.inputs, how), expected[i]), i
        counters = torch._dynamo.utils.counters
        assert counters["frames"]["ok"] > 0 and not counters["recompile_limit"]


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava"], indirect=True)
def test_layers_are_compiled_by_the_backend_that_was_asked_for(host):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    batch = host.batch([(2, IMAGE, 7)])
    with patch(host.model, routing=Routing(variant="vtw", split=2)):
        torch.compile(host.model, backend=backend)(**batch.inputs, use_cache=False)
    products = [sum(node.target is torch._C._nn.linear for node in graph.graph.nodes) for graph in graphs]
    assert sum(products) == 6 * 8 + 7 * 2 + 1, "one graph for layers 0 and 1, the tower, one for the others, the head"


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
def test_generate_of_a_model_compiled_in_place(host):
    batch = host.batch([(2, IMAGE, 5), (1, IMAGE, 9)], "left")
    inputs = dict(batch.inputs)
    ids, options = inputs.pop("input_ids"), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with patch(host.model, routing=Routing(split=4)):
        expected = host.model.generate(ids, **inputs, **options)
        host.model.compile(backend="eager")
        assert torch.equal(host.model.generate(ids, **inputs, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize("settings", [{"fusion": SkipLinks(stride=2)}, {"routing": Routing(variant="vtw", split=1)}])
def test_a_part_that_ran_compiled_before_the_patch(host, settings):
    """Torch does not look at hooks again once it has compiled a module: it would go on as the stock model."""
    batch = host.batch([(2, IMAGE, 5)])
    (host.model.model.vision_tower if "fusion" in settings else host.decoder).compile(backend="eager")
    stock = host.logits(batch, use_cache=False)
    with patch(host.model, **settings) as handle:
        if handle.fusion is not None:
            randomise(handle)
        found = host.logits(batch, use_cache=False)
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(found, host.logits(batch, use_cache=False)) and not torch.equal(found, stock)
    assert torch.equal(host.logits(batch, use_cache=False), stock)


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)
@pytest.mark.parametrize(
    ("part", "order"),
    [
        ("decoder forward", "before"), ("layers", "after"), ("layers", "before"), ("decoder", "before"),
        ("tower", "after"), ("decoder forward", "after"),
    ],
)  # fmt: skip
def test_parts_compiled_on_both_sides_of_a_patch(host, part, order):
    batch = host.batch([(2, IMAGE, 5), (1, IMAGE, 3)], "left")
    inner, kind = host.model.model, Routing(variant="vtw", split=2)

    def compile_part():
        if part.endswith("forward"):
            owner = {"forward": host.model, "inner forward": inner, "decoder forward": host.decoder}[part]
            owner.forward = torch.compile(owner.forward, backend="eager")
        elif part == "decoder":
            inner.language_model = torch.compile(inner.language_model, backend="eager")
        elif part == "tower":
            inner.vision_tower = torch.compile(inner.vision_tower, backend="eager")
        else:
            for layer in host.decoder.layers:
                layer.compile(backend="eager")

    with patch(host.model, routing=kind):
        expected = host.logits(batch, use_cache=False)
    if order == "before":
        compile_part()
        if part == "decoder forward":
            with pytest.raises(SettingError, match=r"forward is compiled already.*patch first"):
                patch(host.model, routing=kind)
            return
    with patch(host.model, routing=kind):
        if order == "after":
            compile_part()
        before = torch._dynamo.utils.counters["frames"]["ok"]
        assert torch.equal(host.logits(batch, use_cache=False), expected)
        assert torch._dynamo.utils.counters["frames"]["ok"] > before, "nothing was compiled"
