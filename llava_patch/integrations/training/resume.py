"""Runs that are broken off: what a Trainer's own checkpoint-N leaves out, and which of them a run can go on from.

Beside peft's LoRA, and where LLaVA's stage 1 trains the projector alone, a checkpoint-N holds the adapter and nothing
else that trained. All of that lies in one file of ours there, written before the Trainer's own files.
"""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from llava_patch.core import records, stored
from llava_patch.core.errors import CheckpointError
from llava_patch.core.registry import KINDS, TRAINING_ONLY
from llava_patch.core.undo import UndoStack, meanwhile
from llava_patch.hosts import llava_code, lora, zero
from llava_patch.integrations.training import trainer_folder
from llava_patch.integrations.training.extension import GO_ON, TrainerExtension, extend, take_no_further_step
from llava_patch.patching import beside_peft
from llava_patch.patching.beside_peft import FILE, kept_by_trainer, settings_of
from llava_patch.patching.handle import Handle, get_handle
from llava_patch.patching.vocabulary import resized
from llava_patch.settings.methods import from_record

logger = logging.getLogger("llava_patch")


def follow(trainer: Any, handle: Handle) -> None:
    """Let a Trainer go on from its checkpoints with the losses of a run that was not broken off.

    Modifications: a callback is added; the Trainer's instance attributes `_save_checkpoint`,
    `_load_optimizer_and_scheduler`, `_load_best_model`, and in LLaVA's stage 1 `_load_from_checkpoint`, are replaced.
    """
    if _projector_alone(trainer):
        undo = UndoStack()  # for good
        undo.wrap(trainer, "_save_checkpoint", functools.partial(_save_state_too, trainer))
        undo.wrap(trainer, "_load_from_checkpoint", lambda original, *args, **kwargs: None)  # ours holds everything
    beside = _Beside(handle)
    extend(trainer, beside)
    extend(trainer, _NoFurtherStep())
    if beside.under_peft() and not handle.anatomy.tower_apart:  # LLaVA's script keeps it in a file of its own
        UndoStack().wrap(trainer, "save_model", beside.save_model)


def _projector_alone(trainer: Any) -> bool:
    """Whether LLaVA's trainer saves the projector and nothing to go on from."""
    return llava_code.saves_projector_alone(trainer.args)


# --- what the Trainer leaves out --------------------------------------------------------------------------------------


class _Beside(TrainerExtension):
    """Keeps in each checkpoint-N, and brings back, what the Trainer's own files there do not hold."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def under_peft(self) -> bool:
        """Whether peft saves the model."""
        return hasattr(self.trainer.model, "get_base_model")

    def _left_out(self, engine: bool = True) -> dict[str, nn.Parameter]:
        """Parameters by name. DeepSpeed's own state (`engine`) has all that trains."""
        handle, trainer = self._handle, self.trainer
        if not self.under_peft() and not _projector_alone(trainer):
            return {}
        kept = {id(p) for p in resized(handle.model)}
        if not (engine and trainer.is_deepspeed_enabled):
            kept |= {id(p) for n, p in handle.model.named_parameters() if p.requires_grad and not lora.is_pefts(n)}
        kept -= {id(p) for p in handle.training_parameters()}
        return {name: p for name, p in handle.model.named_parameters() if id(p) in kept}

    def save_model(
        self, original: Callable[..., None], output_dir: Any = None, _internal_call: bool = False, **more: Any
    ) -> None:
        """The Trainer's method of this name."""
        with kept_by_trainer():
            original(output_dir, _internal_call, **more)
        if not _internal_call:  # a checkpoint's
            self._write(self._left_out(engine=False), Path(output_dir or self.trainer.args.output_dir))

    def save(self, state: Any, folder: Path) -> None:
        self._write(self._left_out(), folder)

    def _write(self, parameters: dict[str, nn.Parameter], folder: Path) -> None:
        writes = self.trainer.is_world_process_zero()
        if writes and self.under_peft() and not self._handle.anatomy.tower_apart:
            records.write_settings(folder, settings_of(self._handle, self.trainer.model))
        if not parameters or not (writes or zero.is_partitioned(parameters.values())):
            return
        tensors = {}
        for name, parameter in parameters.items():
            with zero.gathered([parameter]):
                if writes:
                    tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
        if writes:
            beside_peft.write(folder, tensors)

    def load(self, folder: Path) -> None:
        parameters, path = self._left_out(), folder / FILE
        if not parameters:
            return
        if not path.is_file():
            raise CheckpointError(
                f"{path}: the run would go on from a checkpoint without {next(iter(parameters))} "
                f"({len(parameters)} tensors), which peft's and LLaVA's files there do not hold: it was written by a "
                "run without llava_patch, or by an older version. Start into another --output_dir, or move it away"
            )
        there, _ = stored.read_shapes(path, advice=GO_ON)
        here = {name: tuple(zero.shape(p)) for name, p in parameters.items()}
        if there != here:
            different = sorted(name for name in {**there, **here} if there.get(name) != here.get(name))
            raise CheckpointError(
                f"{path}: {different[0]} has shape {there.get(different[0])} there and {here.get(different[0])} "
                "here (None: it does not train): go on with the settings that the run began with, or start into "
                "another --output_dir"
            )
        tensors = stored.read_tensors(path, advice=GO_ON)
        stored.check_values(tensors, path)
        zero.copy_values(parameters, tensors)


# --- the end --------------------------------------------------------------------------------------------------------


class _NoFurtherStep(TrainerExtension):
    """Lets a run that goes on from its last step end: in the middle of an epoch the Trainer would take one more."""

    def __init__(self) -> None:
        self._undo = UndoStack()

    def begin(self, state: Any) -> None:
        if 0 < state.max_steps <= state.global_step:
            take_no_further_step(self.trainer, state, self._undo)

    def end(self, state: Any) -> None:
        self._undo.unwind()


# --- LLaVA's stage 1 --------------------------------------------------------------------------------------------------


def _save_state_too(
    trainer: Any, original: Callable[..., None], model: Any, trial: Any, *args: Any, **more: Any
) -> None:
    """LLaVA's own `_save_checkpoint` (the projector), then the optimizer, the random states and the Trainer's state.

    No older checkpoint is deleted, as LLaVA's own deletes none. DeepSpeed's state goes without what is frozen: nearly
    all of the model.
    """
    original(model, trial, *args, **more)
    with UndoStack() as undo, meanwhile(trainer.args, save_total_limit=None):
        if trainer.is_deepspeed_enabled:
            undo.wrap(
                trainer.model_wrapped, "save_checkpoint", functools.partial(_save, exclude_frozen_parameters=True)
            )
        Trainer._save_checkpoint(trainer, model, trial)


def _save(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _load_leniently(original: Callable[..., Any], state: Any, strict: bool = True, **kwargs: Any) -> Any:
    """A module's `load_state_dict` for such a state."""
    return original(state, strict=False, **kwargs)


# --- which checkpoint -------------------------------------------------------------------------------------------------


def train(
    trainer: Any, original: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """A Trainer's own `train`, which for True takes the highest checkpoint-N: here the highest that is whole.

    CheckpointError: the one that is named is not whole, or of a run with other settings.
    """
    if resume_from_checkpoint is True:
        found = trainer_folder.look(Path(trainer.args.output_dir), _weights_alone(trainer))
        if found is not None:
            resume_from_checkpoint = None if found.whole is None else str(found.whole)
        trainer.accelerator.wait_for_everyone()  # every rank has seen the folders
        if found is not None and found.broken and trainer.args.should_save:
            logger.warning("llava_patch: %s", found.said())
            found.set_aside()
    elif isinstance(resume_from_checkpoint, (str, os.PathLike)):
        _check_whole(Path(resume_from_checkpoint), _weights_alone(trainer))
    handle = get_handle(trainer.model)
    if handle is not None and isinstance(resume_from_checkpoint, (str, os.PathLike)):
        check_settings(handle, resume_from_checkpoint)
    with UndoStack() as undo:
        if _projector_alone(trainer) and trainer.is_deepspeed_enabled:
            undo.wrap(trainer.model, "load_state_dict", _load_leniently)
        return original(resume_from_checkpoint, *args, **kwargs)


def _weights_alone(trainer: Any) -> bool:
    return bool(getattr(trainer.args, "save_only_model", False))


def _check_whole(folder: Path, weights_alone: bool) -> None:
    """Refuse a checkpoint that was named and is not whole."""
    if not folder.is_dir():
        raise CheckpointError(f"resume_from_checkpoint: {folder}: no such folder")
    why = trainer_folder.why_not(folder, weights_alone)
    if why:
        last = trainer_folder.look(folder.parent, weights_alone)
        whole = None if last is None else last.whole
        advice = "no other there is: move it away and begin anew" if whole is None else f"go on from {whole}"
        raise CheckpointError(f"resume_from_checkpoint: {why}: the checkpoint was not written to its end; {advice}")


def check_settings(handle: Handle, folder: str | os.PathLike[str]) -> None:
    """Refuse to go on from a checkpoint that was written with other methods, or with others' settings."""
    record = records.checkpoint_record(folder)
    if record is None:
        return
    theirs = from_record(record, str(folder)) if record else {}
    for kind in (kind for kind in KINDS if kind not in TRAINING_ONLY):
        own, carried = handle.methods.get(kind), theirs.get(kind)
        if (own is None) != (carried is None) or (own is not None and not own.agrees(carried)):
            raise CheckpointError(
                f"{folder} was written with {kind} = {carried}, and the run would go on with "
                f"{kind} = {None if own is None else own.settings}: go on with the settings that the run began with, "
                "or start into another --output_dir"
            )
