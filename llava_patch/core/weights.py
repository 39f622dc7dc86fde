"""Weight files: tensors read one at a time, written in shards; a folder that appears whole or not at all."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from llava_patch.core.errors import CheckpointError

Load = Callable[[], Tensor]
Tensors = dict[str, Load]
"""Tensor name: a function that reads it. Files are memory-mapped, so a tensor costs memory only while it is used."""
SHARD_BYTES = 5 * 10**9
_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))


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
    """A JSON file of a folder or hub model; None when it has none.

    Raises:
        CheckpointError: not valid JSON.
    """
    path = locate(source, name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def open_weights(source: str) -> Tensors:
    """All tensors of a checkpoint folder or hub model, by their names in the files.

    Raises:
        CheckpointError: no weights there, or a shard is missing.
    """
    for stem, suffix in _FORMATS:
        index = read_json(source, f"{stem}.{suffix}.index.json")
        whole = locate(source, f"{stem}.{suffix}")
        if index is None and whole is None:
            continue
        tensors: Tensors = {}
        for name in sorted(set(index["weight_map"].values())) if index is not None else [f"{stem}.{suffix}"]:
            path = locate(source, name)
            if path is None:
                raise CheckpointError(f"{source}: {name} is missing, which {stem}.{suffix}.index.json names")
            tensors.update(open_file(path))
        return tensors
    hint = ""
    if locate(source, "adapter_config.json") is not None:
        hint = "; it is a LoRA folder: merge it first (LLaVA's scripts/merge_lora_weights.py)"
    names = " or ".join(f"{stem}.{suffix}" for stem, suffix in _FORMATS)
    raise CheckpointError(f"{source}: no weights here ({names}){hint}")


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors or torch file."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        stream = safe_open(path, framework="pt")
        return {name: functools.partial(stream.get_tensor, name) for name in stream.keys()}  # noqa: SIM118
    try:
        # The host's own file format; weights_only keeps a foreign pickle from running code.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: cannot be read tensor by tensor ({error})") from error
    return {name: functools.partial(torch.Tensor.detach, tensor) for name, tensor in loaded.items()}


def write_weights(folder: Path, tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as model.safetensors, or as shards with an index when they are more than one shard.

    Args:
        folder: an existing folder.
        tensors: by their names in the files.
        shard_bytes: most bytes of one shard, which is also what this needs of memory; a larger tensor is one shard.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    total = 0
    shard: dict[str, Tensor] = {}

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
    """Refuse a folder that must not be written over.

    Raises:
        CheckpointError: it is the input, or it holds something.
    """
    for source in sources:
        if os.path.isdir(source) and out.resolve() == Path(source).resolve():
            raise CheckpointError(f"{out} is the input itself: name another folder to write to")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not an empty folder: name a new one")
