"""What LLaVA's training script gets of a patch: the patched model, what takes part in its Trainer, and records."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from llava_patch.core import records
from llava_patch.core.errors import SettingError, printable, refuse
from llava_patch.core.files import write_text
from llava_patch.fusion.training import WarmUp, steps_of
from llava_patch.hosts import anatomy, llava_code, lora, zero
from llava_patch.integrations.training import engine, resume, stage1
from llava_patch.integrations.training import gradients as gradients_trainer
from llava_patch.integrations.training.auxiliary import data as region_data
from llava_patch.integrations.training.auxiliary import trainer as auxiliary_trainer
from llava_patch.integrations.training.extension import TrainerExtension, extend
from llava_patch.integrations.training.figures import ShareOfTraining
from llava_patch.integrations.training.trainer_split import resolve_for_training
from llava_patch.measurements.saturation.result import Saturation
from llava_patch.patching import beside_peft, checkpoint
from llava_patch.patching.handle import Handle, get_handle
from llava_patch.patching.patch import patch
from llava_patch.routing.side_branch import SIDE_BRANCH, copy_layers
from llava_patch.settings import active
from llava_patch.settings.methods import AUTO

if TYPE_CHECKING:
    from llava_patch.settings.gin_config import Configuration

OPERATIVE_FILE = "llava_patch_operative.gin"
ADAPTER_FOLDER = "llava_patch_adapter"
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
ZERO_STAGES = (1, 2, 3)


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
    llava_code.fix_zero3_dtypes(model, arguments)
    gradients = None if asked is None else asked.measurements.get("Gradients")
    if gradients is not None:
        gradients_trainer.check(model, arguments, gradients)

    def attach(trainer: Any) -> None:
        if auxiliary is not None:
            auxiliary_trainer.follow(trainer, release=True)  # before what saves the model that was trained
        if gradients is not None:
            gradients_trainer.follow(trainer, gradients)
        if handle is not None:
            resume.follow(trainer, handle)
            extend(trainer, ShareOfTraining(handle))
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
    check_run(handle, training_args)
    engine.check_llavas_script(training_args)
    train_side_branch_in_full(model, handle)
    stack = handle.adapter_parameters()[len(list(handle.anatomy.projector.parameters())) :]
    for parameter in stack:  # the script has set the projector's flags, and does not know DeepStack's own
        parameter.requires_grad_(any(p.requires_grad for p in handle.anatomy.projector.parameters()))
    handle.apply_freeze()
    check_fusion(handle, training_args)
    auxiliary_trainer.check(handle, training_args)
    make_tower_trainable(handle)
    say_what_trains(handle, training_args)
    return handle


def check_run(handle: Handle, training_args: Any) -> None:
    """Refuse what no run with this patch can honour, whoever's Trainer it is."""
    split, freeze = (None, "none") if handle.routing is None else (handle.routing.split, handle.routing.freeze)
    devices = getattr(training_args, "n_gpu", 0)
    against = {
        f"Routing.split = {split} is this model's depth: nothing is routed and there is no side branch for "
        f'Routing.freeze = "{freeze}" to train': freeze != "none" and split == len(handle.anatomy.layers),
        f'--tune_mm_mlp_adapter True trains the projector, but Routing.freeze = "{freeze}" freezes it: leave Routing '
        "out of stage 1": freeze != "none" and llava_code.saves_projector_alone(training_args),
        f"one process on {devices} GPUs (nn.DataParallel) would run the first GPU's weights on all of them under a "
        "patch: launch with torchrun or deepspeed, or set CUDA_VISIBLE_DEVICES to one": devices > 1,
    }
    refuse(against)
    engine.check(handle, training_args)


def say_what_trains(handle: Handle, training_args: Any) -> None:
    """Print it, on the first rank; SettingError: a fusion does nothing and will not learn to."""
    silent = handle.silent_fusion()
    if silent is not None:
        raise SettingError(silent)
    report = handle.report()  # on every rank: it may put partitioned weights together
    if getattr(training_args, "process_index", 0) == 0:
        print(f"llava_patch: {handle!r}\nllava_patch: {report}", flush=True)


def train_side_branch_in_full(model: Any, handle: Handle) -> None:
    """Keep peft's LoRA and the side branch apart.

    LLaVA's script puts LoRA on every Linear, of a model that was loaded patched on the side branch's too: it is taken
    off again. The branch is then saved with LLaVA's other non-LoRA weights, and the adapter's config says that LoRA
    leaves it out, or peft would look for its matrices when LLaVA's loader applies the adapter.
    """
    branch = getattr(handle.anatomy.decoder, SIDE_BRANCH, None)
    if branch is None:
        return
    if lora.has_lora(branch):
        setattr(handle.anatomy.decoder, SIDE_BRANCH, copy_layers(branch, handle.anatomy.norm.weight.dtype))
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "exclude_modules", "") is None:  # peft 0.14 and newer
            config.exclude_modules = rf".*\.{SIDE_BRANCH}\..*"


def _patch_for_training(model: Any, training_args: Any, asked: "Configuration", dataset: Any, collator: Any) -> Handle:
    found = anatomy.find(model)
    fresh, projector = stage1.pending.pop(id(found.decoder), (False, None))
    methods = asked.methods()
    set_seed(getattr(training_args, "seed", 42))
    if projector is not None:  # before anything is measured through it
        patch(model, fusion=asked.fusion)
        stage1.load(found, projector, asked.fusion)
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


# --- a fusion's training settings: optimizer groups, the warm-up, a tower that can train ------------------------------


def check_fusion(handle: Handle, training_args: Any) -> None:
    """Refuse settings that this run cannot honour, before anything is written; requires_grad is as it will be."""
    fusion = handle.fusion
    if fusion is None:
        return
    owner = type(fusion).__name__
    asked = [name for name in ("tower_lr", "layer_decay", "unfreeze_after") if getattr(fusion, name)]
    parts, tower_lr = llava_code.tunable_parts(training_args), getattr(training_args, "mm_vision_tower_lr", None)
    first = asked[0] if asked else "train_tower"
    tower = fusion.train_tower != "frozen"
    deepspeed = getattr(getattr(training_args, "hf_deepspeed_config", None), "config", None) or {}
    against = {
        f"{owner}.{first} does not work with --fsdp, where LLaVA keeps the vision tower out of the model: use "
        "DeepSpeed": (asked or tower) and getattr(training_args, "fsdp", None) and engine.outside(handle),
        f'{owner}.{first} needs optimizer groups, but the DeepSpeed config has its own "optimizer": remove that entry '
        '(with offloading, also set "zero_force_ds_cpu_optimizer": false)': asked and "optimizer" in deepspeed,
        f"{owner}.train_tower = {fusion.train_tower!r}: with --tune_mm_mlp_adapter True LLaVA saves the projector "
        'alone, and the trained tower would be lost: set train_tower = "frozen" in stage 1': (
            tower and llava_code.saves_projector_alone(training_args)
        ),
        f"{owner}.train_tower = 'frozen' freezes the vision tower, which --mm_tunable_parts lets train: set "
        'train_tower = "all", or leave mm_vision_tower out': not tower and "mm_vision_tower" in parts,
        f"{owner}.tower_lr = {fusion.tower_lr} and --mm_vision_tower_lr {tower_lr} both set the vision tower's rate: "
        "leave one out": fusion.tower_lr is not None and tower_lr is not None,
    }
    refuse(against)
    if not fusion.unfreeze_after:
        return
    setting = f"{owner}.unfreeze_after = {fusion.unfreeze_after}"
    trained = set(handle.trainable())
    trains = {id(p) for n, p in handle.model.named_parameters() if n in trained}
    adapter = {id(p) for p in handle.adapter_parameters()}
    optimizer = getattr(training_args, "optim", OPTIMIZERS[0])
    optimization = deepspeed.get("zero_optimization", {})
    stage, device = optimization.get("stage", 0), (optimization.get("offload_optimizer") or {}).get("device", "none")
    against = {
        # An error, as for every setting without an effect: where nothing is left to wait, the setting was meant for
        # stage 2, or a flag that was meant to let more train is missing.
        f"{setting}: this run trains nothing but the projector, so nothing waits for it: leave the setting out of "
        "stage 1 (--tune_mm_mlp_adapter True)": not trains - adapter,
        f"{setting}: the projector that should learn first does not train in this run: leave out the setting, or what "
        'freezes it (--freeze_mm_mlp_adapter, or Routing.freeze other than "none")': not trains & adapter,
        f"{setting} resets Adam's state at the switch and needs --optim {OPTIMIZERS[0]}": (
            getattr(optimizer, "value", optimizer) not in OPTIMIZERS
        ),
        f"{setting} works with DeepSpeed ZeRO stage 1, 2 or 3, not stage {stage}": (
            deepspeed and stage not in ZERO_STAGES
        ),
        f"{setting} cannot reset optimizer states that DeepSpeed keeps on {device}": device not in ("none", "cpu"),
    }
    refuse(against)


def make_tower_trainable(handle: Handle) -> None:
    """Give a tower that trains a precision that training can use (in place).

    LLaVA's script makes the tower float16 wherever --bf16 is off. Adam's epsilon and small second moments are zero
    there, and a gradient scaler refuses float16 gradients. DeepSpeed's ZeRO-3 has its own copy, whose type rules.
    """
    if handle.fusion is None or handle.fusion.train_tower == "frozen" or handle.anatomy.vision_model is None:
        return
    for parameter in handle.anatomy.vision_model.parameters():
        if parameter.dtype == torch.float16:
            own = getattr(parameter, "ds_tensor", None)
            parameter.data = parameter.data.to(torch.float32 if own is None else own.dtype)


def arrange_groups(trainer: Any, handle: Handle) -> None:
    """Rearrange in place the groups of the optimizer that a Trainer has just made, and let a warm-up follow its run."""
    fusion, probe, optimizer = handle.fusion, handle.probe, trainer.optimizer
    own_rates = fusion is not None and (fusion.tower_lr or fusion.layer_decay or fusion.unfreeze_after)
    if not own_rates and (probe is None or probe.lr is None):
        return  # the groups stay as LLaVA makes them
    optimizer.param_groups[:] = handle.arrange_groups(optimizer.param_groups, optimizer.defaults["lr"])
    if fusion is not None and fusion.unfreeze_after:
        extend(trainer, _WarmUpTraining(handle.warm_up(optimizer, 0), fusion.unfreeze_after))


class _WarmUpTraining(TrainerExtension):
    """A fusion's warm-up; a resumed run begins in the phase that its step number says."""

    def __init__(self, warm_up: WarmUp, share: float) -> None:
        self._warm_up, self._share = warm_up, share  # of the run's steps

    def begin(self, state: Any) -> None:
        steps = self._warm_up.steps = steps_of(self._share, state.max_steps)  # which is known now
        if state.is_world_process_zero:
            print(f"llava_patch: the projector learns alone in {steps} of {state.max_steps} steps", flush=True)

    def begin_step(self, state: Any, optimizer: Any) -> None:
        waited = self._warm_up.active
        self._warm_up.begin_step(state.global_step, optimizer)
        if waited and not self._warm_up.active and state.is_world_process_zero:
            print(f"llava_patch: everything learns from step {state.global_step + 1} on", flush=True)

    def end(self, state: Any) -> None:
        self._warm_up.end()


# --- what a run writes ------------------------------------------------------------------------------------------------


class Records(TrainerExtension):
    """Writes settings, operative config and (at the end) the adapter into the run's folder."""

    def __init__(self, handle: Handle | None) -> None:
        self._handle = handle  # None where gin brings flags alone

    def begin(self, state: Any) -> None:
        """Write settings and operative config into the run's folder."""
        self.save(state, Path(self.trainer.args.output_dir))

    def save(self, state: Any, folder: Path) -> None:
        """Write them into a checkpoint's folder."""
        if state.is_world_process_zero:
            write_records(self._handle, folder)

    def end(self, state: Any) -> None:
        """Write the adapter."""
        handle, first, better = self._handle, state.is_world_process_zero, None
        if handle is None:
            return
        if lora.has_lora(handle.model):
            better = " beside LoRA, whose folder holds our weights"
        elif handle.trained_share() > 0.5:
            better = ": most of the model was trained, and the checkpoint has it"
        if better is not None and first:
            print(f"llava_patch: no separate adapter{better}")
        # Partitioned weights are put together by all ranks, of which the first one writes.
        if better is None and (first or zero.is_partitioned(handle.model.parameters())):
            with zero.whole_model(self.trainer.model):
                if first or not zero.in_pieces(handle.model):  # FSDP1 puts them together on the first rank alone
                    checkpoint.save(handle, Path(self.trainer.args.output_dir) / ADAPTER_FOLDER)


def write_records(handle: Handle | None, folder: Path) -> None:
    """Write a patch's settings, if there is one, and gin's operative config into a run's or checkpoint's folder."""
    if handle is not None:
        records.write_settings(folder, beside_peft.settings_of(handle, handle.model))
    asked = active.configuration()
    if asked is not None:
        # A source may be a binding of several lines.
        header = "".join(
            f"# {printable(line)}\n" for line in ("operative config of llava_patch, from:", *asked.sources)
        )
        if handle is not None and handle.routing is not None and _auto_split(asked):
            asked = dataclasses.replace(asked, routing=handle.routing)  # the file reproduces the run
        write_text(folder / OPERATIVE_FILE, f"{header}\n{asked.operative}")
