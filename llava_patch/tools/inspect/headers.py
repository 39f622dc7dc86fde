"""Names, shapes and dtypes of weight files without reading their values, and single values where one is needed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import locate, read_json

_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        name: in the file.
        shape: its shape.
        dtype: torch's name of its type.
        file: where it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def parameters(self) -> int:
        """How many values it has."""
        count = 1
        for side in self.shape:
            count *= side
        return count


def weight_files(folder: str) -> list[Path]:
    """The files of a full checkpoint's weights, by its index where there is one; [] when it has none.

    Raises:
        CheckpointError: the index names a file that is not there.
    """
    for stem, suffix in _STEMS:
        index = read_json(folder, f"{stem}.{suffix}.index.json")
        if index is None:
            whole = locate(folder, f"{stem}.{suffix}")
            if whole is not None:
                return [whole]
            continue
        found = []
        for name in sorted(set(index["weight_map"].values())):
            path = locate(folder, name)
            if path is None:
                raise CheckpointError(f"{folder}: {name} is missing, which {stem}.{suffix}.index.json names")
            found.append(path)
        return found
    return []


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors or torch file; of the former only the header is read.

    Raises:
        CheckpointError: a damaged file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as stream:
                slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
                return [
                    Tensor(n, tuple(s.get_shape()), _SAFETENSORS_DTYPES.get(s.get_dtype(), s.get_dtype()), path)
                    for n, s in slices.items()
                ]
        return [
            Tensor(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), path)
            for name, value in _torch_file(path).items()
        ]
    except CheckpointError:
        raise
    except Exception as error:  # safetensors, zipfile and pickle have their own
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def read_headers(paths: Sequence[Path]) -> list[Tensor]:
    """The tensors of several files."""
    return list(itertools.chain.from_iterable(read_header(path) for path in paths))


def sample(tensor: Tensor, count: int) -> list[float]:
    """Evenly spaced values of a matrix, as `checkpoint.base_fingerprint` takes them; nothing else is read.

    Args:
        tensor: of two dimensions.
        count: how many values.
    """
    rows, columns = tensor.shape
    places = torch.linspace(0, rows * columns - 1, count).long().tolist()
    if tensor.file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(tensor.file, framework="pt") as stream:
            part = stream.get_slice(tensor.name)
            found = [part[p // columns : p // columns + 1, p % columns : p % columns + 1] for p in places]
        return [float(value) for value in found]
    flat = _torch_file(tensor.file)[tensor.name].flatten()
    return [float(flat[p]) for p in places]


_opened: dict[Path, Any] = {}


def _torch_file(path: Path) -> dict[str, torch.Tensor]:
    """A torch file, memory-mapped where its format allows; kept open, because a base is sampled tensor by tensor."""
    if path not in _opened:
        try:
            # The host's own file format; weights_only keeps a foreign pickle from running code.
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6, not a zip file
            values = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: holds no named tensors")
        _opened.clear()
        _opened[path] = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return _opened[path]
