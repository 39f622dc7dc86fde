"""A good file of every kind that is read back, written by our own code, and the call that reads it: to be damaged."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.reliability.place import _saved, open_stock

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    name: str
    write: Callable[[Path], Path]  # into a folder; gives the file
    read: Read


def _result(path: str) -> Read:
    from llava_patch.core import registry

    def read(file: Path) -> Any:
        found = registry.load(path).load(file)
        return found.summary(), found.to_dict()

    return read


def saturation_result() -> Any:
    from llava_patch.measurements.saturation.result import Curves, SaturationResult

    falling, heads = [3.0, 2.0, 1.0, 0.5], [[0.5, 0.3], [0.2, 0.1], [0.05, 0.05], [0.05, 0.05]]
    curves = Curves([0.5, 0.6, 0.9, 0.95], [0.5, 0.6, 0.7, 0.8], heads, falling, falling, [9.0] * 4, [9.0] * 4)
    return SaturationResult(curves, 2, {"no image": 1}, facts={"checkpoint": "m", "data": "pages"})


def saturation(folder: Path) -> Path:
    return saturation_result().save(folder, formats=())[0]


def rprobe(folder: Path) -> Path:
    from tests.support.results import made_up_result

    return made_up_result().save(folder, formats=())[0]


def read_rprobe(path: Path) -> Any:
    from llava_patch.measurements.rprobe.compare import compare_probes, load

    found = load([path])
    return compare_probes({"a": next(iter(found.values())), "b": next(iter(found.values()))}, resamples=9).to_dict()


def flops(folder: Path) -> Path:
    from llava_patch.measurements.flops import shape
    from llava_patch.measurements.flops.result import measure_flops

    return measure_flops(shape.named("small")).save(folder, formats=())[0]


def drift(folder: Path) -> Path:
    from llava_patch.measurements.drift.measurement import DriftCurves, DriftResult

    curves = DriftCurves([0.9, 0.8], [0.7, 0.6], 1.0, 0.99, 20)
    return DriftResult(curves, curves, 4, 2, 3, 0, "a", "b").save(folder, formats=())[0]


def fusion_attention(folder: Path) -> Path:
    from llava_patch.measurements.fusion_attention.measurement import FusionAttentionResult

    found = FusionAttentionResult([3], [[0.1, 0.2]], [[0.1, 0.1]], 4, 2, 0, "a", "b")
    return found.save(folder, formats=())[0]


def _reach() -> Any:
    from llava_patch.measurements.reach.measurement import Part, PartReach, ReachResult, SideReach

    part = PartReach(Part("decoder layer", 0, "text only"), 10, 10, 2, 2, "nonzero", 0.5)
    return ReachResult("lf", (part,), SideReach(0.5, {3: 0.25}, (3,)), 4, 2, 2, 1.5, "float32")


def reach(folder: Path) -> Path:
    return _reach().save(folder, formats=())[0]


def reach_variants(folder: Path) -> Path:
    from llava_patch.measurements.reach.measurement import ReachComparison

    return ReachComparison((_reach(), _reach())).save(folder, formats=())[0]


def attention_maps(folder: Path) -> Path:
    from llava_patch.measurements.attention_maps.measurement import AttentionMapsResult, CheckpointMaps

    one = CheckpointMaps("m", "CLS token", "whole image", 2, 4, [[[0.1, 0.2], [0.3, 0.4]]], "/m")
    return AttentionMapsResult(["a.png"], [one]).save(folder, formats=())[0]


def gradients_log(folder: Path) -> Path:
    from llava_patch.measurements.gradients.log import LOG, StepLog
    from llava_patch.measurements.gradients.measurement import Gradients
    from llava_patch.measurements.gradients.statistics import Window

    settings, generator = Gradients(window=2), torch.Generator().manual_seed(0)
    log, window = StepLog(folder, settings, {"block": 1, "trains": True, "batches": 6}), Window(2)
    for number in range(1, 6):
        main, full = torch.rand(2, 8, generator=generator)
        log.add(*window.add(number, main, full, 0.1))
    window.save(folder / "window.safetensors")
    return folder / LOG


def gradients(folder: Path) -> Path:
    from llava_patch.measurements.gradients.result import GradientsResult

    return GradientsResult.read(gradients_log(folder).parent).save(folder / "result", formats=())[0]


def gradients_window(folder: Path) -> Path:
    return gradients_log(folder).parent / "window.safetensors"


def read_run(path: Path) -> Any:
    from llava_patch.measurements.gradients.result import GradientsResult, runs_table

    found = GradientsResult.read(path.parent)
    return found.summary(), found.table(), runs_table({"a": found})


def read_window(path: Path) -> Any:
    from llava_patch.measurements.gradients.statistics import Window

    return Window.load(path, 2).add(6, torch.ones(8), torch.ones(8))


def _state(path: Path) -> Any:
    from llava_patch.measurements.saturation.measure import State

    return State(path, {"model": "m", "data": "d"})


def saturation_state(folder: Path) -> Path:
    from llava_patch.measurements.saturation.measure import RunningMean

    path = folder / "saturation.state.safetensors"
    _state(path).save(RunningMean(skipped={"no image": 1}).plus(saturation_result().curves))
    return path


def read_state(path: Path) -> Any:
    found = _state(path).load()
    return found and found.samples and found.plus(saturation_result().curves).mean()


def split_cache(folder: Path) -> Path:
    from llava_patch.core.files import write_json

    return write_json(folder / "cache.json", {"key": {"model": "m"}, "saturation": saturation_result().to_dict()})


def read_split_cache(path: Path) -> Any:
    from llava_patch.measurements.saturation import auto_split

    found = auto_split._read(path, {"model": "m"}, 4)
    return found and found.recommended_split


@functools.cache
def _probe() -> tuple[Any, Any, Any]:
    from llava_patch.hosts.anatomy import find
    from llava_patch.measurements.rprobe.keys import make_key
    from llava_patch.measurements.rprobe.settings import RProbe
    from llava_patch.measurements.rprobe.train import choose_trained
    from llava_patch.probe.decoder import ProbeDecoder, trained_parameters
    from tests.support.probes import made_up, tiny_model

    data = made_up(8, 1, "true")
    decoder, settings = ProbeDecoder(find(tiny_model()), data.grid), RProbe(trained="head")
    choose_trained(decoder, settings)
    weights = trained_parameters(decoder).values()
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return decoder, optimizer, make_key(decoder, "data", data.text.table, settings, 1e-2)


def _training(folder: Path) -> Any:
    from llava_patch.measurements.rprobe.resume import TrainingFolder

    return TrainingFolder(folder, _probe()[2])


def training_state(folder: Path) -> Path:
    from llava_patch.measurements.rprobe.resume import Progress

    work = _training(folder)
    work.save_state(*_probe()[:2], Progress([1.0, 0.5], 3.0))
    return work.state


def read_training(path: Path) -> Any:
    return _training(path.parent).load_state(*_probe()[:2])


def decoder(folder: Path) -> Path:
    from llava_patch.measurements.rprobe.resume import Progress

    work = _training(folder)
    work.finish(_probe()[0], Progress([1.0, 0.5], 3.0))
    return work.decoder


def shard(folder: Path) -> Path:
    from llava_patch.measurements.rprobe.store.shard import Record, Shard, write_shard

    tensors = {
        "tokens": torch.rand(4, 8), "positions": torch.rand(4, 2), "cells": torch.arange(4, dtype=torch.int32),
        "image_counts": torch.tensor([4]), "grids": torch.tensor([[2, 2, 14]]), "text_start": torch.tensor([2]),
        "sample_image": torch.tensor([0]), "target": torch.tensor([1, 2], dtype=torch.int32),
        "target_counts": torch.tensor([2]), "pixels": torch.rand(2, 12),
        "boxes": torch.zeros(1, 4, dtype=torch.float64), "box_counts": torch.tensor([1]),
    }  # fmt: skip
    write_shard(folder / "shard-00000.safetensors", Shard(tensors, [Record(0, "a", "a", "text")], []), "key", 0)
    return folder / "shard-00000.safetensors"


def read_shard(path: Path) -> Any:
    """As a store reads one: a damaged shard is told, and encoded again."""
    from llava_patch.measurements.rprobe.store.disk import Store

    with mock.patch.dict("os.environ", {"LLAVA_PATCH_CACHE": str(path.parent / "cache")}):
        store = Store("key", 1, {}, 1.0)
        place = store.path(0)
        place.write_bytes(path.read_bytes())
        try:
            return store.open(0)
        finally:
            place.unlink(missing_ok=True)
            store.close()


def manifest(folder: Path) -> Path:
    from llava_patch.core.files import write_json

    return write_json(folder / "key" / "manifest.json", {"model": "m", "data": "d", "masked": False, "shards": 1})


def read_manifest(path: Path) -> Any:
    from typer.testing import CliRunner

    from llava_patch.cli.main import app

    with mock.patch("llava_patch.measurements.rprobe.store.disk.stores_folder", lambda: path.parents[1]):
        done = CliRunner().invoke(app, ["rprobe", "store"])
    if done.exception is not None:
        raise done.exception
    return done.output


def report(folder: Path) -> Path:
    from llava_patch.core.files import write_json
    from llava_patch.measurements.base import encode
    from llava_patch.tools.report.build import KEPT
    from llava_patch.tools.report.sections import DONE, SKIPPED, Found, Record, Table

    found = Found("Said.", [], [Table(["a", "b"], [["1", "2"]], "rows")], [])
    records = [
        Record("drift", "Drift", "About.", DONE, found=found, settings={"split": 2}, command="llava-patch drift m"),
        Record("reach", "Reach", "About.", SKIPPED, "no base"),
    ]
    values = {
        "format": 1, "checkpoint": "m", "data": "rendered pages", "base": "", "date": "2000-01-01 00:00 UTC",
        "facts": [["host", "hf"]], "settings": {"fusion": {"method": "SkipLinks"}}, "versions": {"torch": "2"},
        "command": "llava-patch report m", "sections": encode(records), "asked": {"data": "rendered pages"},
    }  # fmt: skip
    return write_json(folder / KEPT, values)


def read_report(path: Path) -> Any:
    from llava_patch.tools.report import build

    return build.write_page(build.read(path.parent), path.parent)


def trainer_state(folder: Path) -> Path:
    from llava_patch.core.files import write_json

    history = [{"step": i, "loss": 2.0 / i, "learning_rate": 1e-4, "grad_norm": 1.0} for i in (1, 2, 3)]
    return write_json(folder / "trainer_state.json", {"log_history": history, "global_step": 3})


def read_trainer_state(path: Path) -> Any:
    from llava_patch.tools.report.sections import read_curves

    return read_curves(str(path.parent))


def lmms_results(folder: Path) -> Path:
    from llava_patch.core.files import write_json

    values = {
        "results": {
            "ocrbench": {"alias": "ocrbench", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "rprobe": {"rprobe_mse,none": 0.5, "rprobe_fvu,none": 0.4, "rprobe_psnr,none": 20.0},
        },
        "higher_is_better": {"ocrbench": {"acc": True}, "rprobe": {"rprobe_mse": False}},
        "model_name": "org/model",
    }  # fmt: skip
    return write_json(folder / "20000101_results.json", values)


def read_lmms_results(path: Path) -> Any:
    from llava_patch.measurements.rprobe import correlate

    checkpoints, _ = correlate.read_checkpoints([str(path), str(path)])
    return correlate.cells(correlate.correlate(checkpoints, "mse", ["ocrbench"])[0])


def ablation(folder: Path) -> Path:
    from llava_patch.core.files import write_json
    from llava_patch.measurements.rprobe import ablation as four
    from llava_patch.measurements.rprobe.settings import RProbe
    from tests.support.results import made_up_result

    results = dict.fromkeys(four.VARIANTS, made_up_result(steps=4))
    summary = four.summarise(results, RProbe(steps=4, resamples=9))
    return write_json(folder / four.SUMMARY, {"checkpoint": "m", **summary})


def read_ablation(path: Path) -> Any:
    import types

    from llava_patch.measurements.base import NothingToMeasure
    from llava_patch.tools.report import sections

    try:
        return sections._ablation(path.parent, path.parent, types.SimpleNamespace(checkpoint="m"))
    except NothingToMeasure as why:  # another checkpoint's: the report says so in the section's place
        assert path.name in str(why)
        return why


def samples(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (40, 30)).save(folder / "a.png")
    lines = [{"image": "a.png", "text": f"line {i}", "box": [2, 3, 25, 22], "document": "a"} for i in (1, 2)]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_samples(path: Path) -> Any:
    from llava_patch.data.readers import read_samples as read

    found = read(str(path))
    return [found[i].text for i in range(len(found))]


def _of_adapter(name: str, form: str = "adapter") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        import shutil

        shutil.copytree(_saved(form), folder / form)
        return folder / form / name

    return write


def inspect(path: Path) -> Any:
    from llava_patch.tools.inspect import inspect_checkpoint

    return inspect_checkpoint(str(path.parent)).to_dict()


def load_adapter(path: Path) -> Any:
    """Put the adapter on the stock model, and take it off again."""
    import llava_patch

    with llava_patch.load(open_stock(), path.parent) as handle:
        return handle.settings()


def _run_of_sweep(folder: Path) -> Any:
    from llava_patch.tools.sweep.plan import Run

    return Run({"Routing.split": 2}, 1, folder, ("train",), ("--seed", "1"), ("Routing.split = 2",))


def sweep_record(folder: Path) -> Path:
    from llava_patch.tools.sweep import record

    trainer_state(folder)
    record.finish(_run_of_sweep(folder), record.final_loss(folder / "trainer_state.json"), 1.0)
    return folder / record.FILE


def read_sweep_record(path: Path) -> Any:
    from llava_patch.tools.sweep import record

    return record.finished(_run_of_sweep(path.parent)) or "to be done again"


def sweep_evaluation(folder: Path) -> Path:
    from llava_patch.tools.sweep import record

    record.finish_evaluation(_run_of_sweep(folder), "lmms-eval", {"pope/accuracy": 0.5, "x/y": float("inf")})
    lmms_results(folder)
    return folder / record.EVALUATION_FILE


def read_sweep_evaluation(path: Path) -> Any:
    from llava_patch.tools.sweep import record

    return record.evaluated(_run_of_sweep(path.parent), "lmms-eval") or "to be done again"


def operative(folder: Path) -> Path:
    from llava_patch.settings import gin_config

    path = folder / "llava_patch_operative.gin"
    path.write_text(gin_config.read(["dpvr_lf_7b.gin"], ["SkipLinks.stride = 2"]).operative)
    return path


def read_operative(path: Path) -> Any:
    from llava_patch.settings import gin_config

    return gin_config.read([str(path)], [])


KINDS = [
    Kind("saturation.json", saturation, _result("llava_patch.measurements.saturation.result:SaturationResult")),
    Kind("rprobe.json", rprobe, read_rprobe),
    Kind("flops.json", flops, _result("llava_patch.measurements.flops.result:FlopsResult")),
    Kind("drift.json", drift, _result("llava_patch.measurements.drift.measurement:DriftResult")),
    Kind(
        "fusion_attention.json", fusion_attention,
        _result("llava_patch.measurements.fusion_attention.measurement:FusionAttentionResult"),
    ),
    Kind("reach.json", reach, _result("llava_patch.measurements.reach.measurement:ReachResult")),
    Kind("reach_variants.json", reach_variants, _result("llava_patch.measurements.reach.measurement:ReachComparison")),
    Kind(
        "attention_maps.json", attention_maps,
        _result("llava_patch.measurements.attention_maps.measurement:AttentionMapsResult"),
    ),
    Kind("gradients.json", gradients, read_run),
    Kind("gradients.jsonl", gradients_log, read_run),
    Kind("the gradients' unfinished window", gradients_window, read_window),
    Kind("saturation's unfinished state", saturation_state, read_state),
    Kind("the cached split", split_cache, read_split_cache),
    Kind("the probe's unfinished training", training_state, read_training),
    Kind("the probe's decoder", decoder, lambda path: _training(path.parent).load_finished(_probe()[0])),
    Kind("a shard of the store", shard, read_shard),
    Kind("the store's manifest", manifest, read_manifest),
    Kind("report.json", report, read_report),
    Kind("trainer_state.json", trainer_state, read_trainer_state),
    Kind("lmms-eval's results", lmms_results, read_lmms_results),
    Kind("ablation.json", ablation, read_ablation),
    Kind("samples.jsonl", samples, read_samples),
    Kind("an adapter's settings", _of_adapter("llava_patch.json"), inspect),
    Kind("an adapter's weights", _of_adapter("llava_patch.safetensors"), inspect),
    Kind("an adapter's settings, loaded", _of_adapter("llava_patch.json"), load_adapter),
    Kind("an adapter's weights, loaded", _of_adapter("llava_patch.safetensors"), load_adapter),
    Kind("a full checkpoint's weights", _of_adapter("model.safetensors", "full"), inspect),
    Kind("a sweep's record", sweep_record, read_sweep_record),
    Kind("a sweep's evaluation", sweep_evaluation, read_sweep_evaluation),
    Kind("an operative gin file", operative, read_operative),
    Kind("a full checkpoint's config", _of_adapter("config.json", "full"), inspect),
]  # fmt: skip
