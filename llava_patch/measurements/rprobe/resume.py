"""A probe's training on disk: the state from which it goes on, and the finished decoder.

Both are safetensors files whose header says what they belong to. A file of another model, data set or settings is
never taken up; the message names the first field that differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_patch.core.errors import CheckpointError
from llava_patch.core.files import atomic
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.key import described, digest
from llava_patch.measurements.rprobe.trainable import trained_parameters
from llava_patch.probe.decoder import ProbeDecoder
from llava_patch.probe.sequence import build_sequence

STATE_FILE = "training.safetensors"
DECODER_FILE = "decoder.safetensors"
FORMAT = 1
# What does not change a trained decoder; what belongs to the data is in the data's own key as well.
_NOT_TRAINING = {
    "threshold", "examples", "maps", "resamples", "store", "store_gb", "save_every", "minutes", "heldout_pages",
}  # fmt: skip
_MEANING = {
    "decoder": "the decoder belongs to another model (its first layers' weights)",
    "data": "the frozen training data are others (images, boxes, texts, or the tower and projector that encoded them)",
    "embeddings": "the token embeddings of the training texts are others",
    "config": "the decoder belongs to another model (the configuration of its language model)",
    "answer": "the decoder belongs to another model (before training it answers otherwise to the same input)",
}
_SAMPLED = 4096  # values of each tensor that the fingerprint reads
_ANSWERS = 64  # numbers that stand for a fresh decoder's answer
_CLOSE = 1e-4  # by which two of them may differ: sums in another order, with other threads or on another device
_NOT_MODEL = ("architectures", "dtype", "torch_dtype", "use_cache", "mm_vision_tower", "llava_patch")


def fingerprint(decoder: ProbeDecoder) -> str:
    """Hash of a fresh decoder's layers and norm: names, shapes and evenly spaced values.

    The pixel head starts from seed and data, which are compared by themselves. Sampled, because a 7B's decoder is
    6 GB: any training changes practically all values of a tensor.
    """
    digest = hashlib.sha256(f"DeepStack enters layers {decoder.injection_layers} ".encode())
    for name, parameter in decoder.named_parameters():
        if name.startswith("head.") or "lora_" in name:
            continue
        name = name.replace(".base_layer", "")
        flat = parameter.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(chosen.numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def answer(decoder: ProbeDecoder) -> list[float]:
    """What a fresh decoder's layers and norm make of one fixed short sequence, as numbers that every state enters.

    Weights do not tell of a number that a module keeps as an attribute (a norm's epsilon), nor of rotary frequencies:
    those show here. Numbers and not their hash, because float32 sums depend on threads and device.
    """
    hidden = int(decoder.config.hidden_size)
    device = next(decoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    text, side = 3, 3
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()[None]
    target = torch.zeros(1, side * side, dtype=torch.bool)
    target[0, -3:] = True
    sequence = build_sequence(target, torch.ones_like(target), cells, torch.tensor([text]), torch.tensor([side]))
    # Of the sizes that projected and embedded tokens have; an epsilon counts where tokens are small.
    image = 0.5 * torch.randn(1, side * side, hidden, generator=generator)
    words = 0.02 * torch.randn(1, text, hidden, generator=generator)
    layers = len(decoder.injection_layers)
    added = 0.5 * torch.randn(1, layers, side * side, hidden, generator=generator).to(device) if layers else None
    with torch.autocast(device.type, enabled=False):
        states = decoder.hidden_states(image.to(device), words.to(device), sequence.to(device), added)
    flat = states.cpu().double().flatten()
    place = torch.arange(len(flat), dtype=torch.float64)
    waves = torch.cos(torch.arange(1, _ANSWERS + 1, dtype=torch.float64)[:, None] * (0.7 * place + 0.3))
    return (waves @ flat / math.sqrt(len(flat))).tolist()


def make_key(decoder: ProbeDecoder, data_key: str, table: Tensor, settings: RProbe, lr: float) -> dict[str, Any]:
    """All that a trained decoder depends on, as flat JSON values and one list of numbers.

    Args:
        decoder: before its first step.
        data_key: of the frozen training data.
        table: float32 [distinct tokens, hidden], embeddings of the training texts.
        settings: of the run.
        lr: peak learning rate.
    """
    values = {f"RProbe.{k}": v for k, v in vars(settings).items() if k not in _NOT_TRAINING}
    config = {k: v for k, v in described(decoder.config).items() if k not in _NOT_MODEL}
    return {
        "decoder": fingerprint(decoder),
        "config": digest(config),
        "answer": answer(decoder),
        **values,
        "RProbe.lr": lr,
        "version of torch": torch.__version__,
        "version of transformers": version("transformers"),
        **({"version of peft": version("peft")} if settings.trained == "lora" else {}),
        # Last: other settings make other data too, and then they are what to name.
        "data": data_key,
        "embeddings": hashlib.sha256(table.contiguous().numpy().tobytes()).hexdigest()[:32],
    }


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        losses: training MSE of each step so far.
        seconds: spent on them, over all starts.
        processes: how many took part at last.
    """

    losses: list[float]
    seconds: float = 0.0
    processes: int = 1


@dataclass(frozen=True)
class Work:
    """The folder that a training keeps its state in.

    Attributes:
        folder: made when something is written.
        key: from `make_key`.
    """

    folder: Path
    key: dict[str, Any]

    @property
    def state(self) -> Path:
        """The unfinished training."""
        return self.folder / STATE_FILE

    @property
    def decoder(self) -> Path:
        """The finished decoder."""
        return self.folder / DECODER_FILE

    def save_state(self, decoder: ProbeDecoder, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write weights, optimizer state and losses in one file, which replaces the last one whole."""
        self._clean()
        tensors = dict(trained_parameters(decoder))
        for name, parameter in trained_parameters(decoder).items():
            for kind, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{kind}.{name}"] = value
        _write(self.state, tensors, progress, self.key)

    def load_state(self, decoder: ProbeDecoder, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Take up an unfinished training; None when there is none.

        Raises:
            CheckpointError: it belongs to another model, data set or settings, or cannot be read.
        """
        if not self.state.is_file():
            return None
        tensors, progress, key = _read(self.state)
        found = difference(key, self.key)
        if found:
            raise CheckpointError(
                f"{self.state}: an unfinished training of another run: {found}. Give the settings and model that it "
                "was started with, another folder, or delete the file to start over"
            )
        parameters = trained_parameters(decoder)
        _fill(decoder, {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}, self.state)
        for name, parameter in parameters.items():
            # Adam counts its steps on the CPU, whatever device the weights are on.
            optimizer.state[parameter] = {
                kind: value if kind == "step" else value.to(parameter.device)
                for kind, value in (
                    (kind, tensors[f"optimizer.{kind}.{name}"]) for kind in ("step", "exp_avg", "exp_avg_sq")
                )
            }
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
        found = difference(key, self.key)
        if found:
            print(f"R-Probe: {self.decoder} is not used and will be replaced: {found}", file=sys.stderr)
            return None
        _fill(decoder, tensors, self.decoder)
        return progress

    def _clean(self) -> None:
        """Delete what a killed process left half written."""
        for path in self.folder.glob(".*.safetensors"):
            if path.name.startswith((f".{Path(STATE_FILE).stem}-", f".{Path(DECODER_FILE).stem}-")):
                path.unlink(missing_ok=True)


def load_decoder(decoder: ProbeDecoder, path: str | Path, key: dict[str, Any]) -> None:
    """Fill a fresh decoder with trained weights.

    Args:
        decoder: made from the model under test, `choose` done.
        path: a `decoder.safetensors`.
        key: from `make_key`; a missing field of it is not compared.

    Raises:
        CheckpointError: the file belongs to another model, data set or settings, or cannot be read.
    """
    tensors, _, saved = _read(Path(path))
    found = difference({name: value for name, value in saved.items() if name in key}, key)
    if found:
        raise CheckpointError(f"{path}: {found}")
    _fill(decoder, tensors, Path(path))


def difference(saved: dict[str, Any], key: dict[str, Any]) -> str:
    """The first field in which a saved key differs, in words; "" when they are equal."""
    for name in [*key, *(name for name in saved if name not in key)]:
        if not _equal(name, saved.get(name), key.get(name)):
            return _MEANING.get(name) or f"{name} was {saved.get(name)!r} there and is {key.get(name)!r} here"
    return ""


def _equal(name: str, saved: Any, here: Any) -> bool:
    if name != "answer" or not (isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here)):
        return bool(saved == here)
    return math.dist(saved, here) <= _CLOSE * math.hypot(*here)


def _write(path: Path, tensors: dict[str, Tensor], progress: Progress, key: dict[str, Any]) -> None:
    header = {"format": FORMAT, "key": key, "seconds": progress.seconds, "processes": progress.processes}
    plain = {name: value.detach().contiguous() for name, value in tensors.items()}
    plain["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
    with atomic(path) as part:
        save_file(plain, part, metadata={"llava_patch": json.dumps(header)})


def _read(path: Path) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {})["llava_patch"])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        if header["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {header['format']}, this version of llava_patch reads {FORMAT}")
        progress = Progress(tensors.pop("losses").tolist(), float(header["seconds"]), int(header["processes"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a file that R-Probe wrote, or broken ({error!r}): delete it") from error
    return tensors, progress, header["key"]


def _fill(decoder: ProbeDecoder, tensors: dict[str, Tensor], path: Path) -> None:
    parameters = trained_parameters(decoder)
    if set(parameters) != set(tensors):
        name = sorted(set(parameters) ^ set(tensors))[0]
        raise CheckpointError(f"{path}: {'lacks' if name in parameters else 'has an unknown'} {name}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(tensors[name].shape)} there and {tuple(parameter.shape)} here"
                )
            parameter.copy_(tensors[name])
