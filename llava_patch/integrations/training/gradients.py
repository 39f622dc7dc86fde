"""Gradient statistics while a Trainer of transformers trains, LLaVA's included; what it trains stays bit for bit.

Source: "Detached Skip-Links and R-Probe", appendix C.1 ("Online Measurement Strategy").
"""

import contextlib
import copy
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llava_patch.core.errors import refuse
from llava_patch.core.extras import need
from llava_patch.core.files import atomic
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import zero
from llava_patch.integrations.training import engine, figures
from llava_patch.integrations.training.extension import TrainerExtension, extend, take_no_further_step
from llava_patch.measurements.gradients.decompose import block_parameters, decompose, measured_block
from llava_patch.measurements.gradients.log import LOG, StepLog
from llava_patch.measurements.gradients.measurement import TOWER, Gradients, name_of
from llava_patch.measurements.gradients.moments import Step
from llava_patch.measurements.gradients.result import NAME, GradientsResult
from llava_patch.measurements.gradients.statistics import STATE, Window
from llava_patch.patching.handle import get_handle

logger = logging.getLogger("llava_patch")

ZERO_STAGES = (0, 1, 2)


def follow(trainer: Any, settings: Gradients | None = None) -> "Following":
    """Measure gradient statistics in a Trainer's runs; call it once, before `train()`.

    LLaVA's own training script does it where a field of `Gradients` is bound.

    A measured step costs two more forward and backward passes of its micro-batches, of which the backward passes give
    no weight but the measured block's a gradient. Weights, losses, gradient norms and learning rates are those of a run
    without it, bit for bit. With several ranks, micro-batches or both, gradients are averaged as training averages
    them, before they are clipped. In float16 the loss is scaled as training scales it, and the scale taken off again.

    Writes gradients.jsonl (a line a measured step), gradients.json and gradients.png into OUTPUT_DIR/gradients, its
    unfinished window into each checkpoint, and llava_patch/grad/main_norm, skip_norm and cosine (means of the measured
    steps since the last line) into the Trainer's log.

    Modifications: the Trainer's instance attributes `training_step` and `log` from the beginning of a run to its end,
    and for good its `_load_optimizer_and_scheduler`, which says what a run is resumed from.

    Args:
        trainer: a Trainer whose model is patched with a fusion that has taps.
        settings: of the measurement.

    Returns:
        What follows the run; its `result` is there on the first rank once a step was measured.

    Raises:
        SettingError: no taps, no gradient through them, a block that is not there, or a kind of training (ZeRO-3, FSDP,
            nn.DataParallel, compiled models) in which this does not work.
        HostError: a tower that is not loaded or has only quantised weights.
        MissingExtraError: no matplotlib.
    """
    need("Gradients", "figures")  # the run ends with a figure: not found out then
    chosen = Gradients() if settings is None else settings
    following = Following(chosen, check(trainer.model, trainer.args, chosen))
    extend(trainer, following)
    return following


def check(model: nn.Module, arguments: Any, settings: Gradients) -> int:
    """The number of the block that a run with this (patched) model can measure; refuses what stands against it."""
    block = measured_block(model, settings.block, settings.full)
    deepspeed = getattr(getattr(arguments, "hf_deepspeed_config", None), "config", None) or {}
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    parallel = getattr(model, "tp_size", None) or getattr(arguments, "parallelism_config", None)
    whole = (
        f"Gradients needs whole weights on every rank, but DeepSpeed ZeRO stage {stage} cuts them up: use stage 2 "
        '(LLaVA\'s scripts/zero2.json; Flags.deepspeed = "./scripts/zero2.json")'
    )
    against = {
        "Gradients.curvature in a training run: leave it out, and measure its checkpoints (llava-patch gradients CKPT "
        "--curvature 0.001)": settings.curvature is not None,
        "--fsdp, which cuts weights up: use DeepSpeed ZeRO-2": engine.uses_fsdp(arguments),
        f"one process on {arguments.n_gpu} GPUs (nn.DataParallel): launch with torchrun or deepspeed, or set "
        "CUDA_VISIBLE_DEVICES to one": arguments.n_gpu > 1,
        "--torch_compile, whose graphs would keep the taps as they are: leave it out": arguments.torch_compile,
        "tensor or context parallelism: use torchrun or DeepSpeed ZeRO-2": parallel,
        "DeepSpeed's own torch_autocast: use --bf16": deepspeed.get("torch_autocast", {}).get("enabled"),
        "apex: use --bf16": arguments.fp16 and getattr(arguments, "half_precision_backend", None) == "apex",
    }
    refuse({whole: stage not in ZERO_STAGES, **{f"Gradients does not work with {k}": v for k, v in against.items()}})
    block_parameters(model, block)
    return block


class Following(TrainerExtension):
    """One Trainer's measurement; made by `follow`."""

    def __init__(self, settings: Gradients, block: int) -> None:
        """Measure at this block of the vision tower, counted from 1."""
        self.settings, self.block = settings, block
        self._resumed: Path | None = None
        self._window = Window(settings.window)
        self._log: StepLog | None = None
        self._measuring = False
        self._sums: Tensor | None = None
        self._rate: float | None = None
        self._unlogged: list[Step] = []
        self._undo = UndoStack()

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.trainer.args.output_dir) / NAME

    @property
    def result(self) -> GradientsResult:
        """What was measured so far, in earlier parts of a resumed run too, on any rank that sees the folder.

        CheckpointError: no run has begun.
        """
        return GradientsResult.read(self.folder)

    def resume(self, folder: Path | None) -> None:
        """Note where the run goes on from."""
        self._resumed = folder

    def begin(self, state: Any) -> None:
        """Begin with a run, or go on with one that is resumed."""
        self._sums, self._measuring, self._unlogged = None, False, []
        self._check_stop(state)
        if state.global_step == self.settings.stop:  # broken off between its last checkpoint and its end
            take_no_further_step(self.trainer, state, self._undo)
            self.trainer.control.should_training_stop = True  # in the epochs after this one as well
        if not self.trainer.is_world_process_zero():
            return
        self._warn(state.max_steps)
        if self._go_on(state.global_step):
            return
        self._window = Window(self.settings.window)
        handle, arguments = get_handle(self.trainer.model), self.trainer.args
        assert handle is not None
        micro = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        facts = {
            "learning_rate": arguments.learning_rate,
            "block": self.block,
            "fusion": repr(handle.fusion),
            "batch": micro * arguments.world_size,
            "checkpoint": str(getattr(handle.model.config, "_name_or_path", "")),
            "trains": True,
        }
        self._log = StepLog(self.folder, self.settings, facts)

    def begin_step(self, state: Any, optimizer: Any) -> None:
        """Decide whether this training step is measured."""
        self._measuring = self.settings.measures(state.global_step + 1)
        self._sums = None
        if self._measuring:
            self._rate = learning_rate(self.trainer, self._parameters())

    def training_step(self, step: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure one micro-batch of a measured step, then train on it."""
        trainer = self.trainer
        if self._measuring:
            bare = trainer.model
            with unnoticed(bare):
                found = decompose(
                    bare, lambda: caught_loss(trainer, step, bare, copy.copy(inputs), *args, **kwargs), self.block,
                    self.settings.full, loss_scale(trainer), images=False,
                )  # fmt: skip
            both = torch.stack(found)
            self._sums = both if self._sums is None else self._sums.add_(both)
        return step(model, inputs, *args, **kwargs)

    def end_step(self, state: Any) -> None:
        """Put the step's micro-batches and ranks together; end the run where it is to stop."""
        if state.global_step == self.settings.stop:
            self.trainer.control.should_training_stop = True  # the schedule stays that of `state.max_steps`
        if not self._measuring or self._sums is None:
            return
        self._measuring, sums, self._sums = False, self._sums, None
        world = self.trainer.args.world_size
        if world > 1:
            torch.distributed.reduce(sums, dst=0)
            sums /= world
        if self._log is not None:
            found, moments = self._window.add(state.global_step, sums[0], sums[1], self._rate)
            self._log.add(found, moments)
            self._unlogged.append(found)

    def log(self, logs: dict[str, float]) -> dict[str, float]:
        """Add the means of the steps measured since the last line of losses."""
        if "loss" not in logs:
            return logs
        steps, self._unlogged = self._unlogged, []
        return {**logs, **figures.of_steps(steps)}

    def save(self, state: Any, folder: Path) -> None:
        """Write what was measured so far, and into the checkpoint what a run that goes on from it needs."""
        if self._log is None:
            return
        self._window.save(folder / STATE)
        with atomic(folder / LOG) as temporary:
            shutil.copyfile(self._log.path, temporary)
        self._write()

    def end(self, state: Any) -> None:
        """Write the results."""
        self._undo.unwind()
        if self._log is None:
            return
        self._write()
        print(f"llava_patch: gradient statistics of {name_of(self.block)} in {self.folder}", flush=True)
        self._log = None

    def _write(self) -> None:
        result = self.result
        if result.steps:
            result.save(self.folder)

    def _check_stop(self, state: Any) -> None:
        """Refuse to stop where the run does not come, or where it has been."""
        stop = self.settings.stop
        if stop is None:
            return
        against = {
            f"Gradients.stop = {stop}, but this run has {state.max_steps} steps: leave it out, or train longer "
            "(--max_steps, --num_train_epochs)": stop > state.max_steps,
            f"Gradients.stop = {stop}, but this run goes on from step {state.global_step}: it has ended already; set a "
            f"later Gradients.stop, or delete {self.trainer.args.output_dir} to begin again": stop < state.global_step,
        }
        refuse(against)

    def _parameters(self) -> list[nn.Parameter]:
        return list(block_parameters(self.trainer.model, self.block).values())

    def _go_on(self, step: int) -> bool:
        """Whether there was a measurement in the checkpoint that the run is resumed from, which goes on then."""
        folder = self._resumed
        if step == 0 or folder is None:
            return False
        if not (folder / STATE).is_file() or not (folder / LOG).is_file():
            logger.warning(
                "Gradients: %s has no gradient statistics to go on with: they begin at step %d", folder, step + 1
            )
            return False
        parameters = self._parameters()
        length = sum(map(nn.Parameter.numel, parameters))
        self._window = Window.load(folder / STATE, self.settings.window, parameters[0].device, length)
        # The checkpoint's log: the run's own may have grown since, or lie elsewhere.
        self._log = StepLog.resume(self.folder, self.settings, step, folder)
        return True

    def _warn(self, steps: int) -> None:
        chosen = self.settings
        measured = sum(map(chosen.measures, range(1, min(steps, chosen.stop or steps) + 1)))
        if measured < chosen.window:
            logger.warning(
                "Gradients: %d of the run's %d steps are measured, but a window takes %d: there will be no variance, "
                "delta or condition (7); lower Gradients.window or Gradients.every (%d)",
                measured, steps, chosen.window, chosen.every,
            )  # fmt: skip
        if not any(p.requires_grad for p in self._parameters()):
            logger.warning(
                "Gradients: %s does not train in this run (train_tower): what is measured is a gradient that no step "
                "applies",
                name_of(self.block) if self.block == TOWER else f"{name_of(self.block)} of the vision tower",
            )


def caught_loss(trainer: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """The scalar [] that one micro-batch's backward pass would begin at, with its graph and without `loss_scale`.

    The Trainer's own `training_step` makes it, with its backward pass caught: so it is scaled for accumulation,
    precision and ranks as that Trainer does it, whatever its version or subclass. The model among the arguments should
    be the bare one, so that no hook of DDP or DeepSpeed wakes up.
    """
    caught: list[Tensor] = []
    with UndoStack() as undo:
        undo.set_attribute(trainer.accelerator, "backward", lambda loss, **kwargs: caught.append(loss))
        step(*args, **kwargs)
    loss = caught[0]
    # accelerate divides as well, by a number that Trainers leave at 1; with DeepSpeed it leaves that to the engine.
    return loss if trainer.is_deepspeed_enabled else loss / trainer.accelerator.gradient_accumulation_steps


def loss_scale(trainer: Any) -> float:
    """What float16 training multiplies its loss by in this step; 1.0 where it does not."""
    if trainer.is_deepspeed_enabled:
        engine = getattr(trainer.accelerator.deepspeed_engine_wrapped, "engine", None)
        return float(getattr(getattr(engine, "optimizer", None), "loss_scale", 1.0))
    scaler = getattr(trainer.accelerator, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


@contextlib.contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """What runs inside the block leaves the model's buffers and the random states of Python and NumPy as they were.

    Those of torch are the business of what runs there, which needs them more than once.
    """
    python, numpy = random.getstate(), np.random.get_state()
    held = [
        (module, name, buffer, None if buffer is None else (buffer.clone(), buffer._version))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for module, name, buffer, saved in held:
                module._buffers[name] = buffer
                if buffer is not None and saved is not None and buffer._version != saved[1]:
                    buffer.copy_(saved[0])


def learning_rate(trainer: Any, parameters: Sequence[nn.Parameter]) -> float | None:
    """What the step that comes applies to one block's parameters; of the first group where they do not train."""
    if trainer.optimizer is None:
        return None
    wanted = {id(p) for p in parameters}
    inner = zero.innermost(trainer.optimizer).param_groups
    groups = enumerate(zero.groups(trainer.optimizer))
    place = next((i for i, group in groups if any(id(p) in wanted for p in group)), 0)
    return float(inner[place]["lr"]) if inner else None
