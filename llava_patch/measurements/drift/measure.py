"""Drift of the shallow stack: are a trained checkpoint's lower layers still the base's?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from llava_patch.core import files
from llava_patch.core.errors import InputError, SettingError
from llava_patch.data.target import Opener
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements import passes
from llava_patch.measurements.drift.result import DEFAULTS, Drift, DriftCurves, DriftResult
from llava_patch.measurements.drift.states import Quantiles, States, Store, cosines, states_of
from llava_patch.measurements.passes import evaluating
from llava_patch.patching.handle import get_handle

LOW = 0.05


def measure_drift(
    model: nn.Module,
    base: nn.Module,
    samples: Iterable[dict[str, Any]],
    settings: Drift = DEFAULTS,
    progress: bool = True,
    base_samples: Iterable[dict[str, Any]] | None = None,
) -> DriftResult:
    """Compare two models that are both in memory.

    Args:
        model: the trained checkpoint, of either host, stock or routed.
        base: what it was trained from; left as it is.
        samples: keyword arguments of both models' forward, each a batch of one without padding.
        settings: see `Drift`.
        progress: show a progress bar on stderr.
        base_samples: those of the base, where they are not the same (another host, precision or device).

    Raises:
        InputError: no usable sample, or samples that the two models read in different ways.
        SettingError: a split that one of the models does not have.
    """
    own, other = find(model), find(base)
    meter = Meter.between(own, other, settings)
    with evaluating(model), evaluating(base), meter:
        for sample, base_sample in passes.paired(samples, base_samples, "drift", progress):
            if meter.full:
                break
            if not passes.has_image(own, sample):
                meter.skipped += 1
                continue
            meter.add(states_of(own, sample, meter.layers), states_of(other, base_sample, meter.layers))
        return meter.result()


def measure_drift_apart(
    open_model: Opener, open_base: Opener, settings: Drift = DEFAULTS, progress: bool = True
) -> DriftResult:
    """Compare two models that are never in memory together.

    The checkpoint runs first; its hidden states wait in a temporary store on disk, which is removed whatever happens.

    Args:
        open_model: loads the checkpoint: (model, samples as `measure_drift` takes them, for this model).
        open_base: the same of the base; its samples are of the same examples in the same order.
        settings: see `Drift`; `store_gb` bounds the store.
        progress: show progress bars on stderr.

    Raises:
        InputError: as `measure_drift`, or a store that would exceed its limit.
        SettingError: as `measure_drift`.
    """
    with Store(settings.store_gb) as store:
        layers, places, skipped, limit, total = _first(open_model, settings, store, progress)
        passes.forget_models()
        base, base_samples = open_base()
        other = find(base)
        check_base(other, layers, total)
        with evaluating(base), Meter(settings, layers, total, *limit) as meter:
            meter.skipped = skipped
            wanted, last = set(places), places[-1]
            for number, sample in enumerate(files.track(base_samples, "drift: base", progress)):
                if number > last:
                    break
                if number in wanted:
                    meter.add(store.take(number), states_of(other, sample, layers), number)
            if meter.samples != len(places):
                raise InputError(f"drift: the base got {meter.samples} of the checkpoint's {len(places)} samples")
            return meter.result()


def _first(
    open_model: Opener, settings: Drift, store: Store, progress: bool
) -> tuple[int, list[int], int, tuple[int | None, bool], int]:
    """Run the checkpoint, which is out of memory when this returns."""
    model, samples = open_model()
    anatomy = find(model)
    limit = split_of(anatomy), prunes(anatomy)
    layers = layers_for(settings, len(anatomy.layers), limit[0])
    places: list[int] = []
    skipped = 0
    count = len(samples) if hasattr(samples, "__len__") else None  # type: ignore[arg-type]
    with evaluating(model):
        for number, sample in enumerate(files.track(samples, "drift: checkpoint", progress)):
            if settings.max_samples is not None and len(places) >= settings.max_samples:
                break
            if not passes.has_image(anatomy, sample):
                skipped += 1
                continue
            states = states_of(anatomy, sample, layers)
            if not places and count is not None:
                store.expect(states.size, min(count, settings.max_samples or count))
            store.put(number, states)
            places.append(number)
    if not places:
        raise InputError(f"no usable sample for drift: {skipped} without an image")
    return layers, places, skipped, limit, len(anatomy.layers)


class Meter:
    """Running comparison of one model's states with another's. Use as a context manager.

    Attributes:
        layers: how many are compared.
        n_layers: L.
        split: of the checkpoint, or None.
        prunes: whether that is where it prunes.
        samples: how many were compared.
        skipped: how many had no image.
    """

    def __init__(self, settings: Drift, layers: int, n_layers: int, split: int | None, prunes: bool = False) -> None:
        """Start with nothing; `Meter.between` chooses the layers of two models."""
        self.settings, self.layers, self.n_layers, self.split = settings, layers, n_layers, split
        self.prunes = prunes
        self.samples = self.skipped = 0
        self._image, self._text = Quantiles(), Quantiles()

    @classmethod
    def between(cls, own: Anatomy, other: Anatomy, settings: Drift) -> "Meter":
        """A meter for two models in memory.

        Raises:
            SettingError: a split that one of the models does not have.
            InputError: models of different depth.
        """
        split = split_of(own)
        layers = layers_for(settings, len(own.layers), split)
        check_base(other, layers, len(own.layers))
        return cls(settings, layers, len(own.layers), split, prunes(own))

    def __enter__(self) -> "Meter":
        """The meter."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the temporary files."""
        self._image.close()
        self._text.close()

    @property
    def full(self) -> bool:
        """Whether enough samples were taken."""
        return self.settings.max_samples is not None and self.samples >= self.settings.max_samples

    def add(self, one: States, other: States, number: int | None = None) -> None:
        """Compare one sample.

        Raises:
            InputError: the two do not read the same.
        """
        passes.same_input(one.seen, other.seen, self.samples if number is None else number, "drift")
        self.add_cosines(cosines(one, other), one.seen.placed.cpu().numpy())

    def add_cosines(self, values: np.ndarray, image: np.ndarray) -> None:
        """Add one sample's float32 [1 + layers, T], with its bool image positions [T]."""
        self._image.add(values[:, image])
        self._text.add(values[:, ~image])
        self.samples += 1

    def result(self, checkpoint: str = "", base: str = "") -> DriftResult:
        """What was measured, under the names of the two models.

        Raises:
            InputError: nothing.
        """
        if not self.samples:
            raise InputError(f"no usable sample for drift: {self.skipped} without an image")
        return DriftResult(
            _curves(self._image), _curves(self._text), self.n_layers, self.split, self.samples, self.skipped,
            checkpoint, base, self.settings, self.prunes,
        )  # fmt: skip


def _curves(values: Quantiles) -> DriftCurves:
    median, low = values.of(0.5, LOW)
    return DriftCurves(median[1:], low[1:], median[0], low[0], values.count)


def check_base(base: Anatomy, layers: int, n_layers: int) -> None:
    """Refuse a base whose layers cannot be compared.

    Args:
        base: the base.
        layers: how many are compared.
        n_layers: L of the checkpoint.

    Raises:
        SettingError: it routes below the split.
        InputError: it is of another depth.
    """
    if len(base.layers) != n_layers:
        raise InputError(
            f"drift: the checkpoint has {n_layers} decoder layers, the base {len(base.layers)}: is it this "
            "checkpoint's base?"
        )
    limit = split_of(base)
    if limit is not None and layers > limit:
        raise SettingError(
            f"Drift.split = {layers}: image positions leave the base's decoder at layer {limit}: set at most that"
        )


def split_of(anatomy: Anatomy) -> int | None:
    """First layer that does not see every position as the stock model does; None: all do."""
    handle = get_handle(anatomy.model)
    program = None if handle is None else handle.program()
    if program is None or not program.leaves_out:
        return None
    return program.split if program.prune_at is None else min(program.split, program.prune_at)


def prunes(anatomy: Anatomy) -> bool:
    """Whether `split_of` is the first layer without pruned image tokens, rather than a routed model's split."""
    handle = get_handle(anatomy.model)
    program = None if handle is None else handle.program()
    return program is not None and program.prune_at is not None and program.prune_at < program.split


def layers_for(settings: Drift, n_layers: int, split: int | None) -> int:
    """How many layers to compare.

    Raises:
        SettingError: a split of none, or more than the model has.
    """
    limit = n_layers if split is None else split
    if limit == 0:
        raise SettingError(
            "drift: image positions leave this model at layer 0, so there is no shallow layer to compare"
        )
    if settings.split is not None and settings.split > limit:
        what = f"has {n_layers} layers" if split is None else f"shows all positions to layers 0..{limit - 1} only"
        raise SettingError(f"Drift.split = {settings.split}: this model {what}")
    return settings.split or limit
