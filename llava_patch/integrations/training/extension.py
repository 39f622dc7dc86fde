"""What we add to a Trainer of transformers: each point of a run in one place, whoever takes part in it.

For some points a Trainer has callbacks. At the others its own methods are replaced, each of them once however many
extensions there are, and only where one has something to do there.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from llava_patch.core.undo import UndoStack

logger = logging.getLogger("llava_patch")

GO_ON = ": go on from an earlier checkpoint, or start into another --output_dir"
"""What to do where a file of a checkpoint that a run would go on from cannot be used."""


class TrainerExtension:
    """Something that takes part in a Trainer's runs; it overrides the points at which it has something to do.

    Every rank comes to every point. `state` is the Trainer's TrainerState.

    Attributes:
        trainer: the Trainer, from `extend` on.
    """

    trainer: Any = None

    def arrange(self, optimizer: Any) -> None:
        """The Trainer has made its optimizer, whose groups neither a scheduler nor DeepSpeed has read."""

    def load(self, folder: Path) -> None:
        """The Trainer has put a checkpoint's weights into the model: a run goes on from it, or it is the best one."""

    def resume(self, folder: Path | None) -> None:
        """The run goes on from this checkpoint, whose weights are there, or is a new one."""

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
        """What the Trainer logs; what this returns is logged."""
        return logs

    def save(self, state: Any, folder: Path) -> None:
        """The Trainer is about to write a checkpoint into this folder, trainer_state.json last of all.

        A folder that has that file has everything.
        """

    def end(self, state: Any) -> None:
        """The run ends."""


def extend(trainer: Any, extension: TrainerExtension) -> None:
    """Let an extension take part in a Trainer's runs, after those that do already.

    Modifications: a callback is added, once. Where an extension has something to do there, instance attributes of the
    Trainer are replaced: those of `_LASTING` for good, `training_step` and `log` from a run's beginning to its end.
    """
    callbacks = (one for one in trainer.callback_handler.callbacks if isinstance(one, _Extensions))
    extensions = next(callbacks, None)
    if extensions is None:
        extensions = _Extensions(trainer)
        trainer.add_callback(extensions)
    extension.trainer = trainer
    extensions.members.append(extension)
    extensions.replace(_LASTING, UndoStack())


def take_no_further_step(trainer: Any, state: Any, undo: UndoStack) -> None:
    """Let a run that begins end without a step; call it where a run begins, and `undo.unwind()` where it ends.

    Modifications: the Trainer's loader of training data has nothing in it, and `args.ignore_data_skip` is True.
    """
    data = trainer.callback_handler.train_dataloader
    if data is None or isinstance(data, _Nothing):
        return
    if state.is_world_process_zero:
        logger.warning("llava_patch: all %d steps are done: nothing is left to train", state.global_step)
    undo.set_attribute(trainer.args, "ignore_data_skip", True)  # which would make another loader
    stock, set_class = type(data), functools.partial(vars(object)["__class__"].__set__, data)  # accelerate hides it
    set_class(type(stock.__name__, (_Nothing, stock), {}))
    undo.push(functools.partial(set_class, stock))


class _Nothing:
    """A loader of no data."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


_LASTING = {
    "create_optimizer": ("arrange",), "_load_optimizer_and_scheduler": ("load", "resume"),
    "_load_best_model": ("load",), "_save_checkpoint": ("save",),
}  # fmt: skip


class _Extensions(TrainerCallback):
    """A Trainer's extensions; the methods that bear the names of the Trainer's own stand for these."""

    def __init__(self, trainer: Any) -> None:
        self.members: list[TrainerExtension] = []
        self._trainer = trainer
        self._run = UndoStack()
        self._replaced: set[str] = set()
        self._said = False  # whether this run's extensions know what it goes on from

    def replace(self, methods: dict[str, tuple[str, ...]], undo: UndoStack) -> None:
        """Put ours in the place of the Trainer's methods, {name: points}, at whose points an extension takes part."""
        for name, points in methods.items():
            if name not in self._replaced and any(map(self._takes_part, points)):
                undo.wrap(self._trainer, name, getattr(self, name))
                self._replaced.add(name)
                undo.push(functools.partial(self._replaced.discard, name))

    def _takes_part(self, point: str) -> bool:
        return any(getattr(type(one), point) is not getattr(TrainerExtension, point) for one in self.members)

    def create_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = self._trainer.optimizer is None
        optimizer = original(*args, **kwargs)
        for one in self.members if made else ():
            one.arrange(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, original: Callable[..., Any], checkpoint: Any) -> Any:
        folder = None if checkpoint is None else Path(checkpoint)
        for one in self.members:
            if folder is not None:
                one.load(folder)
        self._resume(folder)
        return original(checkpoint)

    def _resume(self, folder: Path | None) -> None:
        for one in self.members:
            one.resume(folder)
        self._said = True

    def _load_best_model(self, original: Callable[..., Any]) -> None:
        original()
        for one in self.members:
            one.load(Path(self._trainer.state.best_model_checkpoint))

    def _save_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        state, arguments = self._trainer.state, self._trainer.args
        folder = Path(arguments.output_dir) / f"checkpoint-{state.global_step}"
        if arguments.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # a run that begins again writes the folder again
        for one in self.members:
            one.save(state, folder)
        original(*args, **kwargs)

    def training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for one in self.members:
            original = functools.partial(one.training_step, original)
        return original(*args, **kwargs)

    def log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for one in self.members:
            logs = one.log(logs)
        original(logs, *args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.replace({"training_step": ("training_step",), "log": ("log",)}, self._run)
        if not self._said:  # some versions load nothing for a new run
            self._resume(None)
        self._said = False
        for one in self.members:
            one.begin(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self.members:
            one.begin_step(state, kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self.members:
            one.end_step(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self.members:
            one.end(state)
        self._run.unwind()
