"""What LLaVA's training script gets of a patch: the patched model, what takes part in its Trainer, and records."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from llava_patch.core import records
from llava_patch.core.errors import SettingError
from llava_patch.core.files import write_text
from llava_patch.hosts import anatomy, compat, lora, zero
from llava_patch.integrations.training import fusion as fusion_trainer
from llava_patch.integrations.training import gradients as gradients_trainer
from llava_patch.integrations.training import stage1
from llava_patch.integrations.training.auto_split import resolve_for_training
from llava_patch.integrations.training.auxiliary import data as region_data
from llava_patch.integrations.training.auxiliary import trainer as auxiliary_trainer
from llava_patch.integrations.training.extension import TrainerExtension, extend, refuse
from llava_patch.measurements.saturation.result import Saturation
from llava_patch.patching import checkpoint
from llava_patch.patching.handle import Handle, get_handle
from llava_patch.patching.patch import patch
from llava_patch.routing.side_branch import SIDE_BRANCH, copy_layers
from llava_patch.settings import active
from llava_patch.settings.methods import AUTO

if TYPE_CHECKING:
    from llava_patch.settings.gin_config import Configuration

OPERATIVE_FILE = "llava_patch_operative.gin"
ADAPTER_FOLDER = "llava_patch_adapter"


def prepare_run(given: dict[str, Any]) -> Callable[[Any], None]:
    """What a LLaVATrainer gets whose model is patched, or whose flags gin brings.

    `given` are the arguments that the Trainer is made with, by name (model, args, train_dataset, data_collator); in it
    data are replaced by such that carry the auxiliary loss's regions. What is returned is to be called with the
    Trainer once it is made, and lets everything that the run needs take part in it.
    """
    model, arguments, asked = given["model"], given.get("args"), active.configuration()
    data = {name: given.get(name) for name in ("train_dataset", "data_collator")}
    handle = prepare(model, arguments, data["train_dataset"], data["data_collator"])
    auxiliary = None if handle is None else handle.auxiliary
    if auxiliary is not None and auxiliary.head is None:  # weight 0
        auxiliary = None
    if auxiliary is not None:
        given["train_dataset"], given["data_collator"] = region_data.wrap(auxiliary, **data)
    compat.fix_zero3_dtypes(model, arguments)
    gradients = None if asked is None else asked.measurements.get("Gradients")
    if gradients is not None:
        gradients_trainer.check(model, arguments, gradients)

    def attach(trainer: Any) -> None:
        if auxiliary is not None:
            auxiliary_trainer.follow(trainer, release=True)  # before what saves the model that was trained
        if gradients is not None:
            gradients_trainer.follow(trainer, gradients)
        if handle is not None or (asked is not None and asked.flags):
            extend(trainer, Records(handle))

    return attach


def prepare(model: Any, training_args: Any, dataset: Any, collator: Any) -> Handle | None:
    """Patch the Trainer's model, maybe inside peft, as configured, and set what trains.

    `Routing.split = "auto"` is measured on the data set and its collator. Returns None for a model without a patch;
    refuses settings that this run cannot honour.
    """
    asked = active.configuration()
    handle = get_handle(model)
    if asked is not None and asked.patches:
        handle = _patch_for_training(model, training_args, asked, dataset, collator)
    if handle is None:
        return None
    split, freeze = (None, "none") if handle.routing is None else (handle.routing.split, handle.routing.freeze)
    devices = getattr(training_args, "n_gpu", 0)
    against = {
        f"Routing.split = {split} is this model's depth: nothing is routed and there is no side branch for "
        f'Routing.freeze = "{freeze}" to train': freeze != "none" and split == len(handle.anatomy.layers),
        f'--tune_mm_mlp_adapter True trains the projector, but Routing.freeze = "{freeze}" freezes it: leave Routing '
        "out of stage 1": freeze != "none" and getattr(training_args, "tune_mm_mlp_adapter", False),
        f"one process on {devices} GPUs (nn.DataParallel) would run the first GPU's weights on all of them under a "
        "patch: launch with torchrun or deepspeed, or set CUDA_VISIBLE_DEVICES to one": devices > 1,
    }
    refuse(against)
    _train_side_branch_in_full(model, handle)
    stack = handle.adapter_parameters()[len(list(handle.anatomy.projector.parameters())) :]
    for parameter in stack:  # the script has set the projector's flags, and does not know DeepStack's own
        parameter.requires_grad_(any(p.requires_grad for p in handle.anatomy.projector.parameters()))
    handle.apply_freeze()
    fusion_trainer.check(handle, training_args)
    auxiliary_trainer.check(handle, training_args)
    fusion_trainer.make_trainable(handle)
    silent = handle.silent_fusion()
    if silent is not None:
        raise SettingError(silent)
    report = handle.report()  # on every rank: it may put partitioned weights together
    if getattr(training_args, "process_index", 0) == 0:
        print(f"llava_patch: {handle!r}\nllava_patch: {report}", flush=True)
    return handle


def _train_side_branch_in_full(model: Any, handle: Handle) -> None:
    """Keep peft's LoRA and the side branch apart.

    LLaVA's script puts LoRA on every Linear, of a model that was loaded patched on the side branch's too: it is taken
    off again. The branch is then saved with LLaVA's other non-LoRA weights, and the adapter's config says that LoRA
    leaves it out, or peft would look for its matrices when LLaVA's loader applies the adapter.
    """
    branch = getattr(handle.anatomy.decoder, SIDE_BRANCH, None)
    if branch is None:
        return
    if lora.has_lora(branch):
        setattr(handle.anatomy.decoder, SIDE_BRANCH, copy_layers(branch))
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "exclude_modules", "") is None:  # peft 0.14 and newer
            config.exclude_modules = rf".*\.{SIDE_BRANCH}\..*"


def _patch_for_training(model: Any, training_args: Any, asked: "Configuration", dataset: Any, collator: Any) -> Handle:
    found = anatomy.find(model)
    noted = stage1.pending.pop(id(found.decoder), None)
    fresh = noted is not None and noted.fresh
    methods = asked.methods()
    set_seed(getattr(training_args, "seed", 42))
    if noted is not None and noted.projector is not None:  # before anything is measured through it
        patch(model, fusion=asked.fusion)
        stage1.load(found, noted.projector, asked.fusion)
    if _auto_split(asked):
        if fresh:
            raise SettingError(
                'Routing.split = "auto" measures how the model reads images, but its projector is new: leave Routing '
                "out of stage 1, or give --pretrain_mm_mlp_adapter"
            )
        settings = asked.measurements.get("Saturation", Saturation())
        methods["routing"] = resolve_for_training(model, methods["routing"], training_args, dataset, collator, settings)
        set_seed(getattr(training_args, "seed", 42))  # the data set may have drawn random numbers
    return patch(model, **methods, zero_start=not fresh)


def _auto_split(asked: "Configuration") -> bool:
    return asked.routing is not None and asked.routing.split == AUTO


class Records(TrainerExtension):
    """Writes settings, operative config and (at the end) the adapter into the run's folder."""

    def __init__(self, handle: Handle | None) -> None:
        """For a model's patch; None where gin brings flags alone."""
        self._handle = handle

    def begin(self, state: Any) -> None:
        """Write what the run is made with."""
        self.save(state, Path(self.trainer.args.output_dir))

    def save(self, state: Any, folder: Path) -> None:
        """Write what the checkpoint was made with."""
        if state.is_world_process_zero:
            write_records(self._handle, folder)

    def end(self, state: Any) -> None:
        """Save the adapter where the checkpoint is not the better place for it."""
        handle = self._handle
        if handle is None:
            return
        if lora.has_lora(handle.model):
            if state.is_world_process_zero:
                print("llava_patch: no separate adapter beside LoRA: LLaVA's LoRA files hold our weights")
        elif handle.trained_share() > 0.5:
            if state.is_world_process_zero:
                print("llava_patch: no separate adapter: most of the model was trained, and the checkpoint has it")
        # Partitioned weights are put together by all ranks, of which the first one writes.
        elif state.is_world_process_zero or zero.is_partitioned(handle.model.parameters()):
            checkpoint.save(handle, Path(self.trainer.args.output_dir) / ADAPTER_FOLDER)


def write_records(handle: Handle | None, folder: Path) -> None:
    """Write a patch's settings, if there is one, and gin's operative config into a run's or checkpoint's folder."""
    if handle is not None:
        records.write_settings(folder, {**handle.settings(), "form": "full"})
    asked = active.configuration()
    if asked is not None:
        header = "".join(f"# {line}\n" for line in ("operative config of llava_patch, from:", *asked.sources))
        operative = asked.operative
        if handle is not None and handle.routing is not None and _auto_split(asked):
            # The file reproduces the run: it holds what was chosen.
            operative = re.sub(r"(?m)^(\S*Routing\.split) = .*$", rf"\1 = {handle.routing.split}", operative)
            for macro in re.findall(r"(?m)^(\w+) = ", operative):  # one that only named the split is of no use any more
                if f"%{macro}" not in operative:
                    operative = re.sub(rf"(?m)^{macro} = .*\n", "", operative)
        write_text(folder / OPERATIVE_FILE, f"{header}\n{operative}")
