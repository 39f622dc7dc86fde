"""A checkpoint beside its base, sample by sample: both models in memory, or one after the other."""

import contextlib
import gc
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from llava_patch.core import files
from llava_patch.core.errors import InputError
from llava_patch.core.terminal import how_many, say_cost
from llava_patch.data.target import Opener
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements import passes


class Meter(contextlib.ExitStack):
    """Running comparison of two models; a measurement says what is read of a sample, and what is compared."""

    what: ClassVar[str]  # name of the measurement, for errors and progress bars
    lacking: ClassVar[str] = "without an image"  # of unusable samples, for the error where there are no others

    def __init__(self, settings: Any) -> None:
        """Start with nothing; of the settings, `max_samples` is read here."""
        super().__init__()
        self.settings = settings
        self.samples = self.skipped = 0  # how many were compared, how many were unusable

    def begin(self, anatomy: Anatomy) -> None:
        """Choose what is compared, from the checkpoint's model; refuse what it cannot give."""
        raise NotImplementedError

    def check(self, base: Anatomy) -> None:
        """Refuse a base that cannot be compared with the checkpoint."""
        raise NotImplementedError

    def usable(self, anatomy: Anatomy, sample: dict[str, Any]) -> bool:
        """Whether a sample can be compared."""
        return passes.has_image(anatomy, sample)

    def read(self, anatomy: Anatomy, sample: dict[str, Any]) -> Any:
        """What one forward pass of a model in evaluation mode gives to compare."""
        raise NotImplementedError

    def add(self, number: int, one: Any, other: Any) -> Any:
        """Compare what the checkpoint and the base gave for a sample (`number`, from 0), if they read the same."""
        raise NotImplementedError

    def left_out(self, number: int, base: Anatomy, sample: dict[str, Any]) -> None:
        """Look at the base's sample where the checkpoint's is unusable."""

    def store(self, expected: int | None) -> Any:
        """Where the checkpoint's readings wait for the base's, by number; `expected`: how many, where it is known."""
        return {}

    def result(self) -> Any:
        """What was measured."""
        raise NotImplementedError

    def together(
        self,
        model: nn.Module,
        base: nn.Module,
        samples: Iterable[dict[str, Any]],
        base_samples: Iterable[dict[str, Any]] | None,
        progress: bool,
    ) -> Any:
        """The result of two models that are both in memory; `base_samples` None: they share the samples."""
        own, other = find(model), find(base)
        count = how_many(samples, self.settings.max_samples)
        say_cost(self.what, count, "a forward pass each of checkpoint and base", shown=progress)
        tracked = files.track(samples, self.what, progress)
        pairs = ((s, s) for s in tracked) if base_samples is None else zip(tracked, base_samples, strict=True)
        with self, passes.evaluating(model), passes.evaluating(base):
            self.begin(own)
            self.check(other)
            for number, (sample, base_sample) in enumerate(pairs):
                if self.samples == self.settings.max_samples:
                    break
                if self.usable(own, sample):
                    self.add(number, self.read(own, sample), self.read(other, base_sample))
                    self.samples += 1
                else:
                    self.skipped += 1
                    self.left_out(number, other, base_sample)
            self._refuse_nothing(self.samples)
            return self.result()

    def apart(self, open_model: Opener, open_base: Opener, progress: bool = True) -> Any:
        """The result of two models that are never in memory together: the checkpoint runs first.

        Each opener loads one, (model, samples for it), with samples of the same examples in the same order.
        """
        with self:
            waiting, usable = self._run_first(open_model, progress)
            gc.collect()  # the first model leaves the device before the next one is loaded
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            base, samples = open_base()
            anatomy = find(base)
            self.check(anatomy)
            with passes.evaluating(base):
                for number, sample in enumerate(files.track(samples, f"{self.what}: base", progress)):
                    if number == len(usable):
                        break
                    if usable[number]:
                        self.add(number, waiting.pop(number), self.read(anatomy, sample))
                        self.samples += 1
                    else:
                        self.left_out(number, anatomy, sample)
            if self.samples != (taken := sum(usable)):
                raise InputError(f"{self.what}: the base got {self.samples} of the checkpoint's {taken} samples")
            return self.result()

    def _run_first(self, open_model: Opener, progress: bool) -> tuple[Any, list[bool]]:
        """The checkpoint's readings by number, and which samples are usable; its model is let go of."""
        model, samples = open_model()
        anatomy = find(model)
        self.begin(anatomy)
        count = len(samples) if hasattr(samples, "__len__") else None  # type: ignore[arg-type]
        limit = self.settings.max_samples
        passes_of = "a forward pass each of checkpoint and base, one model after the other"
        say_cost(self.what, how_many(samples, limit), passes_of, shown=progress)
        waiting = self.store(count and min(count, limit or count))
        usable: list[bool] = []
        with passes.evaluating(model):
            for number, sample in enumerate(files.track(samples, f"{self.what}: checkpoint", progress)):
                if number - self.skipped == limit:
                    break
                usable.append(self.usable(anatomy, sample))
                if usable[number]:
                    waiting[number] = self.read(anatomy, sample)
                else:
                    self.skipped += 1
        self._refuse_nothing(len(usable) - self.skipped)
        return waiting, usable

    def _refuse_nothing(self, used: int) -> None:
        if not used:
            raise InputError(f"no usable sample for {self.what}: {self.skipped} {self.lacking}")
