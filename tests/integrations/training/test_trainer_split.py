"""Samples from a Trainer's data, its precision and devices, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_patch import Routing, Saturation, patch
from llava_patch.core.errors import SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.integrations.training.trainer_split import resolve_for_training
from tests.support import run_folders, tiny
from tests.support.saturating import KIND, SIZE, saturate

AUTO = Routing(split="auto")
pytest.importorskip("llava")


class Data:
    """Items as LLaVA's data set makes them, every third without an image; notes which ones are read."""

    def __init__(self, length: int = 2000, images: bool = True) -> None:
        self.length, self.images = length, images
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        torch.rand(1)  # a data set may draw random numbers
        sample = tiny.llava_sample(seed=index, before=8)
        ids, image = sample["input_ids"][0], sample["images"][0]
        if index % 3 == 0 or not self.images:
            ids, image = ids[ids >= 0], torch.zeros_like(image)
        return {"input_ids": ids, "labels": ids, "image": image}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    mask = torch.ones(1, len(item["input_ids"]), dtype=torch.bool)
    mask[0, 1] = False  # LLaVA's own mask hides unknown words
    pixels = item["image"][None]
    return {
        "input_ids": item["input_ids"][None],
        "labels": item["labels"][None],
        "attention_mask": mask,
        "images": pixels,
    }


def arguments(folder: Path, bf16: bool = False) -> Any:
    return SimpleNamespace(device=torch.device("cpu"), bf16=bf16, fp16=False, output_dir=str(folder))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path / "cache"))
    model = tiny.llava_model(tmp_path, layers=6)
    anatomy = find(model)
    saturate(anatomy.layers, anatomy.embed_tokens, anatomy.projector, reading=2, writing=3)
    return model


def kept(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "cache").iterdir()
    return json.loads(path.read_text())


def test_takes_a_few_samples_spread_over_the_data_and_the_same_ones_each_time(model: Any, tmp_path: Path) -> None:
    read = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        data = Data()
        assert resolve_for_training(model, AUTO, arguments(tmp_path), data, collate, Saturation()) == Routing(split=2)
        read.append(data.read)
    assert read[0] == read[1]
    result = kept(tmp_path)["saturation"]
    assert result["samples"] == 32 and result["skipped"] == {"no image": sum(i % 3 == 0 for i in read[0])}
    assert len(read[0]) == 32 + result["skipped"]["no image"]
    assert min(read[0]) < 300 and max(read[0]) > 1700  # not the first ones


def test_max_samples_is_the_bound_number(model: Any, tmp_path: Path) -> None:
    resolve_for_training(model, AUTO, arguments(tmp_path), Data(), collate, Saturation(max_samples=3))
    assert kept(tmp_path)["saturation"]["samples"] == 3


def test_few_samples_are_taken_all(model: Any, tmp_path: Path) -> None:
    resolve_for_training(model, AUTO, arguments(tmp_path), Data(6), collate, Saturation())
    assert kept(tmp_path)["saturation"]["samples"] == 4


def test_data_without_images_are_given_up(model: Any, tmp_path: Path) -> None:
    data = Data(10_000, images=False)
    with pytest.raises(SettingError, match="needs samples with an image and text behind it: 200 with no image"):
        resolve_for_training(model, AUTO, arguments(tmp_path), data, collate, Saturation(max_samples=2))
    assert len(data.read) == 200


def test_data_that_cannot_be_indexed_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="the Trainer got generator"):
        resolve_for_training(model, AUTO, arguments(tmp_path), (i for i in ()), collate, Saturation())


def test_half_precision_model_with_a_new_projector_in_float32(model: Any, tmp_path: Path) -> None:
    # What LLaVA's train.py hands over with --bf16 True.
    model.bfloat16()
    model.get_model().mm_projector.float()
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    found = resolve_for_training(
        model, AUTO, arguments(tmp_path, bf16=True), Data(), collate, Saturation(max_samples=2)
    )
    assert found == Routing(split=2)
    assert {n: p.dtype for n, p in model.named_parameters()} == dtypes


def test_a_run_that_resumes_keeps_its_split(model: Any, tmp_path: Path, caplog: Any) -> None:
    run, data = tmp_path / "run", Data()
    with patch(model, routing=Routing(split=4)) as handle:
        (run_folders.checkpoint(run / "checkpoint-20") / "model.safetensors").unlink()
        handle.save(run / "checkpoint-20", form="full")
        (run_folders.checkpoint(run / "checkpoint-30") / "trainer_state.json").unlink()  # goes on from 20
        assert resolve_for_training(model, AUTO, arguments(run), data, collate, Saturation()) == Routing(split=4)
    assert resolve_for_training(model, AUTO, arguments(run), data, collate, Saturation()) == Routing(split=4)
    assert not data.read and "checkpoint-20 with split 4, which is kept" in caplog.records[-1].getMessage()
    (run / "checkpoint-20" / "llava_patch.json").unlink()  # of another run without a patch
    assert resolve_for_training(model, AUTO, arguments(run), data, collate, Saturation()) == Routing(split=2)


def test_partitioned_weights_are_refused_before_anything_runs(model: Any, tmp_path: Path) -> None:
    data = Data()
    next(model.parameters()).ds_id = 0
    with pytest.raises(SettingError, match="ZeRO-3"):
        resolve_for_training(model, AUTO, arguments(tmp_path), data, collate, Saturation())
    assert not data.read


def test_one_rank_decides_for_all(monkeypatch: Any) -> None:
    from llava_patch.integrations.training import trainer_split

    sent: list[Any] = []

    def as_rank(rank: int, received: list[Any] | None = None) -> None:
        def broadcast(outcome: list[Any], src: int) -> None:
            assert src == 0
            sent.append(list(outcome))
            if received is not None:
                outcome[:] = received

        for name, value in (
            ("is_initialized", True), ("get_world_size", 2), ("get_rank", rank),
        ):  # fmt: skip
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)

    def fail() -> Routing:
        raise SettingError("no window")

    as_rank(0)
    assert trainer_split._on_first_rank(lambda: Routing(split=3)) == Routing(split=3)
    with pytest.raises(SettingError, match="no window"):
        trainer_split._on_first_rank(fail)
    as_rank(1, sent[0])
    assert trainer_split._on_first_rank(fail) == Routing(split=3)  # its own work is not done
    as_rank(1, sent[1])
    with pytest.raises(SettingError, match="no window"):
        trainer_split._on_first_rank(fail)


def test_a_fused_projector_is_in_place_before_the_model_is_measured(model: Any, tmp_path: Path) -> None:
    from llava_patch import SkipLinks
    from llava_patch.integrations.training import llava as training
    from llava_patch.integrations.training import stage1
    from llava_patch.settings import gin_config as config

    with patch(model, fusion=SkipLinks(stride=1)) as handle:
        projector = {k: v.clone() for k, v in handle.anatomy.projector.state_dict().items()}
    linear = model.get_model().mm_projector[-1]
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    linear.bias.data[KIND] = -2 * SIZE  # through this stock projector, no layer looks at the image
    with pytest.raises(SettingError, match="recommend no split"):
        resolve_for_training(model, AUTO, arguments(tmp_path), Data(), collate, Saturation(max_samples=2))
    stage1.pending[id(model.get_model())] = False, {f"mm_projector.{k}": v for k, v in projector.items()}
    asked = config.read([], ["SkipLinks.stride = 1", 'Routing.split = "auto"', "Saturation.max_samples = 2"])
    handle = training._patch_for_training(model, arguments(tmp_path), asked, Data(), collate)
    assert handle.routing == Routing(split=2) and handle.fusion == SkipLinks(stride=1)
    assert all(torch.equal(v, projector[k]) for k, v in handle.anatomy.projector.state_dict().items())
