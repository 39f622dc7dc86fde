"""Drift of the shallow stack: are a trained checkpoint's lower layers still the base's?"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_patch.core.errors import HostError, InputError, SettingError, StorageError
from llava_patch.core.files import storage_errors
from llava_patch.core.locks import FileLock, held
from llava_patch.core.paths import cache_folder
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.hosts.compat import layer_output
from llava_patch.measurements import pairs, passes
from llava_patch.measurements.drift.measurement import DEFAULTS, Drift, DriftCurves, DriftResult
from llava_patch.patching.handle import get_handle

WHAT = "drift"
LOW = 0.05
GB = 10**9
PREFIX, LOCK = "states-", ".lock"


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
    open_model: pairs.Opener, open_base: pairs.Opener, settings: Drift = DEFAULTS, progress: bool = True
) -> DriftResult:
    """As `measure_drift`, of two models that are never in memory together.

    Each opener loads one and returns (model, samples for it), samples of the same examples in the same order. Hidden
    states of the first wait on disk, in a folder that is removed whatever happens and takes `settings.store_gb` at
    most (InputError).
    """
    return DriftMeter(settings).apart(open_model, open_base, progress)


@dataclass
class States:
    """The shallow layers of one sample."""

    seen: passes.Pass  # its text tokens and image positions
    rows: list[Tensor]  # [T, hidden] each: the input of layer 0, then the output of layers 0..s-1

    @property
    def size(self) -> int:
        """Bytes that the rows take."""
        return sum(row.numel() * row.element_size() for row in self.rows)


def states_of(anatomy: Anatomy, sample: dict[str, Any], layers: int) -> States:
    """What comes out of a model's first layers for a sample; HostError: one of them sees a part of the positions."""
    found: dict[int, Tensor] = {}
    seen: passes.Pass

    def keep(row: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Any = None) -> None:
            states = layer_output(output) if row else args[0] if args else kwargs["hidden_states"]
            if states.shape[1] != len(seen.placed):
                raise HostError(
                    f"layer {row - 1} sees {states.shape[1]} of {len(seen.placed)} positions: set Drift.split to at "
                    f"most {row - 1}"
                )
            found[row] = states[0].detach()

        return hook

    with torch.no_grad(), passes.watching(anatomy, sample, WHAT) as (seen, undo):
        undo.push(anatomy.layers[0].register_forward_pre_hook(keep(0), with_kwargs=True).remove)
        for layer in range(layers):
            undo.push(anatomy.layers[layer].register_forward_hook(keep(layer + 1), with_kwargs=True).remove)
        passes.run(anatomy, sample)
    return States(seen, [found[row] for row in range(layers + 1)])


def cosines(one: States, other: States) -> np.ndarray:
    """Cosine of each row and position, float32 [rows, T]; rounded from float64, so that what is the same gives 1.

    Raises:
        InputError: states of other sizes.
        HostError: states that are not finite.
    """
    found = []
    for row, (a, b) in enumerate(zip(one.rows, other.rows, strict=True)):
        if a.shape != b.shape:
            raise InputError(
                f"drift: hidden states of {a.shape[-1]} channels in the checkpoint and {b.shape[-1]} in the base: is "
                "it this checkpoint's base?"
            )
        a, b = a.double(), b.to(a.device).double()
        norms = a.norm(dim=-1) * b.norm(dim=-1)
        # Rounding in float64 is far below float32's step at 1, so that equal states give 1 and not 1 - 6e-8.
        value = ((a * b).sum(-1) / norms).float()
        if not bool(value.isfinite().all()):
            where = "the input of layer 0" if row == 0 else f"layer {row - 1}"
            raise HostError(
                f"drift: the hidden states of {where} are not finite, or zero, in the checkpoint or its base: load "
                "both with --dtype float32; if they are in that already, one of them is no working model"
            )
        found.append(value.cpu())
    return torch.stack(found).numpy()


class Store(contextlib.ExitStack):
    """Hidden states of one model on disk, a file a sample; the folder is gone when the block ends.

    Use as a context manager. Reading is memory-mapped, a row at a time. What a killed process left is removed by the
    next one.
    """

    folder: Path

    def __init__(self, limit_gb: float, expected: int | None = None) -> None:
        """For so many samples, where that is known."""
        super().__init__()
        self.limit, self.expected, self.used = int(limit_gb * GB), expected, 0

    def __enter__(self) -> "Store":
        """The store."""
        parent = cache_folder() / "drift"
        with storage_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
        with (
            storage_errors(parent / LOCK),
            held(parent / LOCK),
        ):  # nobody takes a folder for a dead one's before it is locked
            for folder in parent.glob(f"{PREFIX}*"):
                lock = FileLock(folder / LOCK, timeout=0)
                with contextlib.suppress(Timeout, OSError):  # in use, or another user's
                    lock.acquire()  # its process is gone, or it would hold it
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.release()
            self.folder = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
            self.enter_context(FileLock(self.folder / LOCK))
        self.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return self

    def __setitem__(self, number: int, states: States) -> None:
        """Write one sample; InputError: it, or all that are expected, would exceed the limit."""
        samples = None if self.used else self.expected
        free, wanted = shutil.disk_usage(self.folder).free, self.used + states.size * (samples or 1)
        advice = "measure fewer samples, set Drift.split lower, or Drift.together = True to keep both models in memory"
        if wanted > self.limit:
            raise InputError(
                f"drift: hidden states of {samples or 'these'} samples need {wanted / GB:.3g} GB on disk, more than "
                f"Drift.store_gb = {self.limit / GB:.3g}: raise it, {advice}"
            )
        if wanted > free:
            raise StorageError(
                f"drift: hidden states need {wanted / GB:.3g} GB in {self.folder.parent}, where {free / GB:.3g} GB are "
                f"free: put LLAVA_PATCH_CACHE elsewhere, {advice}"
            )
        rows = {f"row{i}": row.cpu().contiguous() for i, row in enumerate(states.rows)}
        path = self.folder / f"{number}.safetensors"
        with storage_errors(path):
            save_file({**rows, "text_ids": states.seen.text_ids, "image": states.seen.placed.cpu()}, path)
        self.used += states.size

    def pop(self, number: int) -> States:
        """Read one sample back; its file is gone then."""
        path = self.folder / f"{number}.safetensors"
        with safe_open(path, framework="pt") as file:
            count = sum(name.startswith("row") for name in file.keys())  # noqa: SIM118  (no mapping)
            rows = [file.get_tensor(f"row{i}") for i in range(count)]
            seen = passes.Pass(file.get_tensor("text_ids"), file.get_tensor("image"))
        path.unlink()
        return States(seen, rows)


class Quantiles:
    """Exact quantiles of many columns' rows: columns wait in a temporary file, one row at a time is read back.

    Memory: 4 bytes a position while a row is sorted, whatever the number of rows.
    """

    def __init__(self) -> None:
        """Empty."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
        self._blocks: list[tuple[int, int]] = []  # where each starts, and its columns
        self.rows = 0
        self.count = 0

    def add(self, values: np.ndarray) -> None:
        """Add columns: float32 [rows, n]."""
        self.rows = values.shape[0]
        with storage_errors(Path(tempfile.gettempdir()) / "cosines"):
            self._blocks.append((self._file.seek(0, 2), values.shape[1]))
            self._file.write(np.ascontiguousarray(values, dtype=np.float32).tobytes())
            self._file.flush()
        self.count += values.shape[1]

    def of(self, *shares: float) -> list[list[float]]:
        """For each share, the quantile of every row (0.5: the median); interpolated between neighbours."""
        found = []
        for row in range(self.rows):
            parts = []
            for start, columns in self._blocks:
                self._file.seek(start + 4 * row * columns)
                parts.append(np.frombuffer(self._file.read(4 * columns), dtype=np.float32))
            found.append(np.quantile(np.concatenate(parts).astype(np.float64), shares))
        return np.stack(found, axis=1).tolist() if found else [[] for _ in shares]

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


class DriftMeter(pairs.Meter):
    """Cosines of the states of both models' shallow layers."""

    what = WHAT
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
        """On disk, in a folder that is removed whatever happens; InputError: more than `store_gb`."""
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
