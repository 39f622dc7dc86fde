"""A fusion that does nothing, because its new weights are zero and frozen, is not overlooked."""

import re
import warnings

import pytest
import torch

import llava_patch
from llava_patch import DeepStack, DenseConnector, DirectFusion, FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import SilentFusionWarning
from tests.support.decoders import hf_host
from tests.support.fusions import randomise
from tests.support.models import IMAGE, TEXT
from tests.support.paths import ROOT

SILENT = {
    "skip": SkipLinks(stride=2),
    "dci": DenseConnector(),
    "direct": DirectFusion(layers=(3, 6)),
    "stack": DeepStack(taps=(2, 4), start=0),
}
SPEAKS = {
    "sti": DenseConnector(kind="sti", groups=(2, 5)), "merge": SkipLinks(layers=(), merge_size=2),
    "shared": DeepStack(taps=(2, 4), start=0, projector="shared"),
}  # fmt: skip


@pytest.fixture
def warned():
    """The warnings of the test, each as often as it came."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield lambda: [w for w in seen if issubclass(w.category, SilentFusionWarning)]


@pytest.mark.parametrize("name", SILENT)
def test_a_fusion_that_stays_at_zero_is_warned_about_once(host, name, warned):
    batch = host.batch([(2, IMAGE, 5)])
    with torch.no_grad(), patch(host.model, routing=Routing(split=3)):
        alone = host.logits(batch)
    handle = patch(host.model, fusion=SILENT[name], routing=Routing(split=3))
    with torch.no_grad():
        assert torch.equal(host.logits(batch), alone)  # it is true
    (warning,) = warned()
    kind = type(SILENT[name]).__name__
    text = str(warning.message)
    assert text.startswith(f"{kind} does nothing: its new weights are zero and frozen")
    assert "train it first, without Routing (LLaVA's stage 1)" in text and 'Routing.freeze = "none"' in text
    assert warning.filename == __file__
    assert handle.silent_fusion() == text and text in handle.report()
    patch(host.model, pruning=FastV(2, 0.5))  # says nothing about the fusion
    assert len(warned()) == 1
    handle.remove()


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("order", ["fusion-first", "routing-first"])
def test_whichever_comes_first(host, name, order, warned):
    both = [{"fusion": SILENT[name]}, {"routing": Routing(split=3)}]
    for settings in both if order == "fusion-first" else reversed(both):
        handle = patch(host.model, **settings)
    assert len(warned()) == 1
    handle.remove()


@pytest.mark.parametrize("name", SILENT)
def test_both_ways_out_say_nothing(host, name, warned):
    with patch(host.model, fusion=SILENT[name], routing=Routing(split=3, freeze="none")) as handle:
        assert handle.silent_fusion() is None
    with patch(host.model, fusion=SILENT[name]) as handle:  # trained first
        randomise(handle)
        patch(host.model, routing=Routing(split=3))
        assert handle.silent_fusion() is None
        handle.remove()
    assert not warned()


@pytest.mark.parametrize("name", SILENT)
def test_loading_what_was_trained_says_nothing(host, name, tmp_path, warned):
    handle = patch(host.model, fusion=SILENT[name], routing=Routing(split=3, freeze="none"))
    randomise(handle)
    host.model.config._name_or_path = "some/base"
    handle.save(tmp_path)
    handle.remove()
    loaded = llava_patch.load(host.model, tmp_path)
    assert loaded.silent_fusion() is None and not warned()


@pytest.mark.parametrize("name", SPEAKS)
def test_a_fusion_that_does_something_at_once_is_not_silent(host, name, warned):
    with patch(host.model, fusion=SPEAKS[name], routing=Routing(split=3)) as handle:
        assert handle.silent_fusion() is None
    assert not warned()


def test_a_frozen_model_is_told_what_to_train(host, warned):
    host.model.requires_grad_(False)
    with patch(host.model, fusion=SkipLinks(stride=2)):
        (warning,) = warned()
        assert "set requires_grad on handle.adapter_parameters()" in str(warning.message)


def test_the_call_of_the_contract_still_works(host, warned):
    """Notebooks make it on stock checkpoints: a warning, no error."""
    with patch(host.model, fusion=SkipLinks(stride=2), routing=Routing(split=3)) as handle:
        assert "does nothing" in handle.report()
    assert len(warned()) == 1


def _calls_of_the_readme():
    """Every `patch(model, ...)` of the README's first Python example, those in its comments too."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python")[1].split("```")[0]
    text = " ".join(line.strip().removeprefix("#") for line in example.splitlines())
    found = []
    for start in (match.start() for match in re.finditer(r"patch\(model, \w", text)):
        depth = end = 0
        for end, character in enumerate(text[start:], start):
            depth += (character == "(") - (character == ")")
            if character == ")" and not depth:
                break
        found.append(text[start : end + 1])
    return found


@pytest.mark.parametrize("call", range(3))
def test_what_the_readme_shows_does_something(call, warned):
    """With as many layers as its settings need."""
    model = hf_host("Llama", **{**TEXT, "num_hidden_layers": 20}).model
    calls = _calls_of_the_readme()
    assert len(calls) == 3
    names = {"patch": patch, "SkipLinks": SkipLinks, "Routing": Routing, "model": model}
    with eval(calls[call], names) as handle:
        assert handle.silent_fusion() is None and handle.trainable()
    assert not warned()
