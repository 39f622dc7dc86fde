"""Routing(split="auto"): what it chooses, what it keeps on disk, and when it refuses."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava_patch import FastV, Routing, Saturation, SkipLinks, get_handle, patch
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.method import Method
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.saturation.auto_split import resolve_split
from llava_patch.measurements.saturation.measure import measure_saturation
from llava_patch.measurements.saturation.result import SaturationResult
from llava_patch.settings.methods import from_dict, to_dict
from tests.support.saturating import saturate

AUTO = Routing(split="auto")
VTW = Routing("vtw", split="auto")


@dataclass
class Subject:
    model: nn.Module
    make_sample: Callable[..., dict[str, Any]]
    forwards: list[int]

    def samples(self, seed: int = 0) -> list[dict[str, Any]]:
        return [self.make_sample(seed=seed + i, before=8) for i in range(2)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def watch(model: nn.Module, make_sample: Callable[..., dict[str, Any]]) -> Subject:
    subject = Subject(model, make_sample, [])
    find(model).decoder.register_forward_hook(lambda *_: subject.forwards.append(1))
    return subject


@pytest.fixture
def subject(host: Any) -> Subject:
    """A model whose attention leaves the image at layer 2 of 6, whose lens falls at layer 3."""
    make_model, make_sample = host
    model = make_model(layers=6)
    anatomy = find(model)
    saturate(anatomy.layers, anatomy.embed_tokens, anatomy.projector, reading=2, writing=3)
    return watch(model, make_sample)


def test_the_measured_layer_takes_the_place_of_auto_everywhere(
    subject: Subject, cache: Path, tmp_path: Path, caplog: Any
) -> None:
    subject.model.train()
    find(subject.model).norm.eval()
    modes = [m.training for m in subject.model.modules()]
    with caplog.at_level(logging.INFO, "llava_patch"):
        handle = patch(subject.model, routing=AUTO, samples=iter(subject.samples()))
    assert handle.routing == Routing(split=2)
    assert handle.settings()["routing"]["split"] == 2
    assert subject.model.config.llava_patch["routing"]["split"] == 2
    assert find(subject.model).decoder.forward.schedule.split == 2
    handle.save(tmp_path / "full", form="full")
    assert json.loads((tmp_path / "full" / "llava_patch.json").read_text())["routing"]["split"] == 2
    handle.remove()
    assert [m.training for m in subject.model.modules()] == modes
    (kept,) = cache.iterdir()
    (record,) = caplog.records
    reason = "attention mass stays within 20%"
    for words in ("split 2", "window 2..3 of L = 6", reason, "2 samples", str(kept), "Bind Routing.split = 2"):
        assert words in record.getMessage(), words


def test_other_models_give_other_splits(host: Any) -> None:
    make_model, make_sample = host
    for reading, writing in ((1, 3), (3, 4)):
        model = make_model(layers=6)
        anatomy = find(model)
        saturate(anatomy.layers, anatomy.embed_tokens, anatomy.projector, reading, writing)
        samples = [make_sample(before=8)]
        assert resolve_split(model, AUTO, samples, progress=False) == Routing(split=reading)


def test_the_same_question_is_measured_once(subject: Subject, cache: Path, caplog: Any) -> None:
    for _ in range(2):
        assert resolve_split(subject.model, AUTO, subject.samples(), progress=False).split == 2
        assert len(subject.forwards) == 2
    assert "measured before" in caplog.records[-1].getMessage()
    # Variant and depth of the branch do not change what is measured, nor does a mask of ones.
    other = [{**s, "attention_mask": None} for s in subject.samples()]
    assert resolve_split(subject.model, Routing(split="auto", side_layers=2), other, progress=False).side_layers == 2
    assert len(subject.forwards) == 2 and len(list(cache.iterdir())) == 1


def test_labels_count_where_answers_are_measured(subject: Subject, cache: Path) -> None:
    labelled = [{**s, "labels": s["input_ids"]} for s in subject.samples()]
    for settings, files in ((Saturation(), 2), (Saturation(knockout=False), 3)):
        for samples in (subject.samples(), labelled):
            resolve_split(subject.model, AUTO, samples, settings, progress=False)
        assert len(list(cache.iterdir())) == files


def test_each_variant_gets_the_split_that_its_last_layer_allows(host: Any) -> None:
    """Answers that one look of the last layer makes: LF may split at once, ideal nowhere, nor VTW by its own search."""
    make_model, make_sample = host
    model = make_model(layers=6)
    anatomy = find(model)
    with torch.no_grad():
        for layer in list(anatomy.layers)[:-1]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        anatomy.layers[-1].self_attn.o_proj.weight.mul_(20)
    samples = [make_sample(before=8)]
    for routing in (AUTO, Routing(split="auto", fusion_layers=2), Routing(split="auto", fusion_layers=(3, 5))):
        assert resolve_split(model, routing, samples, progress=False).split == 0
    for routing in (Routing("ideal", split="auto"), Routing(split="auto", fusion_layers=(3, 4)), Routing("kv", "auto")):
        with pytest.raises(SettingError, match="the answers need the image to the end: up to split 5"):
            resolve_split(model, routing, samples, progress=False)
    with pytest.raises(SettingError, match=r"in layers 5..5 no withdrawal changes .* at most 0.003 nats \("):
        resolve_split(model, VTW, samples, progress=False)


@pytest.mark.parametrize("cut", [6, 7])
def test_vtw_finds_the_planted_layer_by_its_own_search(host: Any, cut: int, caplog: Any) -> None:
    """Layers from the cut on take nothing from other positions, so that withdrawal there changes nothing."""
    make_model, make_sample = host
    model = make_model(layers=8)
    with torch.no_grad():
        for number, layer in enumerate(find(model).layers):
            layer.self_attn.o_proj.weight.mul_(0 if number >= cut else 20 if number == cut - 1 else 1)
    samples = [make_sample(before=8), make_sample(seed=1, before=8)]
    assert resolve_split(model, VTW, samples, progress=False) == Routing("vtw", split=cut)
    assert f"window {cut}..7 of L = 8 layers: the first from layer 5 on" in caplog.records[-1].getMessage()
    assert resolve_split(model, VTW, samples, Saturation(vtw_threshold=99.0), progress=False).split == 5
    assert resolve_split(model, VTW, samples, Saturation(vtw_threshold=99.0, vtw_first=2), progress=False).split == 2
    with pytest.raises(SettingError, match=r"begins at layer 8 \(Saturation.vtw_first\), behind the last one, 7"):
        resolve_split(model, VTW, samples, Saturation(vtw_first=8), progress=False)
    with pytest.raises(SettingError, match=r"Saturation\.knockout = False"):
        resolve_split(model, VTW, samples, Saturation(knockout=False), progress=False)


def test_one_model_in_two_precisions_is_one_model(subject: Subject) -> None:
    resolve_split(subject.model, AUTO, subject.samples(), progress=False)
    low = watch(copy.deepcopy(subject.model).bfloat16(), subject.make_sample)
    samples = [
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in sample.items()} for sample in subject.samples()
    ]
    assert resolve_split(low.model, AUTO, samples, progress=False).split == 2
    assert not low.forwards


def a_decoder_weight(subject: Subject) -> None:
    find(subject.model).layers[5].mlp.up_proj.weight.data.mul_(1.1)


def a_tower_weight(subject: Subject) -> None:
    blocks = find(subject.model).vision_parts().blocks
    blocks[0].mlp.fc1.weight.data.mul_(1.1)


def a_decoder_norm(subject: Subject) -> None:
    find(subject.model).layers[3].input_layernorm.weight.data.add_(0.5)


def a_tower_bias(subject: Subject) -> None:
    find(subject.model).vision_parts().blocks[0].mlp.fc1.bias.data.add_(0.5)


def a_projector_bias(subject: Subject) -> None:
    next(p for n, p in find(subject.model).projector.named_parameters() if n.endswith("bias")).data.add_(0.5)


def the_selected_block(subject: Subject) -> None:
    name = "mm_vision_select_layer" if hasattr(subject.model.config, "mm_vision_select_layer") else None
    setattr(subject.model.config, name or "vision_feature_layer", -1)


@pytest.mark.parametrize(
    "change",
    [a_decoder_weight, a_tower_weight, a_decoder_norm, a_tower_bias, a_projector_bias, the_selected_block],
)
def test_another_model_is_measured_again(subject: Subject, change: Callable[[Subject], None]) -> None:
    resolve_split(subject.model, AUTO, subject.samples(), progress=False)
    change(subject)
    resolve_split(subject.model, AUTO, subject.samples(), progress=False)
    assert len(subject.forwards) == 4


def test_other_samples_and_settings_are_measured_again(subject: Subject) -> None:
    samples = subject.samples()
    pixels = "pixel_values" if "pixel_values" in samples[0] else "images"
    resolve_split(subject.model, AUTO, samples, progress=False)
    for other in (
        subject.samples(seed=5),
        [samples[0], {**samples[1], pixels: samples[1][pixels] * 1.5}],
        [samples[0], {**samples[1], "input_ids": samples[1]["input_ids"].roll(1)}],
        samples[:1],
    ):
        before = len(subject.forwards)
        resolve_split(subject.model, AUTO, other, progress=False)
        assert len(subject.forwards) == before + len(other)
    before = len(subject.forwards)
    resolve_split(subject.model, AUTO, samples, Saturation(mass_tolerance=0.1), progress=False)
    assert len(subject.forwards) == before + 2


def test_only_the_samples_that_are_measured_count(subject: Subject, caplog: Any) -> None:
    blind = {k: v for k, v in subject.make_sample().items() if k not in ("pixel_values", "images")}
    settings = Saturation(max_samples=1)

    def endless() -> Any:
        yield blind
        while True:
            yield subject.make_sample(before=8)

    resolve_split(subject.model, AUTO, endless(), settings, progress=False)
    assert len(subject.forwards) == 1 and "1 samples (1 no image: left out)" in caplog.records[-1].getMessage()
    resolve_split(subject.model, AUTO, [subject.make_sample(before=8)], settings, progress=False)
    assert len(subject.forwards) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 4', '"format": 3'),
        lambda text: json.dumps({**json.loads(text), "saturation": {}}),
        lambda text: text.replace('"image_kl": [', '"image_kl": [ 0.5,'),
    ],
)
def test_a_damaged_file_is_replaced_with_a_warning(subject: Subject, cache: Path, caplog: Any, damage: Any) -> None:
    resolve_split(subject.model, AUTO, subject.samples(), progress=False)
    (kept,) = cache.iterdir()
    whole = kept.read_text()
    assert damage(whole) != whole
    kept.write_text(damage(whole))
    caplog.clear()
    assert resolve_split(subject.model, AUTO, subject.samples(), progress=False).split == 2
    assert len(subject.forwards) == 4
    assert f"{kept} cannot be used" in caplog.records[0].getMessage()
    assert kept.read_text() == whole


def test_a_folder_that_cannot_be_written_costs_a_warning(
    subject: Subject, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path / "file" / "cache"))
    assert resolve_split(subject.model, AUTO, subject.samples(), progress=False).split == 2
    assert "could not be kept" in caplog.records[0].getMessage()


def test_what_is_kept_is_the_measurement_and_draws_its_figure(subject: Subject, cache: Path, tmp_path: Path) -> None:
    resolve_split(subject.model, AUTO, subject.samples(), progress=False)
    (kept,) = cache.iterdir()
    result = SaturationResult.from_dict(json.loads(kept.read_text())["saturation"])
    assert result.curves == measure_saturation(subject.model, subject.samples(), progress=False).curves
    assert result.recommended_split == 2 and result.samples == 2
    json_path, figure = result.save(tmp_path / "figure")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_users_cache_folder(monkeypatch: Any, tmp_path: Path) -> None:
    from llava_patch.core.paths import cache_folder

    monkeypatch.delenv("LLAVA_PATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llava_patch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "llava_patch"


def test_no_window_is_an_error_with_its_reason_and_changes_nothing(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model, make_sample = host
    model = make_model(layers=6)  # random weights read the image alike in every layer
    monkeypatch.setattr("llava_patch.measurements.saturation.recommend.LEAST_LOSS", 99.0)  # the answers have no say
    with pytest.raises(
        SettingError, match=r'"auto": 1 samples recommend no split: .*does not fall.*bind Routing.split'
    ):
        patch(model, fusion=SkipLinks(stride=1), routing=AUTO, samples=[make_sample()])
    assert get_handle(model) is None and not hasattr(model.config, "llava_patch")


def test_what_cannot_be_measured_is_refused(subject: Subject) -> None:
    blind = {k: v for k, v in subject.make_sample().items() if k not in ("pixel_values", "images")}
    with pytest.raises(SettingError, match=r"samples=\[.*`saturation` task"):
        patch(subject.model, routing=AUTO)
    with pytest.raises(SettingError, match="an image and text behind it: 1 with no image"):
        patch(subject.model, routing=AUTO, samples=[blind])
    with pytest.raises(SettingError, match="none were given"):
        patch(subject.model, routing=AUTO, samples=[])
    with pytest.raises(SettingError, match="sample 1 is no dictionary"):
        patch(subject.model, routing=AUTO, samples=[blind, "a.png"])
    batch = {k: torch.cat([v, v]) for k, v in subject.make_sample().items()}
    with pytest.raises(InputError, match="a batch of 2"):
        patch(subject.model, routing=AUTO, samples=[batch])
    with pytest.raises(SettingError, match="was not asked for"):
        patch(subject.model, routing=Routing(split=2), samples=subject.samples())
    assert get_handle(subject.model) is None


@pytest.mark.parametrize("deep", [{"fusion_layers": 5}, {"side_layers": 5}, {"fusion_layers": (1, 5)}])
def test_a_split_that_the_variant_has_no_room_for(subject: Subject, deep: dict[str, Any]) -> None:
    with pytest.raises(
        SettingError, match=r"recommends 2, but Routing.fusion_layers = .* leave room for 0..1 of L = 6"
    ):
        patch(subject.model, routing=Routing(split="auto", **deep), samples=subject.samples())


def test_a_routed_model_keeps_its_split(subject: Subject, caplog: Any) -> None:
    handle = patch(subject.model, routing=Routing(split=4))
    assert patch(subject.model, routing=AUTO, samples=subject.samples()) is handle
    assert patch(subject.model, routing=AUTO) is handle
    assert handle.routing == Routing(split=4) and not subject.forwards
    assert "already carries split 4, which is kept" in caplog.records[-1].getMessage()
    with pytest.raises(SettingError, match="already carries routing"):
        patch(subject.model, routing=Routing(split="auto", side_layers=2))


def test_a_fused_model_is_measured_with_its_fusion(subject: Subject, cache: Path) -> None:
    resolve_split(subject.model, AUTO, subject.samples(), progress=False)
    handle = patch(subject.model, fusion=SkipLinks(stride=1))
    assert patch(subject.model, routing=AUTO, samples=subject.samples()) is handle
    assert handle.routing == Routing(split=2) and handle.fusion is not None
    assert len(list(cache.iterdir())) == 2


def test_other_taps_of_one_width_are_another_model() -> None:
    from llava_patch.patching.keys import model_digest
    from tests.support import models

    model = models.hf_model()
    digests = set()
    for layer in (2, 4):
        with patch(model, fusion=SkipLinks(layers=(layer,))) as handle:
            digests.add(model_digest(handle.anatomy))
    assert len(digests) == 2 and model_digest(find(model)) not in digests


def test_a_pruned_model_is_refused(subject: Subject, monkeypatch: Any) -> None:
    handle = patch(subject.model, fusion=SkipLinks(stride=1))
    monkeypatch.setitem(handle.methods, "pruning", Method(FastV()))
    with pytest.raises(SettingError, match="this one carries FastV"):
        resolve_split(subject.model, AUTO, subject.samples())


def test_a_record_never_holds_auto() -> None:
    with pytest.raises(SettingError, match=r'config.json: Routing.split = "auto" in a saved record'):
        from_dict(to_dict(AUTO), "config.json")
