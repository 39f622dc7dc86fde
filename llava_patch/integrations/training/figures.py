"""What a run's log gets beside the Trainer's own figures: under one prefix, so that they stand together.

TensorBoard and wandb show them below `train/llava_patch/`, as Trainer's callbacks put `train/` before every name.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_patch.integrations.training.extension import TrainerExtension
from llava_patch.measurements.gradients.moments import Step
from llava_patch.patching.handle import Handle

if TYPE_CHECKING:
    from llava_patch.probe.auxiliary.attach import Auxiliary

SHARE = "llava_patch/trainable_share"
MAIN, SKIP, COSINE = "llava_patch/grad/main_norm", "llava_patch/grad/skip_norm", "llava_patch/grad/cosine"
LOSSES = {"ntp_loss": "llava_patch/probe/model_loss", "rprobe_loss": "llava_patch/probe/loss"}
"""Names of what `Auxiliary.take_logs` gives."""


def of_steps(steps: Sequence[Step]) -> dict[str, float]:
    """Means over measured steps, to six digits: norms of main and skip gradient, and their cosine."""
    values = {
        MAIN: [math.sqrt(s.main) for s in steps if s.finite],
        SKIP: [math.sqrt(s.skip) for s in steps if s.finite],
        COSINE: [s.cosine for s in steps if not math.isnan(s.cosine)],
    }
    means = {name: math.fsum(found) / len(found) for name, found in values.items() if found}
    return {name: float(f"{mean:.6g}") for name, mean in means.items()}


def of_losses(auxiliary: "Auxiliary") -> dict[str, float]:
    """The auxiliary loss and the model's own, means since the last call; every rank must call this."""
    return {LOSSES[name]: round(value, 6) for name, value in auxiliary.take_logs().items()}


class ShareOfTraining(TrainerExtension):
    """Puts the share of the parameters that train, 0..1, into each line of losses."""

    def __init__(self, handle: Handle) -> None:
        """Count now: an engine may cut the weights up when the run begins."""
        self._share = handle.trained_share()

    def log(self, logs: dict[str, float]) -> dict[str, float]:
        """Add it."""
        return {**logs, SHARE: self._share} if "loss" in logs else logs
