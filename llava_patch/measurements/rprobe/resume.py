"""A probe's training on disk: the state from which it goes on, and the finished decoder.

Both are safetensors files whose header says what they belong to; a file of another model, data set or settings is never
taken up, and the message names the first field that differs.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_patch.core.errors import CheckpointError, shown
from llava_patch.core.files import atomic
from llava_patch.core.stored import check_values, is_finite, numbers, read_tensors_and_metadata
from llava_patch.measurements.rprobe.keys import difference
from llava_patch.probe.decoder import ProbeDecoder, trained_parameters

STATE_FILE = "training.safetensors"
DECODER_FILE = "decoder.safetensors"
FORMAT = 1
_DELETE = ": delete it to train anew, or give another folder"


@dataclass
class Progress:
    """How far a training has come: MSE of each step, seconds over all starts, and processes that took part last."""

    losses: list[float]
    seconds: float = 0.0
    processes: int = 1


@dataclass
class TrainingFolder:
    """The folder that a training keeps its state in, made when something is written; `key` is from `make_key`."""

    folder: Path
    key: dict[str, Any]

    def __post_init__(self) -> None:
        self.state, self.decoder = self.folder / STATE_FILE, self.folder / DECODER_FILE  # unfinished, and finished

    def save_state(self, decoder: ProbeDecoder, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write weights, optimizer state and losses in one file, which replaces the last one whole."""
        self._clean()
        tensors = trained_parameters(decoder)
        for name, parameter in [*tensors.items()]:
            tensors |= {f"optimizer.{kind}.{name}": value for kind, value in optimizer.state[parameter].items()}
        _write(self.state, tensors, progress, self.key)

    def load_state(self, decoder: ProbeDecoder, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Take up an unfinished training; None when there is none, a CheckpointError when it is another run's."""
        if not self.state.is_file():
            return None
        tensors, progress, key = _read(self.state)
        if found := difference(key, self.key):
            raise CheckpointError(
                f"{self.state}: an unfinished training of another run: {found}. Give the settings and model that it "
                "was started with, another folder, or delete the file to start over"
            )
        _fill(decoder, {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}, self.state)
        for name, parameter in trained_parameters(decoder).items():
            # Adam counts its steps on the CPU, whatever device the weights are on.
            shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            state = {kind: tensors.get(f"optimizer.{kind}.{name}", torch.empty(0)) for kind in shapes}
            if any(value.shape != shapes[kind] for kind, value in state.items()):
                raise CheckpointError(f"{self.state}: the optimizer's state of {name} is damaged{_DELETE}")
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
        return progress

    def finish(self, decoder: ProbeDecoder, progress: Progress) -> None:
        """Write the finished decoder and delete the state."""
        _write(self.decoder, trained_parameters(decoder), progress, self.key)
        self.state.unlink(missing_ok=True)
        self._clean()

    def load_finished(self, decoder: ProbeDecoder) -> Progress | None:
        """Take up a finished decoder; None when there is none, or one of another run, which is then said."""
        if not self.decoder.is_file():
            return None
        tensors, progress, key = _read(self.decoder)
        if found := difference(key, self.key):
            print(f"R-Probe: {self.decoder} is not used and will be replaced: {found}", file=sys.stderr)
            return None
        _fill(decoder, tensors, self.decoder)
        return progress

    def _clean(self) -> None:
        """Delete what a killed process left half written."""
        for file in (self.state, self.decoder):
            for path in self.folder.glob(f".{file.stem}-*.safetensors"):
                path.unlink(missing_ok=True)


def load_decoder(decoder: ProbeDecoder, path: str | Path, key: dict[str, Any]) -> None:
    """Fill a fresh decoder, `choose_trained` done, with the weights of a `decoder.safetensors`.

    A field that `key`, from `make_key`, lacks is not compared. A CheckpointError where the file belongs to another
    model, data set or settings, or cannot be read.
    """
    tensors, _, saved = _read(Path(path))
    if found := difference({name: value for name, value in saved.items() if name in key}, key):
        raise CheckpointError(f"{path}: {found}")
    _fill(decoder, tensors, Path(path))


def _write(path: Path, tensors: dict[str, Tensor], progress: Progress, key: dict[str, Any]) -> None:
    header = {"format": FORMAT, "key": key, "seconds": progress.seconds, "processes": progress.processes}
    plain = {name: value.detach().contiguous() for name, value in tensors.items()}
    plain["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
    with atomic(path) as part:
        save_file(plain, part, metadata={"llava_patch": json.dumps(header)})


def _read(path: Path) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    tensors, metadata = read_tensors_and_metadata(path, advice=_DELETE)
    try:
        header = json.loads(metadata["llava_patch"])
        if header["format"] != FORMAT:
            what = f"format {shown(header['format'])}, this version of llava_patch reads {FORMAT}"
            raise CheckpointError(f"{path}: {what}{_DELETE}")
        progress = Progress(tensors.pop("losses").tolist(), float(header["seconds"]), int(header["processes"]))
        if not (numbers(progress.losses) and is_finite(progress.seconds) and isinstance(header["key"], dict)):
            raise ValueError("its losses or its key are none")
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a file that R-Probe wrote, or broken ({error!r}){_DELETE}") from error
    check_values(tensors, path)
    return tensors, progress, header["key"]


def _fill(decoder: ProbeDecoder, tensors: dict[str, Tensor], path: Path) -> None:
    parameters = trained_parameters(decoder)
    if set(parameters) != set(tensors):
        name = sorted(set(parameters) ^ set(tensors))[0]
        raise CheckpointError(f"{path}: {'lacks' if name in parameters else 'has an unknown'} {name}{_DELETE}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(tensors[name].shape)} there and {tuple(parameter.shape)} here{_DELETE}"
                )
            parameter.copy_(tensors[name])
