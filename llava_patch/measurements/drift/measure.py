"""Drift of the shallow stack: are a trained checkpoint's lower layers still the base's?"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from llava_patch.core.errors import InputError, SettingError
from llava_patch.data.target import Opener
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements import pairs, passes
from llava_patch.measurements.drift.result import DEFAULTS, Drift, DriftCurves, DriftResult
from llava_patch.measurements.drift.states import Quantiles, States, Store, cosines, states_of
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
    return DriftMeter(settings).together(model, base, samples, base_samples, progress)


def measure_drift_apart(
    open_model: Opener, open_base: Opener, settings: Drift = DEFAULTS, progress: bool = True
) -> DriftResult:
    """Do as `measure_drift`, of two models that are never in memory together.

    The checkpoint runs first; its hidden states wait in a temporary store on disk, which is removed whatever happens.

    Args:
        open_model: loads the checkpoint: (model, samples as `measure_drift` takes them, for this model).
        open_base: the same of the base; its samples are of the same examples in the same order.
        settings: see `Drift`; a store that would exceed `store_gb` is an InputError.
        progress: show progress bars on stderr.
    """
    return DriftMeter(settings).apart(open_model, open_base, progress)


class DriftMeter(pairs.Meter):
    """Cosines of the states of both models' shallow layers."""

    what = "drift"
    layers: int  # how many are compared
    n_layers: int  # L
    split: int | None  # first layer of the checkpoint that does not see every position as the stock model does
    prunes: bool  # whether that is where it prunes

    def __init__(self, settings: Drift) -> None:
        """Start with nothing; `begin` chooses the layers of a model."""
        super().__init__(settings)
        self._image, self._text = Quantiles(), Quantiles()
        self.callback(self._image.close)
        self.callback(self._text.close)

    def begin(self, anatomy: Anatomy) -> None:
        """Compare as many layers as the settings say and the checkpoint has; SettingError: it has none, or fewer."""
        self.n_layers = len(anatomy.layers)
        self.split, self.prunes = _image_leaves(anatomy)
        limit, asked = self.n_layers if self.split is None else self.split, self.settings.split
        if limit == 0:
            raise SettingError(
                "drift: image positions leave this model at layer 0, so there is no shallow layer to compare"
            )
        if asked is not None and asked > limit:
            what = f"shows all positions to layers 0..{limit - 1} only"
            what = f"has {self.n_layers} layers" if self.split is None else what
            raise SettingError(f"Drift.split = {asked}: this model {what}")
        self.layers = asked or limit

    def check(self, base: Anatomy) -> None:
        """Refuse a base of another depth (InputError), or one that routes below the split (SettingError)."""
        if len(base.layers) != self.n_layers:
            raise InputError(
                f"drift: the checkpoint has {self.n_layers} decoder layers, the base {len(base.layers)}: is it this "
                "checkpoint's base?"
            )
        limit, _ = _image_leaves(base)
        if limit is not None and self.layers > limit:
            raise SettingError(
                f"Drift.split = {self.layers}: image positions leave the base's decoder at layer {limit}: set at most "
                "that"
            )

    def read(self, anatomy: Anatomy, sample: dict[str, Any]) -> States:
        """The states of the shallow layers."""
        return states_of(anatomy, sample, self.layers)

    def store(self, expected: int | None) -> Store:
        """On disk."""
        return self.enter_context(Store(self.settings.store_gb, expected))

    def add(self, number: int, one: States, other: States) -> tuple[np.ndarray, np.ndarray]:
        """Compare one sample; gives what `add_cosines` takes."""
        passes.same_input(one.seen, other.seen, number, self.what)
        found = cosines(one, other), one.seen.placed.cpu().numpy()
        self.add_cosines(*found)
        return found

    def add_cosines(self, values: np.ndarray, image: np.ndarray) -> None:
        """Add one sample's float32 [1 + layers, T], with its bool image positions [T]."""
        self._image.add(values[:, image])
        self._text.add(values[:, ~image])

    def result(self, checkpoint: str = "", base: str = "") -> DriftResult:
        """What was measured, under the names of the two models."""
        return DriftResult(
            _curves(self._image), _curves(self._text), self.n_layers, self.split, self.samples, self.skipped,
            checkpoint, base, self.settings, self.prunes,
        )  # fmt: skip


def _curves(values: Quantiles) -> DriftCurves:
    median, low = values.of(0.5, LOW)
    return DriftCurves(median[1:], low[1:], median[0], low[0], values.count)


def _image_leaves(anatomy: Anatomy) -> tuple[int | None, bool]:
    """First layer that does not see every position as the stock model does (None: all do); whether it prunes there."""
    handle = get_handle(anatomy.model)
    schedule = None if handle is None else handle.program()
    if schedule is None or not schedule.leaves_out:
        return None, False
    at = schedule.prune_at
    return (schedule.split, False) if at is None or at >= schedule.split else (at, True)
