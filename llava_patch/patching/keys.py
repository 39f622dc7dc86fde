"""What a model and values are, as short digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llava_patch.hosts.anatomy import Anatomy
from llava_patch.patching.checkpoint import base_fingerprint
from llava_patch.patching.handle import get_handle

_MODEL_SETTINGS = (
    "mm_vision_select_layer", "mm_vision_select_feature", "vision_feature_layer", "vision_feature_select_strategy",
)  # fmt: skip
_DECODER_SETTINGS = ("rope_theta", "rope_scaling", "sliding_window")


def model_digest(anatomy: Anatomy) -> str:
    """Hexadecimal digest of a model as the measurement sees it, its vision tower and a patch on it included."""
    model, handle = anatomy.model, get_handle(anatomy.model)
    values = {name: torch.tensor(value) for name, value in base_fingerprint(model, set()).items()}
    settings = [getattr(model.config, name, None) for name in _MODEL_SETTINGS]
    settings += [getattr(anatomy.text_config, name, None) for name in _DECODER_SETTINGS]
    return digest_of([anatomy.host, values, settings, None if handle is None else handle.settings()])


def digest_of(value: Any) -> str:
    """SHA-256 of nested values, tensors by their bfloat16 or int64 bytes; floating-point precision does not count."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        kind = "float" if value.is_floating_point() else "integer"
        digest.update(f"{kind}{tuple(value.shape)}".encode())
        number = value.to(torch.bfloat16).view(torch.int16) if kind == "float" else value.to(torch.int64)
        digest.update(number.contiguous().numpy().tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"mapping{len(value)}".encode())
        for name in sorted(value):
            digest.update(f"{name}\0".encode())
            _feed(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(f"sequence{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"{value!r}\0".encode())
