"""Precision: in which one a model's weights fit into this machine's memory, and which one new tensors have."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.core.weights import WEIGHT_FORMATS, locate, read_file, read_json

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
ROOM = 0.9
"""Share of the memory that weights may take; the rest is for Python, torch, activations and the system."""


def machine_memory() -> int | None:
    """Bytes of memory that this process may use at most, a container's limit included; None where it is not known."""
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError, AttributeError):
        return None
    for name in _LIMITS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return min(found)


def parameter_count(source: str) -> int | None:
    """Number of weights of a checkpoint, from its index or headers; None when they do not say."""
    for stem, suffix in WEIGHT_FORMATS:
        if (index := read_json(source, f"{stem}.{suffix}.index.json")) is not None:
            total = index.get("metadata", {}).get("total_size")
            return None if total is None else int(total) // _stored_bytes(source)
        path = locate(source, f"{stem}.{suffix}")
        if path is not None and suffix == "safetensors":
            try:
                return sum(tensor.parameters for tensor in read_file(path))
            except CheckpointError:
                return None  # the host's own loader says what is wrong with it
        if path is not None:
            return path.stat().st_size // _stored_bytes(source)
    return None


def _stored_bytes(source: str) -> int:
    config = read_json(source, "config.json") or {}
    for values in (config, config.get("text_config") or {}):
        dtype = getattr(torch, str(values.get("dtype") or values.get("torch_dtype")), None)
        if isinstance(dtype, torch.dtype):
            return dtype.itemsize
    return 4


def cpu_dtype(name: str, source: str) -> torch.dtype | None:
    """The precision in which a checkpoint's decoder runs on the CPU; None: float32, as nothing speaks against it.

    Weights that do not fit in float32 run in bfloat16, which halves them (float16 is slow on CPUs); a line on stderr
    says so. What the user asks for by `name` is kept. SettingError: they do not fit in that precision, or in any.
    """
    count, memory = parameter_count(source), machine_memory()
    if count is None or memory is None:
        return None
    asked = getattr(torch, name) if name else torch.float32
    if asked.itemsize * count <= ROOM * memory:
        return None
    fits = torch.bfloat16.itemsize * count <= ROOM * memory
    word = name or "float32"
    said = f"{source}: {count / 1e9:.1f} billion weights are {asked.itemsize * count / 1e9:.1f} GB in {word}"
    said += f", and this machine has {memory / 1e9:.1f} GB of memory"
    if fits and not name:
        print(f"llava_patch: {said}: the model runs in bfloat16 (--dtype chooses)", file=sys.stderr)
        return torch.bfloat16
    advice = "give --dtype bfloat16" if fits else "give --device cuda, or use a machine with more memory"
    raise SettingError(f"{said}: {advice}")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


float32_default = functools.partial(default_dtype, torch.float32)
"""For what makes tensors after llava has loaded a model: it leaves float16 behind."""
