"""The auxiliary loss under a Trainer of transformers, LLaVA's included: steps, logs, checkpoints, learning rate.

The head is no part of the model that is saved: it lies beside each checkpoint, for the run that goes on from it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.utils.data import IterableDataset

from llava_patch.core import stored
from llava_patch.core.errors import CheckpointError, SettingError, refuse
from llava_patch.core.files import atomic
from llava_patch.hosts import lora, zero
from llava_patch.integrations.training import engine, figures
from llava_patch.integrations.training.extension import GO_ON, TrainerExtension, extend
from llava_patch.patching.handle import Handle, get_handle
from llava_patch.patching.keys import base_fingerprint, check_fingerprint
from llava_patch.probe.auxiliary.attach import HEAD
from llava_patch.probe.auxiliary.regions import KEY

FILE = "llava_patch_rprobe.safetensors"


def check(handle: Handle, training_args: Any) -> None:
    """Refuse what this run cannot honour, before anything is written; requires_grad is as it will be."""
    auxiliary = handle.auxiliary
    if auxiliary is None or auxiliary.head is None:
        return
    deepspeed = getattr(getattr(training_args, "hf_deepspeed_config", None), "config", None) or {}
    reached = {id(p) for p in handle.adapter_parameters()}
    if handle.anatomy.vision_model is not None:
        reached |= {id(p) for p in handle.anatomy.vision_model.parameters()}
    trains = set(handle.trainable())
    against = {
        "AuxiliaryProbe does not work with FSDP (--fsdp): use DeepSpeed": engine.uses_fsdp(training_args),
        "AuxiliaryProbe adds to the model's own loss, but with --label_smoothing_factor the Trainer computes the loss "
        "itself: leave one of them out": getattr(training_args, "label_smoothing_factor", 0),
        'AuxiliaryProbe.lr needs optimizer groups, but the DeepSpeed config has its own "optimizer": remove that '
        "entry": auxiliary.settings.lr is not None and "optimizer" in deepspeed,
        "peft has put LoRA into the auxiliary loss's head, which trains in full: patch after get_peft_model()": (
            lora.has_lora(auxiliary.head)
        ),
        "AuxiliaryProbe: neither the projector nor the vision tower trains in this run, so that the loss would reach "
        "nothing but its own head: leave it out, or let one of them train (no --freeze_mm_mlp_adapter; a fusion's "
        "train_tower)": not any(id(p) in reached for n, p in handle.model.named_parameters() if n in trains),
    }
    refuse(against)


def follow(trainer: Any, *, release: bool = False) -> None:
    """Make a Trainer log the auxiliary loss, count its steps, and save and resume its head.

    Its log lines get "llava_patch/probe/model_loss", the model's own loss, and "llava_patch/probe/loss", the mean
    squared error over the target tokens of the samples that carried a region, both over all ranks and all batches since
    the last line, beside "loss", their weighted sum. Nothing is fetched from the device between two lines. Each
    checkpoint-N gets a file llava_patch_rprobe.safetensors, from which `train(resume_from_checkpoint=...)` brings the
    head back; the model's own weight files are stock.

    LLaVA's training script is followed without this call.

    Args:
        trainer: before its `train()`; its instance attributes `log` (in a run), `create_optimizer` and
            `_load_optimizer_and_scheduler` are replaced and a callback is added.
        release: take the head off the model when training ends.

    Raises:
        SettingError: the model has no auxiliary loss, or the Trainer's arguments, or an optimizer that it was given, do
            not go with it. With weight 0 nothing is checked and nothing followed.
    """
    handle = get_handle(trainer.model)
    if handle is None or handle.auxiliary is None:
        raise SettingError("follow(trainer): the model has no auxiliary loss: patch(model, probe=AuxiliaryProbe())")
    auxiliary = handle.auxiliary
    if auxiliary.head is None:
        return
    dispatch, devices = trainer.accelerator.dispatch_batches, getattr(trainer.args, "n_gpu", 0)
    if dispatch is None:  # accelerate's default
        dispatch = isinstance(trainer.train_dataset, IterableDataset)
    against = {
        f"the Trainer would drop the records' {KEY!r} entries: set TrainingArguments.remove_unused_columns = False": (
            getattr(trainer.args, "remove_unused_columns", False)
        ),
        "AuxiliaryProbe adds to the model's own loss, but the Trainer has a compute_loss_func": (
            getattr(trainer, "compute_loss_func", None) is not None
        ),
        f"one process on {devices} GPUs (nn.DataParallel) would split the regions apart from their images: launch with "
        "torchrun or deepspeed, or set CUDA_VISIBLE_DEVICES to one": devices > 1,
        # It cuts every tensor at the batch's samples, and regions are fewer.
        "dispatch_batches (accelerate's default for an IterableDataset) lets rank 0 read batches and cuts them up for "
        "the others, which would put regions on wrong images: set TrainingArguments(accelerator_config="
        '{"dispatch_batches": False}), so that every rank reads its own': dispatch and trainer.args.world_size > 1,
    }
    refuse(against)
    auxiliary.head.requires_grad_(True)  # peft freezes whatever is no LoRA
    check(handle, trainer.args)
    if trainer.optimizer is not None:
        hint = "make it from handle.param_groups(lr, weight_decay), after patch()"
        own, groups = {id(p) for p in auxiliary.head.parameters()}, trainer.optimizer.param_groups
        # A scheduler that was made already may have changed "lr".
        rates = {float(g.get("initial_lr", g["lr"])) for g in groups if any(id(p) in own for p in g["params"])}
        rate, found = auxiliary.settings.lr, ", ".join(map(str, sorted(rates)))
        against = {
            f"the Trainer's optimizer does not train the auxiliary loss's head: {hint}": (
                own - {id(p) for group in groups for p in group["params"]}
            ),
            f"AuxiliaryProbe.lr = {rate}, but the Trainer's optimizer has the auxiliary loss's head at {found}: {hint}"
            ", or leave AuxiliaryProbe.lr out": rate is not None and rates != {float(rate)},
        }
        refuse(against)
    extend(trainer, _AuxiliaryTraining(handle, release))


class _AuxiliaryTraining(TrainerExtension):
    """Steps, logs, checkpoints and learning rate of one Trainer's auxiliary loss; made by `follow`."""

    def __init__(self, handle: Handle, release: bool) -> None:
        assert handle.auxiliary is not None
        self._handle, self._auxiliary, self._release = handle, handle.auxiliary, release

    def arrange(self, optimizer: Any) -> None:
        optimizer.param_groups[:] = self._auxiliary.arrange_groups(optimizer.param_groups, 0.0, ())

    def resume(self, folder: Path | None) -> None:
        if folder is None or self.trainer.is_deepspeed_enabled:  # DeepSpeed brings the head back with its own state
            return
        load_head(self._handle, folder)

    def begin_step(self, state: Any, optimizer: Any) -> None:
        self._auxiliary.begin_step(state.global_step)  # not every one computes the loss

    def log(self, logs: dict[str, float]) -> dict[str, float]:
        if "loss" not in logs:
            return logs
        found = figures.of_losses(self._auxiliary)
        return {"loss": logs["loss"], **found, **{k: v for k, v in logs.items() if k != "loss"}}

    def save(self, state: Any, folder: Path) -> None:
        save_head(self._handle, folder, state.is_world_process_zero)

    def end(self, state: Any) -> None:
        self.save(state, Path(self.trainer.args.output_dir))
        if self._release:
            self._auxiliary.release()


def save_head(handle: Handle, folder: Path, writes: bool) -> None:
    """Write the head from the rank that `writes`; with ZeRO-3's partitioned weights every rank must call this."""
    auxiliary = handle.auxiliary
    if auxiliary is None or auxiliary.head is None:
        return
    partitioned = zero.is_partitioned(handle.model.parameters())
    if not writes and not partitioned:
        return
    tensors = {}
    for name, parameter in auxiliary.head.named_parameters():
        with zero.gathered([parameter]):
            if writes:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    # As a resumed run finds the model: beside LoRA the Trainer's checkpoints bring back LoRA's matrices alone, so only
    # what does not train is compared.
    beside_lora = lora.has_lora(handle.model)
    changed = {n for n, p in handle.model.named_parameters() if beside_lora and p.requires_grad}
    fingerprint = base_fingerprint(handle.model, changed)
    if writes:
        about = {"settings": json.dumps(handle.settings()["probe"]), "fingerprint": json.dumps(fingerprint)}
        with atomic(folder / FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", **about})


def load_head(handle: Handle, folder: Path) -> None:
    """Bring the head back from a checkpoint of the same run; one of another shape or model is refused."""
    auxiliary = handle.auxiliary
    if auxiliary is None or auxiliary.head is None:
        return
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the run goes on from a checkpoint without the auxiliary loss's head: it was trained without "
            "AuxiliaryProbe (start into another --output_dir), or the file is lost"
        )
    parameters = dict(auxiliary.head.named_parameters())
    there, about = stored.read_shapes(path, advice=GO_ON)
    check_fingerprint(handle.model, _fingerprint(about, path), path)
    here = {name: tuple(zero.shape(p)) for name, p in parameters.items()}
    if there != here:
        different = sorted(n for n in {**there, **here} if there.get(n) != here.get(n))
        raise CheckpointError(
            f"{path}: {different[0]} has shape {there.get(different[0])}, the head of {HEAD} here has "
            f"{here.get(different[0])}: it belongs to another model"
        )
    tensors = stored.read_tensors(path, advice=GO_ON)
    stored.check_values(tensors, path)
    zero.copy_values(parameters, tensors)


def _fingerprint(about: Mapping[str, str], path: Path) -> dict[str, list[float]]:
    """What the file says of the model that it was trained on, of which there is always some."""
    try:
        found = json.loads(about["fingerprint"])
    except (KeyError, *stored.UNREADABLE):
        found = None
    if not isinstance(found, dict) or not found or not all(map(stored.numbers, found.values())):
        raise CheckpointError(f"{path}: fingerprint, by which the head's model is known, is missing or damaged{GO_ON}")
    return found
