"""What LLaVA's trainer gets of a fusion's training settings: optimizer groups, the warm-up, a tower that can train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llava_patch.fusion.optimizer import WarmUp, steps_of
from llava_patch.integrations.training.extension import TrainerExtension, extend, refuse

if TYPE_CHECKING:
    from llava_patch.patching.handle import Handle

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
ZERO_STAGES = (1, 2, 3)


def check(handle: "Handle", training_args: Any) -> None:
    """Refuse settings that this run cannot honour, before anything is written; requires_grad is as it will be."""
    fusion = handle.fusion
    if fusion is None:
        return
    owner = type(fusion).__name__
    asked = [name for name in ("tower_lr", "layer_decay", "unfreeze_after") if getattr(fusion, name)]
    first = asked[0] if asked else "train_tower"
    tower = fusion.train_tower != "frozen"
    deepspeed = getattr(getattr(training_args, "hf_deepspeed_config", None), "config", None) or {}
    against = {
        f"{owner}.{first} does not work with --fsdp, where LLaVA keeps the vision tower out of the model: use "
        "DeepSpeed": getattr(training_args, "fsdp", None) and (asked or tower),
        f'{owner}.{first} needs optimizer groups, but the DeepSpeed config has its own "optimizer": remove that entry '
        '(with offloading, also set "zero_force_ds_cpu_optimizer": false)': asked and "optimizer" in deepspeed,
        f"{owner}.train_tower = {fusion.train_tower!r}: with --tune_mm_mlp_adapter True LLaVA saves the projector "
        'alone, and the trained tower would be lost: set train_tower = "frozen" in stage 1': (
            tower and getattr(training_args, "tune_mm_mlp_adapter", False)
        ),
    }
    refuse(against)
    if not fusion.unfreeze_after:
        return
    setting = f"{owner}.unfreeze_after = {fusion.unfreeze_after}"
    trained = set(handle.trainable())
    trains = {id(p) for n, p in handle.model.named_parameters() if n in trained}
    adapter = {id(p) for p in handle.adapter_parameters()}
    optimizer = getattr(training_args, "optim", OPTIMIZERS[0])
    zero = deepspeed.get("zero_optimization", {})
    stage, device = zero.get("stage", 0), (zero.get("offload_optimizer") or {}).get("device", "none")
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


def make_trainable(handle: "Handle") -> None:
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


def arrange(trainer: Any, handle: "Handle") -> None:
    """Rearrange in place the groups of the optimizer that a Trainer has just made, and let a warm-up follow its run."""
    fusion, probe, optimizer = handle.fusion, handle.probe, trainer.optimizer
    own_rates = fusion is not None and (fusion.tower_lr or fusion.layer_decay or fusion.unfreeze_after)
    if not own_rates and (probe is None or probe.lr is None):
        return  # the groups stay as LLaVA makes them
    optimizer.param_groups[:] = handle.arrange_groups(optimizer.param_groups, optimizer.defaults["lr"])
    if fusion is not None and fusion.unfreeze_after:
        extend(trainer, WarmUpTraining(handle.warm_up(optimizer, 0), fusion.unfreeze_after))


class WarmUpTraining(TrainerExtension):
    """A fusion's warm-up; a resumed run begins in the phase that its step number says."""

    def __init__(self, warm_up: WarmUp, share: float) -> None:
        """Follow a warm-up that takes this share of a run's steps."""
        self._warm_up, self._share = warm_up, share

    def begin(self, state: Any) -> None:
        """The length of the run is known now."""
        steps = self._warm_up.steps = steps_of(self._share, state.max_steps)
        if state.is_world_process_zero:
            print(f"llava_patch: the projector learns alone in {steps} of {state.max_steps} steps", flush=True)

    def begin_step(self, state: Any, optimizer: Any) -> None:
        """Hold back what waits, or let it begin."""
        waited = self._warm_up.active
        self._warm_up.begin_step(state.global_step, optimizer)
        if waited and not self._warm_up.active and state.is_world_process_zero:
            print(f"llava_patch: everything learns from step {state.global_step + 1} on", flush=True)

    def end(self, state: Any) -> None:
        """Let every gradient through again."""
        self._warm_up.end()
