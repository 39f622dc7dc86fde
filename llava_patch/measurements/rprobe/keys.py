"""What frozen tokens depend on, as JSON values: a store is found again by their digest, and by nothing else.

The weights enter whole and bit by bit (about a second for a vision tower of 300 M parameters): sampled values could
miss a checkpoint that a few training steps lie behind, and a stale token would look like a measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_patch.core.errors import HostError
from llava_patch.core.files import digest
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.shard import FORMAT
from llava_patch.patching.handle import get_handle
from llava_patch.patching.keys import tensors_of, weights_digest
from llava_patch.probe.decoder import ProbeDecoder
from llava_patch.probe.sequence import build_sequence
from llava_patch.probe.transform import Transform
from llava_patch.probe.view import encode_views

LIBRARIES = ("llava_patch", "torch", "torchvision", "transformers", "llava-torch", "llava", "timm", "pillow", "numpy")
SETTINGS = ("masked",)  # those of RProbe that change what is stored; image_mode is the transform's
_CONFIG = ("mm_", "vision", "image_", "projector_", "multimodal_")  # what of a host's config is about images


def versions() -> dict[str, str | None]:
    """Versions of the libraries that decide about a token's or a pixel's bits; None: not installed."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def store_key(anatomy: Anatomy, transform: Transform, data: Any, settings: RProbe) -> dict[str, Any]:
    """Everything that frozen image tokens and target pixels depend on; text settings are not among it."""
    return {
        "format": FORMAT,
        "versions": versions(),
        "model": model_key(anatomy),
        "answer": answer_key(anatomy, transform),
        "transform": described(transform),
        "data": data,
        "settings": {name: getattr(settings, name) for name in SETTINGS},
    }


def model_key(anatomy: Anatomy) -> dict[str, Any]:
    """The part of a model that makes visual tokens, and the arithmetic it is run in."""
    if anatomy.vision_model is None:
        raise HostError("the vision tower is not loaded yet: call its load_model() first")
    model, handle = anatomy.model, get_handle(anatomy.model)
    config = {name: value for name, value in model.config.to_dict().items() if name.startswith(_CONFIG)}
    device = next(anatomy.vision_model.parameters()).device
    text = (anatomy.layers, anatomy.norm, anatomy.lm_head, anatomy.embed_tokens)  # these make no visual token
    return {
        "host": anatomy.host,
        "weights": weights_digest(tensors_of(anatomy, without=text)),
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
    """Digest of the tokens that the model, in evaluation mode, gives for one fixed image.

    Weights and settings do not tell of a hook, or of a forward that somebody has overridden: those show here.
    """
    # Larger than the tower's input and not square, so that resizing and cutting count.
    height, width = 2 * transform.height + 3, transform.width + 5
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (view,) = encode_views(anatomy, transform, [Image.fromarray(noise)])
    found = hashlib.blake2b(digest_size=16)
    for tensor in (view.tokens, view.injections):
        if tensor is not None:
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def described(thing: Any) -> Any:
    """JSON values of a configuration object: dataclasses by their fields, transformers' objects by `to_dict`."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: described(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"class": type(thing).__name__, **fields}
    if hasattr(thing, "to_dict"):
        values = {n: v for n, v in thing.to_dict().items() if n not in ("_name_or_path", "transformers_version")}
        return {"class": type(thing).__name__, **values}
    return thing


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
    found = hashlib.sha256(f"DeepStack enters layers {decoder.injection_layers} ".encode())
    named = (
        (name.replace(".base_layer", ""), parameter)
        for name, parameter in decoder.named_parameters()
        if not (name.startswith("head.") or "lora_" in name)
    )
    return weights_digest(named, _SAMPLED, into=found)[:32]


@torch.no_grad()
def fresh_answer(decoder: ProbeDecoder) -> list[float]:
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
    """All that a decoder depends on before its first step, as flat JSON values and one list of numbers.

    The embeddings of the training texts are `table`, float32 [distinct tokens, hidden].
    """
    values = {f"RProbe.{k}": v for k, v in vars(settings).items() if k not in _NOT_TRAINING}
    config = {k: v for k, v in described(decoder.config).items() if k not in _NOT_MODEL}
    return {
        "decoder": fingerprint(decoder),
        "config": digest(config),
        "answer": fresh_answer(decoder),
        **values,
        "RProbe.lr": lr,
        "version of torch": torch.__version__,
        "version of transformers": version("transformers"),
        **({"version of peft": version("peft")} if settings.trained == "lora" else {}),
        # Last: other settings make other data too, and then they are what to name.
        "data": data_key,
        "embeddings": hashlib.sha256(table.contiguous().numpy().tobytes()).hexdigest()[:32],
    }


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
