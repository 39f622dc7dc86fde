"""Methods are known by the registry alone: a further one is a file and a line."""

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import llava_patch
from llava_patch import AuxiliaryProbe, DeepStack, FastV, Routing, SkipLinks, patch
from llava_patch.core import registry
from llava_patch.core.errors import SettingError
from llava_patch.core.method import Method
from llava_patch.fusion.base import Fusion, Group
from llava_patch.routing.pruning import OneStage
from llava_patch.settings.methods import from_dict, from_record, to_dict
from tests.support import models
from tests.support.models import IMAGE

CORE = ("patching/patch.py", "patching/handle.py", "patching/checkpoint.py", "settings/gin_config.py")


@dataclass(frozen=True, repr=False)
class Thirds(Fusion):
    """A toy fusion: one block in three, all detached."""

    first: int = 1

    def choose(self, n_blocks: int, main: int) -> tuple[Group, ...]:
        return tuple(Group((block,), True) for block in range(self.first, n_blocks, 3) if block != main)


@dataclass(frozen=True)
class EverySecond(OneStage):
    """A toy pruning: the first, third, fifth, ... image token of each sample is worth most."""

    def scores(self, seen):
        return seen.image_mask.cumsum(1) % 2


@pytest.fixture
def toy(monkeypatch):
    for cls in (Thirds, EverySecond):
        monkeypatch.setitem(registry.METHODS, cls.__name__, f"{__name__}:{cls.__name__}")


def test_every_method_has_settings_that_patch_takes_and_a_record_keeps():
    for name, cls in registry.methods().items():
        assert cls.__name__ == name and cls.KIND in registry.KINDS and dataclasses.is_dataclass(cls)
        assert from_dict(to_dict(cls()), "here") == cls()
    for kind, entry in registry.KINDS.items():
        assert issubclass(registry.load(entry), Method) and registry.methods(kind)


def test_patch_takes_one_keyword_for_each_kind():
    assert [n for n in patch.__annotations__ if n in registry.KINDS] == list(registry.KINDS)


@pytest.mark.parametrize("file", CORE)
def test_the_core_names_no_method(file):
    tree = ast.parse((Path(llava_patch.__file__).parent / file).read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    owners = {entry.split(":")[1] for entry in registry.KINDS.values()}
    assert not used & {*registry.METHODS, *owners}


@torch.no_grad()
def test_a_further_fusion_is_patched_trained_saved_and_loaded(toy, tmp_path):
    from transformers import LlavaForConditionalGeneration

    model = models.hf_model()
    model.save_pretrained(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    handle = patch(model, fusion=Thirds(first=2))
    assert [group.blocks for group in handle.taps.groups] == [(2,), (5,)] and handle.taps.detached == 2
    handle.adapter_parameters()[0].add_(0.25)
    handle.save(tmp_path / "adapter")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    loaded = llava_patch.get_handle(again)
    assert loaded.fusion == Thirds(first=2)
    assert torch.equal(loaded.adapter_parameters()[0], handle.adapter_parameters()[0])
    with pytest.raises(SettingError, match=r"already carries fusion Thirds\(first=2\), but Thirds\(first=1\)"):
        patch(again, fusion=Thirds())
    assert from_record(handle.record(), "here") == {"fusion": Thirds(first=2)}


@torch.no_grad()
@pytest.mark.parametrize("routing", [None, Routing(split=3)])
def test_a_further_pruning_keeps_what_its_scores_say(toy, host, routing):
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)])
    image = batch.image
    with patch(host.model, routing=routing, pruning=EverySecond(layer=2)) as handle:
        assert handle.record()["pruning"] == {"method": "EverySecond", "layer": 2, "ratio": 0.5, "training": False}
        pruned = host.logits(batch)
    with patch(host.model, routing=routing, pruning=FastV(layer=2)) as handle:
        with handle.image_positions(kept=~image | (image.cumsum(1) % 2 == 1)):
            expected = host.logits(batch)
    assert torch.equal(pruned[batch.valid], expected[batch.valid])


def test_settings_that_are_not_registered_are_refused():
    with pytest.raises(SettingError, match=r"patch\(fusion=Thirds.*expected SkipLinks, DenseConnector"):
        patch(models.hf_model(), fusion=Thirds())
    with pytest.raises(SettingError, match="unknown method 'Thirds'"):
        from_dict(to_dict(Thirds()), "here")


def test_a_failed_patch_leaves_the_handles_methods_as_they_were(monkeypatch):
    model = models.hf_model()
    handle = patch(model, fusion=SkipLinks(stride=2))
    before = dict(handle.methods)
    with pytest.raises(SettingError, match="outside"):
        patch(model, routing=Routing(split=99))
    assert handle.methods == before and handle.active


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": (SkipLinks(), SkipLinks())}, r"patch\(fusion=...\) got 2 settings: a model takes one fusion"),
        ({"fusion": Routing()}, r"expected SkipLinks, DenseConnector, .*\(write routing=\)"),
        ({"pruning": FastV}, r"expected FastV.* \(an instance: FastV\(\)\)"),
        ({"fusion": SkipLinks(), "samples": []}, r'patch\(samples=...\) is what Routing\(split="auto"\) measures on'),
        ({"routing": Routing(split=3), "probe": AuxiliaryProbe()}, "would train nothing but its own head"),
        ({"routing": Routing(split=3), "fusion": SkipLinks(train_tower=1)}, "contradicts Routing.freeze"),
    ],
)
def test_what_contradicts_itself_changes_nothing(settings, message):
    model = models.hf_model()
    with pytest.raises(SettingError, match=message):
        patch(model, **settings)
    assert llava_patch.get_handle(model) is None and "forward" not in vars(model)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"routing": Routing(split=3)}, {"fusion": SkipLinks(train_tower="all")}, "contradicts Routing.freeze"),
        ({"fusion": SkipLinks(train_tower="all")}, {"routing": Routing(split=3)}, "contradicts Routing.freeze"),
        ({"probe": AuxiliaryProbe()}, {"routing": Routing(split=3)}, "would train nothing but its own head"),
        ({"probe": AuxiliaryProbe()}, {"fusion": SkipLinks()}, "give both to one call of patch"),
        ({"pruning": FastV(2)}, {"pruning": FastV(3)}, "already carries pruning"),
    ],
)
def test_what_contradicts_an_earlier_patch_leaves_that_as_it_was(first, second, message):
    model = models.hf_model()
    handle = patch(model, **first)
    before, steps = (dict(handle.methods), set(vars(model)), handle.trainable()), len(handle._undo)
    with pytest.raises(SettingError, match=message):
        patch(model, **second)
    assert (handle.methods, set(vars(model)), handle.trainable()) == before and len(handle._undo) == steps


def test_what_a_method_adds_is_what_a_checkpoint_must_hold():
    for settings, count in (({"routing": Routing(split=3)}, 9), ({"fusion": DeepStack(start=0, interval=1)}, 8)):
        handle = patch(models.hf_model(), **settings)
        (method,) = handle.methods.values()
        assert len(handle.added_parameters()) == len(method.parameters()) == count
        added = {id(p) for p in method.parameters()}
        stock = set(dict(models.hf_model().named_parameters()))
        new = {n: p for n, p in handle.model.named_parameters() if n not in stock}
        assert new and {id(p) for p in new.values()} <= added
