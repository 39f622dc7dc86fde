"""Rows about long jobs: checkpoints that a run goes on from, sweeps, and what a training folder holds."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from tests.reliability.place import Call, Place, Row
from tests.support import run_folders

SWEEP = 'Sweep.gin_files = ("dpvr_lf_small.gin",)\nSweep.grid = {"Routing.split": (3, 5)}\nSweep.seeds = (1,)\n'
RUN = "sweep/Routing.split-3/seed1"
RECORD = f"{RUN}/llava_patch_sweep.json"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _resume(write: Callable[[Path], Path], spoil: Callable[[Path], Any], older: bool = True) -> Callable[[Place], Call]:
    """A run that is told to go on from checkpoint-12, which is spoilt; checkpoint-10 is whole."""

    def make(place: Place) -> Call:
        from llava_patch.integrations.training import resume

        if older:
            write(place.root / "checkpoint-10")
        folder = write(place.root / "checkpoint-12")
        spoil(folder)
        trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(place.root)))
        return lambda: resume.train(trainer, lambda *args: None, str(folder))

    return make


def _without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def _cut(name: str, share: float = 0.5) -> Callable[[Path], Any]:
    return lambda folder: run_folders.cut(folder / name, share)


def _holding(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


_WHOLE = ("checkpoint-12", "go on from", "checkpoint-10")
_STATE = "trainer_state.json"
_INDEX = "model.safetensors.index.json"
_SHARD = "model-00002-of-00002.safetensors"
_SPOILT: tuple[tuple[str, Callable[[Path], Path], Callable[[Path], Any], str], ...] = (
    ("no state", run_folders.checkpoint, _without(_STATE), _STATE),
    ("half a state", run_folders.checkpoint, _cut(_STATE), _STATE),
    ("an empty state", run_folders.checkpoint, _cut(_STATE, 0), _STATE),
    ("a state that is a list", run_folders.checkpoint, _holding(_STATE, "[]"), _STATE),
    ("a state that is null", run_folders.checkpoint, _holding(_STATE, "null"), _STATE),
    ("a state without a step", run_folders.checkpoint, _holding(_STATE, "{}"), "global_step"),
    ("half the weights", run_folders.checkpoint, _cut("model.safetensors"), "model.safetensors"),
    ("no weights", run_folders.checkpoint, _without("model.safetensors"), "model.safetensors"),
    ("half an optimizer", run_folders.checkpoint, _cut("optimizer.pt", 0.9), "optimizer.pt"),
    ("no optimizer", run_folders.checkpoint, _without("optimizer.pt"), "optimizer.pt"),
    ("an empty schedule", run_folders.checkpoint, _cut("scheduler.pt", 0), "scheduler.pt"),
    ("no random states", run_folders.checkpoint, _without("rng_state.pth"), "rng_state.pth"),
    ("a shard that is missing", run_folders.sharded, _without(_SHARD), _SHARD),
    ("half a shard", run_folders.sharded, _cut(_SHARD), _SHARD),
    ("shards without an index", run_folders.sharded, _without(_INDEX), _INDEX),
    ("an index without weight_map", run_folders.sharded, _holding(_INDEX, "{}"), "weight_map"),
    ("an index of numbers", run_folders.sharded, _holding(_INDEX, '{"weight_map": {"a": 1}}'), "weight_map"),
    ("LoRA without its configuration", run_folders.lora, _without("adapter_config.json"), "adapter_config.json"),
    ("an empty LoRA", run_folders.lora, _cut("adapter_model.safetensors", 0), "adapter_model.safetensors"),
    ("half of what trains beside it", run_folders.lora, _cut("llava_patch_trained.safetensors"), "patch_trained"),
    ("half a projector", run_folders.stage1, _cut("mm_projector.bin"), "mm_projector.bin"),
    ("no tag of DeepSpeed's", run_folders.deepspeed, _without("latest"), "latest"),
    ("a tag that is not there", run_folders.deepspeed, _holding("latest", "global_step99"), "global_step99"),
    ("half a rank's optimizer", run_folders.deepspeed,
     _cut("global_step12/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"), "bf16_zero_pp_rank_1"),
    ("a rank's optimizer that is missing", run_folders.deepspeed,
     _without("global_step12/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"), "bf16_zero_pp_rank_1"),
    ("a rank's random states that are missing", run_folders.deepspeed, _without("rng_state_1.pth"), "rng_state_1.pth"),
    ("shards of FSDP without a list", run_folders.fsdp, _without("optimizer_0/.metadata"), "optimizer_0/.metadata"),
)  # fmt: skip


def _no_checkpoint(place: Place) -> Call:
    from llava_patch.integrations.training import resume

    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(place.root)))
    return lambda: resume.train(trainer, lambda *args: None, str(place.root / "checkpoint-99"))


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _sweep(
    spoil: Callable[[Place], Any] = lambda place: None, *words: str, text: str = SWEEP, command: str = "true"
) -> Callable[[Place], Call]:
    """The command with a sweep's first run finished, and something spoilt."""

    def make(place: Place) -> Call:
        from llava_patch.tools.sweep import record
        from llava_patch.tools.sweep.plan import make_plan, read_sweep

        place.file("sweep.gin", SWEEP)
        run = make_plan(read_sweep(str(place.root / "sweep.gin")), (1,), place.root / "sweep", ["true"])[0]
        run.folder.mkdir(parents=True)
        record.finish(run, record.FinalLoss(1.0, 1, 1), 1.0)
        place.file(f"{RUN}/trainer_state.json", {"log_history": []})
        place.file("sweep.gin", text)
        spoil(place)
        output = ("--output", place.root / "sweep")
        return place.command("sweep", place.root / "sweep.gin", *output, *words, "--", command)

    return make


def _text(name: str, text: str) -> Callable[[Place], Any]:
    return lambda place: place.file(name, text)


def _change(**fields: Any) -> Callable[[Place], Any]:
    return lambda place: place.file(RECORD, {**json.loads((place.root / RECORD).read_text()), **fields})


_held: list[Any] = []


def _busy(place: Place) -> None:
    """A training of an earlier sweep that still runs, whose command has the lock."""
    lock = place.file("sweep/Routing.split-5/seed1/.lock").open()
    fcntl.flock(lock, fcntl.LOCK_EX)
    _held[:] = [lock]  # until the next one


# --- what training writes and reads -----------------------------------------------------------------------------------


def _window(spoil: Callable[[Path], Any], length: int = 3) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        from llava_patch.measurements.gradients.statistics import Window

        window = Window(5)
        window.add(1, torch.ones(3), torch.ones(3))
        path = window.save(place.root / "llava_patch_gradients.safetensors")
        spoil(path)
        return lambda: Window.load(path, 5, length=length)

    return make


def _log(text: str) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        from llava_patch.measurements.gradients.log import StepLog
        from llava_patch.measurements.gradients.measurement import Gradients

        place.file("gradients.jsonl", text)
        return lambda: StepLog.resume(place.root, Gradients(), 3)

    return make


def _projector(spoil: Callable[[Path], Any]) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        from llava_patch.integrations.training.stage1 import check_projector

        path = place.root / "mm_projector.bin"
        torch.save({"model.mm_projector.0.weight": torch.ones(3, 3)}, path)
        spoil(path)
        return lambda: check_projector(str(path), None)

    return make


def _scores(name: str, content: Any) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        from llava_patch.tools.sweep import record

        place.file(name, content)
        if name == "trainer_state.json":
            return lambda: record.final_loss(record.trainer_state(place.root))
        return lambda: record.metrics(place.root)

    return make


_RUN = '{"kind": "run", "settings": {}, "facts": {}}\n'

ROWS = [
    *(Row("going on", what, _resume(write, spoil), (name, *_WHOLE)) for what, write, spoil, name in _SPOILT),
    Row("going on", "half a state and no other checkpoint", _resume(run_folders.checkpoint, _cut(_STATE), older=False),
        (_STATE, "begin anew")),
    Row("going on", "a folder that is not there", _no_checkpoint, ("checkpoint-99", "no such folder")),
    Row("sweep", "half a record", _sweep(_text(RECORD, '{"format": 1')), (RECORD, "not valid JSON", "--overwrite")),
    Row("sweep", "an empty record", _sweep(_text(RECORD, "")), (RECORD, "--overwrite")),
    Row("sweep", "a record that is a list", _sweep(_text(RECORD, "[]")), (RECORD, "--overwrite")),
    Row("sweep", "a record that is null", _sweep(_text(RECORD, "null")), (RECORD, "--overwrite")),
    Row("sweep", "a record of another format", _sweep(_text(RECORD, '{"format": 7}')), (RECORD, "--overwrite")),
    Row("sweep", "a record without a loss", _sweep(_change(loss=None)), (RECORD, "loss", "--overwrite")),
    Row("sweep", "a record whose loss is text", _sweep(_change(loss={"mean": "x", "steps": 1, "last_step": 1})),
        (RECORD, "loss", "--overwrite")),
    Row("sweep", "settings that are null", _sweep(_change(settings=None)), (RECORD, "settings", "--overwrite")),
    Row("sweep", "a run of other settings", _sweep(text=SWEEP + 'Sweep.gin_params = ("Routing.side_layers = 2",)\n'),
        (RECORD, "Routing.side_layers = 1 there, Routing.side_layers = 2 now", "--overwrite")),
    Row("sweep", "a run of another command", _sweep(command="false"), (RECORD, "another command", "--overwrite")),
    Row("sweep", "a folder of somebody else", _sweep(lambda place: (place.root / RECORD).unlink()),
        (RUN, "llava_patch_sweep.json", "choose another --output")),
    Row("sweep", "results of other points",
        _sweep(_text("sweep/results.json", '{"points": [{"point": {"Routing.split": 9}}]}')),
        ("results.json", "Routing.split = 9", "--overwrite")),
    Row("sweep", "another evaluation",
        _sweep(_text(f"{RUN}/llava_patch_sweep_evaluation.json", '{"format": 1, "command": "x", "metrics": {}}'),
               "--evaluate", "true {checkpoint}"), ("evaluation.json", "--evaluate 'x'", "--overwrite")),
    Row("sweep", "metrics that are a list",
        _sweep(_text(f"{RUN}/llava_patch_sweep_evaluation.json",
                     '{"format": 1, "command": "true {checkpoint}", "metrics": [1]}'),
               "--evaluate", "true {checkpoint}"), ("evaluation.json", "metrics", "--overwrite")),
    Row("sweep", "an evaluation with an open quotation", _sweep(lambda place: None, "--evaluate", "true '{checkpoint}"),
        ("--evaluate", "close the quotation")),
    Row("sweep", "an evaluation of nothing", _sweep(lambda place: None, "--evaluate", "true"),
        ("--evaluate", "{checkpoint}")),
    Row("sweep", "one seed twice", _sweep(lambda place: None, "--seeds", "1,1"), ("--seeds", "distinct")),
    Row("sweep", "a command that is not there", _sweep(command="no-such-command"), ("no-such-command",)),
    Row("sweep", "one point as an integer and as a float", _sweep(text=SWEEP.replace("(3, 5)", "(3, 3.0)")),
        ("Routing.split = 3",)),
    Row("sweep", "a folder in which a training still runs", _sweep(_busy), ("Routing.split-5", "wait for it"), 1),
    Row("sweep", "a training's state that is a list", _scores("trainer_state.json", "[]"), ("trainer_state.json",), 1),
    Row("sweep", "a history that is text", _scores("trainer_state.json", '{"log_history": "x"}'),
        ("trainer_state.json", "log_history"), 1),
    Row("sweep", "a loss that is text", _scores("trainer_state.json", '{"log_history": [{"step": 1, "loss": "x"}]}'),
        ("trainer_state.json", "loss"), 1),
    Row("sweep", "results that are a list", _scores("1_results.json", '{"results": []}'), ("1_results.json",), 1),
    Row("sweep", "half of an evaluation's results", _scores("1_results.json", '{"results": {'), ("1_results.json",), 1),
    Row("training", "half a state of gradient statistics", _window(run_folders.cut),
        ("llava_patch_gradients.safetensors", "earlier checkpoint")),
    Row("training", "gradient statistics without numbers",
        _window(lambda path: save_file({"main": torch.ones(3)}, path)), ("llava_patch_gradients", "earlier")),
    Row("training", "gradient statistics of NaN",
        _window(lambda path: save_file({"main": torch.full((3,), torch.nan)}, path)), ("main", "not finite")),
    Row("training", "gradient statistics of another block", _window(lambda path: None, length=4),
        ("llava_patch_gradients", "expected 4")),
    Row("training", "a log of gradients that is empty", _log(""), ("gradients.jsonl", "delete the file")),
    Row("training", "a log of gradients that is no text", _log("\x00\x01\n"), ("gradients.jsonl, line 1", "delete")),
    Row("training", "a log of gradients without facts", _log('{"kind": "run"}\n'), ("gradients.jsonl, line 1",)),
    Row("training", "a log of gradients with a list", _log(_RUN + "[]\n"), ("gradients.jsonl, line 2",)),
    Row("training", "a log of gradients with a step of no number", _log(_RUN + '{"kind": "step"}\n'),
        ("gradients.jsonl, line 2",)),
    Row("training", "a log of gradients with unknown settings",
        _log('{"kind": "run", "settings": {"x": 1}, "facts": {}}\n'), ("gradients.jsonl, line 1", "settings")),
    Row("training", "half a projector of stage 1", _projector(run_folders.cut),
        ("--pretrain_mm_mlp_adapter", "mm_projector.bin", "stage 1")),
    Row("training", "a projector of stage 1 that is a list", _projector(lambda path: torch.save([1], path)),
        ("--pretrain_mm_mlp_adapter", "dictionary of tensors")),
    Row("training", "a projector of stage 1 of NaN",
        _projector(lambda path: torch.save({"model.mm_projector.0.weight": torch.full((3, 3), torch.nan)}, path)),
        ("mm_projector.bin", "not finite")),
]  # fmt: skip
