"""A checkpoint's files: where they are, tensors read one at a time or by their headers alone, written in shards."""

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import CheckpointError
from llava_patch.core.stored import read_object

Load = Callable[[], Tensor]
Tensors = dict[str, Load]
"""Tensor name: a function that reads it."""
SHARD_BYTES = 5 * 10**9
WEIGHT_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.model")
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def locate(source: str, name: str) -> Path | None:
    """A file of a folder, or of a model of the hub (from its cache, or downloaded); None when it has no such file."""
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: neither a folder nor a model that the hub gives ({error})") from error
    return None if found is None else Path(found)


def read_json(source: str, name: str) -> dict | None:
    """A JSON file of a folder or hub model; None when it has none. CheckpointError: not valid JSON."""
    path = locate(source, name)
    return None if path is None else read_object(path)


def folder_of(source: str, download: bool = False, setting: str = "") -> str:
    """The folder with a checkpoint's files: `source` itself, or that of a model of the hub; else CheckpointError.

    Only with `download` is a hub model fetched that is not on this machine. `setting` is the option that named it, for
    the error.
    """
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, allow_patterns=list(_HUB_FILES), local_files_only=not download)
    except (OSError, ValueError) as error:  # no such name, none of this machine, no network
        where = "the hub does not give it" if download else "it is not on this machine"
        raise CheckpointError(
            f"{setting} {source}: no such folder; as a hub name: {where}".strip()
            + ("" if download else f" (hf download {source})")
        ) from error


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a file; a call of it reads the tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's name of its type
    file: Path
    load: Load = field(repr=False)  # reads it
    part: Any = field(repr=False)  # gives a rectangle of a matrix by two slices, of which nothing else is read

    def __call__(self) -> Tensor:
        """The tensor; a file is memory-mapped, so that it costs memory only while it is used."""
        return self.load()

    @property
    def parameters(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def sample(self, count: int) -> list[float]:
        """Evenly spaced values of a matrix, as an adapter's fingerprint has them; nothing else is read."""
        rows, columns = self.shape
        places = evenly_spaced(rows * columns, count).tolist()
        return [float(self.part[p // columns : p // columns + 1, p % columns : p % columns + 1]) for p in places]


def evenly_spaced(total: int, count: int, device: torch.device | None = None) -> Tensor:
    """Places among `total` values that an adapter's fingerprint samples: int64 [count]."""
    # Above 2^24 float32 skips integers, and the last place would lie behind the tensor; below, places stay as in
    # fingerprints that were saved before.
    dtype = torch.float32 if total <= 2**24 else torch.float64
    return torch.linspace(0, total - 1, count, device=device, dtype=dtype).long()


def same_values(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether sampled values are of the same tensor: two roundings to bfloat16 are, training moves values further."""
    return all(math.isclose(a, b, rel_tol=2**-7, abs_tol=1e-6) for a, b in zip(one, other, strict=True))


def weight_files(source: str) -> list[Path]:
    """The files of a full checkpoint's weights, by its index, all of whose files must be there; [] when it has none."""
    for stem, suffix in WEIGHT_FORMATS:
        index = read_json(source, f"{stem}.{suffix}.index.json")
        if index is not None:
            found = {name: locate(source, name) for name in sorted(set(index["weight_map"].values()))}
            if missing := [name for name, path in found.items() if path is None]:
                raise CheckpointError(f"{source}: {missing[0]} is missing, which {stem}.{suffix}.index.json names")
            return [path for path in found.values() if path is not None]
        if (whole := locate(source, f"{stem}.{suffix}")) is not None:
            return [whole]
    return []


def open_weights(source: str) -> Tensors:
    """All tensors of a checkpoint folder or hub model, which must have some, by their names in the files."""
    files = weight_files(source)
    if files:
        return {tensor.name: tensor for path in files for tensor in read_file(path)}
    hint = ""
    if locate(source, "adapter_config.json") is not None:
        hint = "; it is a LoRA folder: merge it first (LLaVA's scripts/merge_lora_weights.py)"
    names = " or ".join(f"{stem}.{suffix}" for stem, suffix in WEIGHT_FORMATS)
    raise CheckpointError(f"{source}: no weights here ({names}){hint}")


def read_file(path: Path, whole: bool = False) -> list[StoredTensor]:
    """The tensors of a safetensors or torch file, without their values.

    A file that cannot be read tensor by tensor (torch's format before 1.6) is refused, or with `whole` read at once.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            stream = safe_open(path, framework="pt")
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
            load = {name: functools.partial(stream.get_tensor, name) for name in slices}
            kinds = {name: _DTYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()}
            return [StoredTensor(n, tuple(s.get_shape()), kinds[n], path, load[n], s) for n, s in slices.items()]
        return [
            StoredTensor(n, tuple(t.shape), str(t.dtype).removeprefix("torch."), path, t.detach, t)
            for n, t in _torch_file(path, whole).items()
        ]
    except CheckpointError:
        raise
    except Exception as error:  # safetensors, zipfile and pickle have their own
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _torch_file(path: Path, whole: bool) -> dict[str, Tensor]:
    # The host's own file format; weights_only keeps a foreign pickle from running code.
    load = functools.partial(torch.load, str(path), map_location="cpu", weights_only=True)
    try:
        values = load(mmap=True)
    except RuntimeError as error:
        if not whole:
            raise CheckpointError(f"{path}: cannot be read tensor by tensor ({error})") from error
        values = load()
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no named tensors")
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def write_weights(folder: Path, tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as model.safetensors, or as shards with an index when they are more than one shard.

    A shard has at most `shard_bytes`, which is also what this needs of memory, or one larger tensor.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if shard:
            save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
            shards.append(list(shard))
            shard.clear()

    for name, load in tensors.items():
        tensor = load().detach().clone(memory_format=torch.contiguous_format)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    places = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON, as configuration files have it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output(out: Path, sources: Iterable[str]) -> None:
    """Refuse a folder that must not be written over."""
    for source in sources:
        if os.path.isdir(source) and out.resolve() == Path(source).resolve():
            raise CheckpointError(f"{out} is the input itself: name another folder to write to")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not an empty folder: name a new one")
