"""The figures of a Trainer's log for a training loop of one's own."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llava_patch.core.errors import SettingError
from llava_patch.core.undo import meanwhile
from llava_patch.integrations.training import figures
from llava_patch.integrations.training.gradients import unnoticed
from llava_patch.measurements.gradients.decompose import block_parameters, decompose, measured_block
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.statistics import Window
from llava_patch.patching.handle import Handle, get_handle


@contextlib.contextmanager
def follow(model: nn.Module, gradients: Gradients | None = None) -> Iterator["Loop"]:
    """Follow a training loop of one's own, as a Trainer's run is followed.

    A measured step costs two more forward and backward passes; weights, random states and buffers are those of a loop
    without it. Whole weights on every rank are needed: DDP, not ZeRO-3 or FSDP.

    Modifications: the auxiliary loss counts the loop's steps; afterwards it has the count from before.

    Args:
        model: a patched model of either host, unwrapped.
        gradients: which steps' gradients are measured, at which block; None: none. The model then needs a fusion with
            taps.

    Yields:
        A `Loop`: `micro_batch(loss)` before each backward pass of the loop, `step()` after each optimizer step.

    Raises:
        SettingError: the model has no patch, no taps to measure, or `gradients` asks for the curvature or a stop.
    """
    handle = get_handle(model)
    if handle is None:
        raise SettingError("follow(model): the model has no patch: patch(model, ...) first")
    for name in ("curvature", "stop"):
        if gradients is not None and getattr(gradients, name) is not None:
            raise SettingError(f"follow(model): Gradients.{name} is not for a loop of one's own: leave it out")
    loop = Loop(handle, gradients)
    if handle.auxiliary is None:
        yield loop
    else:
        with meanwhile(handle.auxiliary, _step=0):
            yield loop


class Loop:
    """A training loop that is followed; made by `follow`."""

    def __init__(self, handle: Handle, gradients: Gradients | None) -> None:
        self._handle, self._settings, self._steps = handle, gradients, 0
        self._sums: Tensor | None = None
        self._share = handle.trained_share()
        if gradients is not None:
            self._block = measured_block(handle.model, gradients.block, gradients.full)
            block_parameters(handle.model, self._block)
            self._window = Window(gradients.window)

    def micro_batch(self, loss: Callable[[], Tensor]) -> None:
        """Measure a micro-batch of a step that is measured; call it before the loop's own forward pass.

        Args:
            loss: computes the scalar [] that the loop then calls `backward` on, scaled for accumulation as there; it is
                called twice.
        """
        if self._settings is None or not self._settings.measures(self._steps + 1):
            return
        with unnoticed(self._handle.model):
            found = decompose(self._handle.model, loss, self._block, self._settings.full, 1.0, images=False)
        both = torch.stack(found)
        self._sums = both if self._sums is None else self._sums.add_(both)

    def step(self) -> dict[str, float]:
        """Figures since the last call, named as in the Trainer's log; every rank calls it after its optimizer step."""
        self._steps += 1
        result: dict[str, float] = {}
        auxiliary = self._handle.auxiliary
        if auxiliary is not None and auxiliary.head is not None:
            result |= figures.of_losses(auxiliary)
            auxiliary.begin_step(self._steps)
        sums, self._sums = self._sums, None
        if sums is not None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
                sums /= torch.distributed.get_world_size()
            result |= figures.of_steps([self._window.add(self._steps, sums[0], sums[1], None)[0]])
        return {**result, figures.SHARE: self._share}
