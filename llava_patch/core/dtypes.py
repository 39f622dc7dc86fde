"""The dtype of new tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def float32_default() -> Iterator[None]:
    """New tensors are float32 inside the block: llava leaves float16 behind when it has loaded a model."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
