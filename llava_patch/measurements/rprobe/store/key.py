"""What frozen tokens depend on, as JSON values: a store is found again by their digest, and by nothing else.

The weights enter whole and bit by bit (about a second for a vision tower of 300 M parameters): sampled values could
miss a checkpoint that a few training steps lie behind, and a stale token would look like a measurement.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_patch.core.errors import HostError, InputError
from llava_patch.hosts import zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.shard import FORMAT, Record
from llava_patch.patching.handle import get_handle
from llava_patch.probe.sample import Sample
from llava_patch.probe.transform import Transform
from llava_patch.probe.view import look

LIBRARIES = ("llava_patch", "torch", "torchvision", "transformers", "llava-torch", "llava", "timm", "pillow", "numpy")
SETTINGS = ("masked",)  # those of RProbe that change what is stored; image_mode is the transform's
_CONFIG = ("mm_", "vision", "image_", "projector_", "multimodal_")  # what of a host's config is about images


@dataclass(frozen=True)
class Plan:
    """Which images a data set has, and what names it.

    Attributes:
        images: the samples (their numbers) of each image, in the order in which images come up.
        records: names and texts of the samples; None where they are only known once a sample is drawn.
        key: JSON values.
    """

    images: list[list[int]]
    records: list[Record] | None
    key: Any


def digest(value: Any) -> str:
    """Hexadecimal digest of JSON values; equal values give equal digests in every process."""
    text = json.dumps(value, sort_keys=True, default=_named)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _named(value: Any) -> str:
    """What JSON has no form for (dtypes, enumerations, paths); an object without a text of its own is its class."""
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


def versions() -> dict[str, str | None]:
    """Versions of the libraries that decide about a token's or a pixel's bits; None: not installed."""

    def one(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: one(name) for name in LIBRARIES}


def store_key(anatomy: Anatomy, transform: Transform, plan: Plan, settings: RProbe) -> dict[str, Any]:
    """Everything that frozen image tokens and target pixels depend on; text settings are not among it."""
    return {
        "format": FORMAT,
        "versions": versions(),
        "model": model_key(anatomy),
        "answer": answer_key(anatomy, transform),
        "transform": described(transform),
        "data": plan.key,
        "settings": {name: getattr(settings, name) for name in SETTINGS},
    }


def model_key(anatomy: Anatomy) -> dict[str, Any]:
    """The part of a model that makes visual tokens, and the arithmetic it is run in.

    Raises:
        HostError: the vision tower is not loaded, or a weight lies outside memory.
    """
    if anatomy.vision_model is None:
        raise HostError("the vision tower is not loaded yet: call its load_model() first")
    model, handle = anatomy.model, get_handle(anatomy.model)
    config = {name: value for name, value in model.config.to_dict().items() if name.startswith(_CONFIG)}
    device = next(anatomy.vision_model.parameters()).device
    return {
        "host": anatomy.host,
        "weights": _weights(anatomy),
        "config": config,
        "vision_config": described(anatomy.vision_config),
        "attention": getattr(anatomy.vision_config, "_attn_implementation", None),
        "parts": [type(part).__name__ for part in (model, anatomy.tower, anatomy.vision_model, anatomy.projector)],
        "layers": len(anatomy.layers),  # DeepStack's layers inside the probe's quarter
        "fusion": None if handle is None else handle.settings()["fusion"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": [
            torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        ],
    }  # fmt: skip


@torch.no_grad()
def answer_key(anatomy: Anatomy, transform: Transform) -> str:
    """Digest of the tokens that the model gives for one fixed image.

    Weights and settings do not tell of a hook, or of a forward that somebody has overridden: those show here.

    Args:
        anatomy: the model under test, in evaluation mode.
        transform: from `make_transform`.
    """
    # Larger than the tower's input and not square, so that resizing and cutting count.
    height, width = 2 * transform.height + 3, transform.width + 5
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (view,) = look(anatomy, transform, [Image.fromarray(noise)])
    found = hashlib.blake2b(digest_size=16)
    for tensor in (view.tokens, view.injections):
        if tensor is not None:
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _weights(anatomy: Anatomy) -> str:
    """Digest of all weights and buffers but those of decoder layers, token embeddings and head."""
    text = (anatomy.layers, anatomy.norm, anatomy.lm_head, anatomy.embed_tokens)
    ignored = {id(t) for module in text for t in _tensors(module).values()}
    # llava may hold its tower in a list, where the model does not list its weights.
    tensors = {**_tensors(anatomy.model), **{f"tower.{n}": t for n, t in _tensors(anatomy.tower).items()}}
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        if id(tensor) in ignored:
            continue
        ignored.add(id(tensor))
        if tensor.is_meta:
            raise HostError(f"{name} lies outside memory (device_map): load the model without offloading")
        with zero.gathered([tensor]):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.numel():
                raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
                found.update(raw.numpy().data)
    return found.hexdigest()


def _tensors(module: Any) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def described(thing: Any) -> Any:
    """JSON values of a configuration object: dataclasses by their fields, transformers' objects by `to_dict`."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: described(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"class": type(thing).__name__, **fields}
    if hasattr(thing, "to_dict"):
        values = {n: v for n, v in thing.to_dict().items() if n not in ("_name_or_path", "transformers_version")}
        return {"class": type(thing).__name__, **values}
    return thing


def make_plan(samples: Sequence[Sample], settings: RProbe) -> Plan:
    """Find the images of a data set and name its content.

    Samples that draw themselves (they have `identity()`, JSON values) have one image each and are not drawn here. Of
    others every image file is read once: what is in it counts, not its name or time, so that a file that was replaced
    is noticed and a folder that was moved is known again.
    """
    identity = getattr(samples, "identity", None)
    if identity is not None:
        return Plan([[i] for i in range(len(samples))], None, identity())
    content_of = Contents()
    number_of: dict[Any, int] = {}
    images: list[list[int]] = []
    records, described = [], []
    for index in range(len(samples)):
        sample = samples[index]
        content = content_of(sample)
        # Lines of one page share its tokens, unless each line is blacked out in a copy of its own.
        number = number_of.setdefault(index if settings.masked else content, len(images))
        if number == len(images):
            images.append([])
        images[number].append(index)
        records.append(Record(index, sample.id, sample.document or sample.id, sample.text))
        described.append([content, sample.boxes, sample.all_boxes])
    return Plan(images, records, {"own": digest(described), "samples": len(described), "images": len(images)})


class Contents:
    """Content of a sample's image; each file and each picture in memory is read once."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._pictures: dict[int, tuple[weakref.ref[Any], str]] = {}

    def __call__(self, sample: Sample) -> str:
        """Digest of the file's bytes, or of the pixels in memory; of its name where it cannot be read."""
        image: Any = sample.image
        if isinstance(image, (str, os.PathLike)) or hasattr(image, "read"):
            place = os.path.abspath(image) if isinstance(image, (str, os.PathLike)) else f"inside {image}"
            if place not in self._files:
                self._files[place] = _content(sample) or f"unreadable {place}"
            return self._files[place]
        known = self._pictures.get(id(image))
        if known is None or known[0]() is not image:  # Python gives a number again once its object is gone
            content = _content(sample) or f"unreadable {sample.id}"
            self._pictures[id(image)] = known = weakref.ref(image), content
        return known[1]


def _content(sample: Sample) -> str | None:
    """Digest of a sample's image file, or of its pixels when it is in memory; None: it cannot be read."""
    image: Any = sample.image
    found = hashlib.blake2b(digest_size=16)
    try:
        if isinstance(image, (str, os.PathLike)):
            with open(image, "rb") as stream:
                while block := stream.read(1 << 20):
                    found.update(block)
        elif hasattr(image, "read"):
            found.update(image.read())
        else:
            picture = sample.open_image()
            found.update(f"{picture.mode} {picture.size}".encode())
            found.update(picture.tobytes())
    except (OSError, SyntaxError, ValueError, InputError):
        return None  # refused, or skipped, when its turn comes
    return found.hexdigest()
