"""What we add to a Trainer of transformers: each point of a run in one place, whoever takes part in it.

For some points a Trainer has callbacks. At the others its own methods are replaced, each of them once however many
extensions there are, and only where one has something to do there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llava_patch.core.undo import UndoStack

_LASTING = {"create_optimizer": "arrange", "_load_optimizer_and_scheduler": "resume", "_load_from_checkpoint": "load"}
_IN_A_RUN = {"training_step": "training_step", "log": "log"}
"""A Trainer's methods and the points that they are replaced for: for good, and from a run's beginning to its end."""
_EXTENDED = "_llava_patch_extended"


class TrainerExtension:
    """Something that takes part in a Trainer's runs; it overrides the points at which it has something to do.

    Attributes:
        trainer: the Trainer, from `extend` on.
    """

    trainer: Any = None

    def arrange(self, optimizer: Any) -> None:
        """The Trainer has made its optimizer, whose groups neither a scheduler nor DeepSpeed has read."""

    def load(self, folder: Path) -> None:
        """The model's weights were read from this checkpoint (DeepSpeed reads its own, without this point)."""

    def resume(self, folder: Path | None) -> None:
        """The run goes on from this checkpoint, or is a new one."""

    def begin(self, state: Any) -> None:
        """A run begins."""

    def begin_step(self, state: Any, optimizer: Any) -> None:
        """An optimizer step begins, the one after `state.global_step`; `optimizer` is what accelerate made of it."""

    def training_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One micro-batch: call `step`, the Trainer's own method, with these arguments."""
        return step(*args, **kwargs)

    def end_step(self, state: Any) -> None:
        """An optimizer step ended; it is number `state.global_step`."""

    def log(self, logs: dict[str, float]) -> dict[str, float]:
        """What the Trainer logs, to be changed here."""
        return logs

    def save(self, state: Any, folder: Path) -> None:
        """The Trainer has written a checkpoint; every rank comes here."""

    def end(self, state: Any) -> None:
        """The run ends; every rank comes here."""


def extend(trainer: Any, extension: TrainerExtension) -> None:
    """Let an extension take part in a Trainer's runs, after those that do already.

    Modifications: a callback is added, once, and instance attributes of the Trainer are replaced: those of
    `create_optimizer`, `_load_optimizer_and_scheduler` and `_load_from_checkpoint` for good, those of `training_step`
    and `log` from a run's beginning to its end.
    """
    extended = vars(trainer).get(_EXTENDED)
    if extended is None:
        extended = _Extended(trainer)
        setattr(trainer, _EXTENDED, extended)
        trainer.add_callback(_Callback(extended))
    extension.trainer = trainer
    extended.extensions.append(extension)
    extended.replace(_LASTING, UndoStack())


class _Extended:
    """A Trainer with its extensions; its methods below stand for the Trainer's own of the same names."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.extensions: list[TrainerExtension] = []
        self.run = UndoStack()
        self._replaced: set[str] = set()

    def replace(self, methods: Mapping[str, str], undo: UndoStack) -> None:
        """Put ours in the place of the methods at whose points an extension takes part."""
        for name, point in methods.items():
            wanted = any(getattr(type(one), point) is not getattr(TrainerExtension, point) for one in self.extensions)
            if wanted and name not in self._replaced:
                original = getattr(self.trainer, name)
                ours = functools.wraps(original)(functools.partial(getattr(self, name), original))
                undo.set_attribute(self.trainer, name, ours)
                self._replaced.add(name)
                undo.push(functools.partial(self._replaced.discard, name))

    def create_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = self.trainer.optimizer is None
        optimizer = original(*args, **kwargs)
        for extension in self.extensions if made else ():
            extension.arrange(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(
        self, original: Callable[..., Any], checkpoint: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for extension in self.extensions:
            extension.resume(None if checkpoint is None else Path(checkpoint))
        return original(checkpoint, *args, **kwargs)

    def _load_from_checkpoint(
        self, original: Callable[..., Any], resume_from_checkpoint: Any, *args: Any, **kwargs: Any
    ) -> Any:
        loaded = original(resume_from_checkpoint, *args, **kwargs)
        for extension in self.extensions:
            extension.load(Path(resume_from_checkpoint))
        return loaded

    def training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = original
        for extension in self.extensions:
            step = functools.partial(extension.training_step, step)
        return step(*args, **kwargs)

    def log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for extension in self.extensions:
            logs = extension.log(logs)
        original(logs, *args, **kwargs)


class _Callback(TrainerCallback):
    """Brings the Trainer's callbacks to its extensions, in their order."""

    def __init__(self, extended: _Extended) -> None:
        self._extended = extended

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._extended.run.unwind()  # of a run that was broken off
        self._extended.replace(_IN_A_RUN, self._extended.run)
        for extension in self._extended.extensions:
            extension.begin(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for extension in self._extended.extensions:
            extension.begin_step(state, kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for extension in self._extended.extensions:
            extension.end_step(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for extension in self._extended.extensions:
            extension.save(state, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for extension in self._extended.extensions:
            extension.end(state)
        self._extended.run.unwind()
