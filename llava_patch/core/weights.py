"""A checkpoint's files: where they are, tensors read one at a time or by their headers alone, written in shards."""

import contextlib
import functools
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_patch.core import stored
from llava_patch.core.errors import CheckpointError, StorageError, brief, shown
from llava_patch.core.files import track
from llava_patch.core.hub import is_path

Load = Callable[[], Tensor]
Tensors = dict[str, Load]
"""Tensor name: a function that reads it."""
SHARD_BYTES = 5 * 10**9
_SHOWN_BYTES = 10**9  # more shows a progress bar
WEIGHT_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
MEND = ": copy or download this file again"
_AGAIN = ": save it again as model.safetensors, or as a dictionary of tensors"
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.model")
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}  # fmt: skip


def locate(source: str, name: str) -> Path | None:
    """A file of a folder, or of a model of the hub (from its cache, or downloaded); None when it has no such file.

    CheckpointError: `source` is a path that leads nowhere or to a file, or the hub does not answer for the name.
    """
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    if is_path(source):
        raise nothing_at(source)
    from transformers.utils import cached_file

    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise nothing_at(source) from error
    return None if found is None else Path(found)


def nothing_at(source: str, setting: str = "", download: bool = True) -> CheckpointError:
    """The error for what is neither a folder nor a model of the hub that can be had here; says what is the matter.

    `setting` is the option that named it; `download`: whether the hub was asked, which a process offline never does.
    """
    what = f"{setting} {source}".strip() or "''"
    if os.path.isfile(source):
        return CheckpointError(f"{what}: is a file: name the folder that it is in")
    if is_path(source):
        return CheckpointError(f"{what}: no such folder: name the folder with the checkpoint's config.json")
    from huggingface_hub import constants

    where = f"it is not on this machine: hf download {source}"
    if download and not constants.HF_HUB_OFFLINE:
        where = "the hub does not give it: look at its name"
    return CheckpointError(f"{what}: no such folder; as a hub name: {where}")


def lacks_config(source: str, what: str = "") -> CheckpointError:
    """The error for a folder or name of the hub that has no config.json; `what` is what it is called there."""
    if not os.path.isdir(source) and (is_path(source) or not _on_machine(source)):
        return nothing_at(source, what.removesuffix(source).strip())
    advice = "name the folder that has it beside the weights"
    return CheckpointError(f"{what or source}: not a checkpoint, it has no config.json: {advice}")


def _on_machine(name: str) -> bool:
    """Whether anything of a model of the hub is in its cache."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()


def read_json(source: str, name: str) -> dict | None:
    """The object in a JSON file of a folder or hub model; None when there is no such file. CheckpointError: damaged."""
    path = locate(source, name)
    return None if path is None else stored.read_object(path, advice=MEND)


def folder_of(source: str, download: bool = False, setting: str = "") -> str:
    """The folder with a checkpoint's files: `source` itself, or that of a model of the hub; else CheckpointError.

    Only with `download` is a hub model fetched that is not on this machine. `setting` is the option that named it, for
    the error.
    """
    if os.path.isdir(source):
        return source
    if is_path(source):
        raise nothing_at(source, setting)
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, allow_patterns=list(_HUB_FILES), local_files_only=not download)
    except (OSError, ValueError) as error:  # no such name, none of this machine, no network
        raise nothing_at(source, setting, download) from error


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

    @property
    def is_floating(self) -> bool:
        """Whether its values are floating-point numbers, which an integer, a quantised or a complex one's are not."""
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def nbytes(self) -> int:
        """How many bytes its values take."""
        number = getattr(torch, self.dtype, None)
        return self.parameters * (number.itemsize if isinstance(number, torch.dtype) else 1)

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
    """The files of a full checkpoint's weights, by its index, all of whose files must be there; [] when it has none.

    CheckpointError: an index that is damaged, or names what is not a file beside it.
    """
    for stem, suffix in WEIGHT_FORMATS:
        index = f"{stem}.{suffix}.index.json"
        if (found := read_json(source, index)) is not None:
            return [_shard(source, index, name) for name in _shards(found, os.path.join(source, index))]
        if (whole := locate(source, f"{stem}.{suffix}")) is not None:
            return [whole]
    return []


def _shards(index: dict[str, Any], where: str) -> list[str]:
    """The names of files in an index."""
    places = stored.field(index, "weight_map", dict, where)
    for tensor, name in places.items():
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            wrong = f"weight_map has {tensor} in {shown(name)}: expected the name of a file beside it"
            raise CheckpointError(f"{where}: {wrong}{MEND}")
    if not places:
        raise CheckpointError(f"{where}: weight_map names no tensor{MEND}")
    return sorted(set(places.values()))


def _shard(source: str, index: str, name: str) -> Path:
    if (path := locate(source, name)) is None:
        raise CheckpointError(f"{source}: {name} is missing, which {index} names: copy or download it too")
    return path


def open_weights(source: str) -> Tensors:
    """All tensors of a checkpoint folder or hub model, which must have some, by their names in the files."""
    files = weight_files(source)
    if files:
        return {tensor.name: tensor for tensor in read_files(files)}
    if not os.path.isdir(source) and not _on_machine(source):
        raise nothing_at(source)
    hint = ": copy or download them too"
    if any(locate(source, name) for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")):
        hint = "; it is a LoRA folder: merge it first (LLaVA's scripts/merge_lora_weights.py)"
    names = " or ".join(f"{stem}.{suffix}" for stem, suffix in WEIGHT_FORMATS)
    raise CheckpointError(f"{source}: no weights here ({names}){hint}")


def check_headers(source: str) -> None:
    """Refuse safetensors files of a folder that are not whole, by their headers; others are left to who loads them."""
    for path in weight_files(source) if os.path.isdir(source) else ():
        if path.suffix == ".safetensors":
            read_file(path)


def read_files(paths: Sequence[Path], whole: bool = False) -> list[StoredTensor]:
    """The tensors of a checkpoint's files, each of which may be in one file only; as `read_file`."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in read_file(path, whole):
            if (other := found.get(tensor.name)) is not None:
                raise CheckpointError(
                    f"{path}: tensor {tensor.name} is there twice, in {other.file.name} too, and they may differ: save "
                    "the checkpoint again, or take the wrong file away"
                )
            found[tensor.name] = tensor
    return list(found.values())


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
        kind = "safetensors" if path.suffix == ".safetensors" else "torch"
        raise CheckpointError(f"{path}: cannot be read as a whole {kind} file ({brief(error)}){MEND}") from error


def _torch_file(path: Path, whole: bool) -> dict[str, Tensor]:
    # The host's own file format; weights_only keeps a foreign pickle from running code.
    with path.open("rb") as stream:
        begins = stream.read(2)
    zipped = begins == b"PK"
    if not zipped and begins[:1] != b"\x80":
        raise ValueError("it is neither a zip archive nor a pickle")
    if not zipped and not whole:
        what = "is no archive as torch 1.6 and newer write, and cannot be read tensor by tensor"
        raise CheckpointError(f"{path}: {what}{_AGAIN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's version
            values = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        what = "holds something besides tensors, which is not read, as it could run any code"
        raise CheckpointError(f"{path}: {what}{_AGAIN}") from error
    held = values.items() if isinstance(values, dict) else ()
    tensors = {name: value for name, value in held if isinstance(value, Tensor)}
    if values != {} and not (tensors and stored.strings(list(tensors))):
        raise CheckpointError(f"{path}: holds no named tensors{_AGAIN}")
    return tensors


def write_weights(folder: Path, tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as model.safetensors, or as shards with an index when they are more than one shard.

    A shard has at most `shard_bytes`, which is also what this needs of memory, or one larger tensor.
    """
    from safetensors.torch import save_file

    show = sum(load.nbytes for load in tensors.values() if isinstance(load, StoredTensor)) > _SHOWN_BYTES
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if shard:
            save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
            shards.append(list(shard))
            shard.clear()

    for name, load in track(list(tensors.items()), f"writing {len(tensors)} tensors", show):
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
    """Refuse a folder that must not be written: over or within an input, around one, full, a file, or not ours.

    CheckpointError; StorageError where this user may not write.
    """
    try:
        place, there = out.resolve(), os.path.lexists(out)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            out.stat()
        nearest = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, too long a name, one with a null byte
        raise CheckpointError(f"{shown(str(out))} is no place for a folder ({brief(error)}): name another") from error
    for source in sources:
        if not os.path.isdir(source):
            continue
        given = Path(source).resolve()
        if place == given:
            raise CheckpointError(f"{out} is the input itself: name another folder to write to")
        if place.is_relative_to(given):
            raise CheckpointError(f"{out} is inside the input {source}: name a folder beside it")
        if given.is_relative_to(place):
            raise CheckpointError(f"{out} has the input {source} inside: name a folder beside it")
    if there and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not an empty folder: name a new one")
    if not nearest.is_dir():
        raise CheckpointError(f"{out}: {nearest} is a file, so no folder can be in it: name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"{out}: you may not write in {nearest}: name another folder")
