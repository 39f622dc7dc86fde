"""An unfinished measurement on disk: the sums so far and what they belong to.

A state of another model, other data or other settings is never taken up; the message names what differs.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_patch.core.errors import CheckpointError
from llava_patch.core.files import atomic
from llava_patch.data.examples import Example
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.saturation.result import Curves, Saturation
from llava_patch.patching.keys import model_digest

STATE_FILE = "saturation.state.safetensors"
FORMAT = 2  # 1: the model's key saw matrices only
_MEANING = {
    "model": "the model is another one (weights, configuration or patch)",
    "data": "the samples are others (images, questions or their order)",
}


def make_key(anatomy: Anatomy, examples: Sequence[Example], settings: Saturation) -> dict[str, Any]:
    """All that a measurement's numbers depend on, as flat JSON values; the order of the examples counts."""
    parameter = next(anatomy.layers[0].parameters())
    digest = hashlib.sha256()
    for example in examples:
        image = example.image
        if isinstance(image, Image.Image):
            digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
        elif isinstance(image, (str, Path)):
            path = Path(image)
            stat = path.stat() if path.exists() else None  # a missing file has its own error when it is opened
            digest.update(repr((str(path.resolve()), stat and (stat.st_size, stat.st_mtime_ns))).encode())
        else:
            digest.update(str(image).encode())
        digest.update(repr((example.id, example.question)).encode())
    return {
        **{f"Saturation.{k}": v for k, v in asdict(settings).items() if k != "save_every"},
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "attention": str(anatomy.text_config._attn_implementation),
        "version of torch": torch.__version__,
        "version of transformers": version("transformers"),
        "model": model_digest(anatomy),
        "data": digest.hexdigest(),
    }


@dataclass(frozen=True)
class RunningMean:
    """Sums over samples, each of which counts the same: memory does not grow with their number.

    Never changed in place, so that a signal between two samples cannot leave one counted in half.
    """

    samples: int = 0  # how many were added
    skipped: dict[str, int] = field(default_factory=dict)  # how many were left out, by reason
    # float64 [layers] or [layers, heads], by the curve's name: sums, and int64 how many values each has; no NaN counts.
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Number of samples looked at, those left out included."""
        return self.samples + sum(self.skipped.values())

    def plus(self, curves: Curves) -> "RunningMean":
        """With one more sample."""
        sums, counts = {}, {}
        for name, values in asdict(curves).items():
            new = torch.tensor(values, dtype=torch.float64)
            known = ~new.isnan()
            sums[name] = self.sums.get(name, 0) + torch.where(known, new, 0.0)
            counts[name] = self.counts.get(name, 0) + known.long()
        return replace(self, samples=self.samples + 1, sums=sums, counts=counts)

    def without(self, reason: str) -> "RunningMean":
        """With one more sample that was left out."""
        return replace(self, skipped={**self.skipped, reason: self.skipped.get(reason, 0) + 1})

    def mean(self) -> Curves:
        """Mean of what was added; 0 / 0 is NaN, which stands for absent."""
        return Curves(**{name: (self.sums[name] / self.counts[name]).tolist() for name in self.sums})


@dataclass(frozen=True)
class State:
    """Where an unfinished measurement is kept."""

    path: Path  # of the file; its folder is made when something is written
    key: dict[str, Any]  # from `make_key`, or any flat JSON values that say what the sums belong to

    def load(self) -> RunningMean | None:
        """The sums so far; None when there is no file. CheckpointError: another measurement's, or a broken one."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as stream:
                header = json.loads((stream.metadata() or {})["llava_patch"])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
            if header["format"] != FORMAT:
                what = f"format {header['format']}, this version reads {FORMAT}"
                raise CheckpointError(f"{self.path}: {what}: delete the file to start over")
            parts: dict[str, dict[str, Tensor]] = {"sums": {}, "counts": {}}
            for name, tensor in tensors.items():
                kind, _, curve = name.partition(".")
                parts[kind][curve] = tensor
            found = RunningMean(int(header["samples"]), dict(header["skipped"]), **parts)
            saved = dict(header["key"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: not a state of this measurement, or broken ({error!r}): delete it"
            ) from error
        for name in [*self.key, *(name for name in saved if name not in self.key)]:
            was, here = saved.get(name), self.key.get(name)
            if was != here:
                differs = _MEANING.get(name) or f"{name} was {was!r} there and is {here!r} here"
                raise CheckpointError(
                    f"{self.path}: an unfinished measurement of another kind: {differs}. Give what it was started "
                    "with, another folder, or delete the file to start over"
                )
        return found

    def save(self, done: RunningMean) -> None:
        """Write the sums in one file, which replaces the last one whole."""
        for path in self.path.parent.glob(f".{self.path.stem}-*"):  # what a killed process left half written
            path.unlink(missing_ok=True)
        tensors = {f"sums.{k}": v for k, v in done.sums.items()} | {f"counts.{k}": v for k, v in done.counts.items()}
        header = {"format": FORMAT, "key": self.key, "samples": done.samples, "skipped": done.skipped}
        with atomic(self.path) as part:
            save_file(tensors, part, metadata={"llava_patch": json.dumps(header)})

    def remove(self) -> None:
        """Delete the file, once the result is written."""
        self.path.unlink(missing_ok=True)
