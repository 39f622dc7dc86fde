"""What frozen tokens and a trained decoder depend on: stores and states are found again by it, and by nothing else.

The weights enter whole and bit by bit (about a second for a vision tower of 300 M parameters): sampled values could
miss a checkpoint that a few training steps lie behind, and a stale token would look like a measurement.
"""

import dataclasses
import hashlib
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_patch.core.errors import HostError, InputError
from llava_patch.core.files import digest
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.shard import FORMAT, Record
from llava_patch.patching.handle import get_handle
from llava_patch.patching.keys import tensors_of, weights_digest
from llava_patch.probe.decoder import ProbeDecoder
from llava_patch.probe.sample import Sample, size_and_orientation
from llava_patch.probe.sequence import build_sequence
from llava_patch.probe.transform import Transform
from llava_patch.probe.view import encode_views

LIBRARIES = ("llava_patch", "torch", "torchvision", "transformers", "llava-torch", "llava", "timm", "pillow", "numpy")
_CONFIG = ("mm_", "vision", "image_", "projector_", "multimodal_")  # what of a host's config is about images


@dataclass(frozen=True)
class ImagesOfData:
    """The samples (their numbers) of each image, in the order in which images come up, and a key of JSON values.

    `records` are None where names and texts are only known once a sample is drawn.
    """

    images: list[list[int]]
    records: list[Record] | None
    key: Any


def images_of(samples: Sequence[Sample], settings: RProbe, transform: Transform | None = None) -> ImagesOfData:
    """Find the images of a data set and name its content; with windows, each of a page is an image of its own.

    Samples that draw themselves (they have `identity()`, JSON values) have one image each and are not drawn here. Of
    others every image file is read once: what is in it counts, not its name or time, so that a file that was replaced
    is noticed and a folder that was moved is known again.
    """
    if (identity := getattr(samples, "identity", None)) is not None:
        return ImagesOfData([[i] for i in range(len(samples))], None, identity())
    content_of = _Contents()
    images: dict[Any, list[int]] = {}
    records, told = [], []
    for index in range(len(samples)):
        sample = samples[index]
        content = content_of(sample)
        window = None if transform is None else _window(transform, sample)
        # Lines of one page (and window) share its tokens, unless each line is blacked out in a copy of its own.
        images.setdefault(index if settings.masked else (content, window), []).append(index)
        records.append(Record(index, sample.id, sample.document or sample.id, sample.text))
        turned = _turned(sample)  # read upright since: what an earlier version kept of it is another picture
        more = [f"EXIF {turned}"] if turned > 1 else []
        more += [f"window {window}"] if window is not None else []
        told.append([content, sample.boxes, sample.all_boxes, *more])
    key = {"own": digest(told), "samples": len(told), "images": len(images)}
    return ImagesOfData(list(images.values()), records, key)


def _window(transform: Transform, sample: Sample) -> tuple[int, int, int, int] | None:
    """The part of its page that a sample is shown with; None: the whole page, or one that is refused in its turn."""
    try:
        window = transform.window_of(sample)
    except InputError:
        return None
    return None if window is None else window.box


def _turned(sample: Sample) -> int:
    """The EXIF orientation of a sample's image, 1 to 8; 1 for one that cannot be opened, which is found out later."""
    try:
        return size_and_orientation(sample.image, sample.id)[1]
    except InputError:
        return 1


def trained_on(train: Sequence[Sample], heldout: Sequence[Sample]) -> tuple[list[str], int]:
    """(held-out documents that are trained on, number of all): told by what is in an image and not by its name.

    Every image file is read once, which costs little beside its way through the tower. An InputError where all held-out
    documents are trained on.
    """
    drawn = [data.identity() for data in (train, heldout) if hasattr(data, "identity")]
    if drawn:  # samples that draw themselves are told apart by what they are, and not drawn here
        if len(drawn) == 2 and drawn[0] == drawn[1]:
            raise InputError("R-Probe: the held-out samples are the training samples: give others, or none")
        return [], len(heldout)
    content_of = _Contents()
    known = {content_of(train[i]) for i in range(len(train))}
    documents: dict[str, bool] = {}
    for i in range(len(heldout)):
        sample = heldout[i]
        name = sample.document or sample.id
        documents[name] = content_of(sample) in known or documents.get(name, False)
    shared = [name for name, found in documents.items() if found]
    if shared and len(shared) == len(documents):
        raise InputError(
            f"R-Probe: all {len(documents)} held-out documents are trained on, such as {shared[0]}: hold out "
            "documents whose images are not among the training samples"
        )
    return shared, len(documents)


class _Contents:
    """What is in a sample's image: a digest of its file's bytes, or of the pixels in memory; each is read once."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, str]] = {}

    def __call__(self, sample: Sample) -> str:
        image: Any = sample.image
        is_path = isinstance(image, (str, os.PathLike))
        in_memory = not is_path and not hasattr(image, "read")
        place = id(image) if in_memory else os.path.abspath(image) if is_path else f"inside {image}"
        known = self._known.get(place)
        if known is None or (in_memory and known[0]() is not image):  # a number is given again once its object is gone
            try:
                if in_memory:
                    picture = sample.open_image()
                    content = f"{picture.mode} {picture.size}".encode() + picture.tobytes()
                else:
                    content = Path(image).read_bytes() if is_path else image.read()
                found = hashlib.blake2b(content, digest_size=16).hexdigest()
            except (OSError, SyntaxError, ValueError, InputError):  # refused, or skipped, when its turn comes
                found = f"unreadable {sample.id if in_memory else place}"
            self._known[place] = known = (weakref.ref(image) if in_memory else None), found
        return known[1]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def store_key(anatomy: Anatomy, transform: Transform, data: Any, settings: RProbe) -> dict[str, Any]:
    """Everything that frozen image tokens and target pixels depend on; text settings are not among it.

    "model" is the part of a model that makes visual tokens, and the arithmetic it is run in.
    """
    if anatomy.vision_model is None:
        raise HostError("the vision tower is not loaded yet: call its load_model() first")
    model, handle = anatomy.model, get_handle(anatomy.model)
    device = next(anatomy.vision_model.parameters()).device
    text = (anatomy.layers, anatomy.norm, anatomy.lm_head, anatomy.embed_tokens)  # these make no visual token
    tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return {
        "format": FORMAT,
        "versions": {name: _version(name) for name in LIBRARIES},  # that decide about a token's or a pixel's bits
        "model": {
            "host": anatomy.host,
            "weights": weights_digest(tensors_of(anatomy, without=text)),
            "config": {name: value for name, value in model.config.to_dict().items() if name.startswith(_CONFIG)},
            "vision_config": described(anatomy.vision_config),
            "attention": getattr(anatomy.vision_config, "_attn_implementation", None),
            "parts": [type(part).__name__ for part in (model, anatomy.tower, anatomy.vision_model, anatomy.projector)],
            "layers": len(anatomy.layers),  # DeepStack's layers inside the probe's quarter
            "fusion": None if handle is None else handle.settings()["fusion"],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": [torch.get_float32_matmul_precision(), *tf32],
        },
        "answer": answer_key(anatomy, transform),
        "transform": described(transform),
        "data": data,
        # image_mode is the transform's
        "settings": {"masked": settings.masked, **({"page": True} if settings.page else {})},
    }


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
    "keep_decoder",
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
    own = ((n, p) for n, p in decoder.named_parameters() if not (n.startswith("head.") or "lora_" in n))
    return weights_digest(((n.replace(".base_layer", ""), p) for n, p in own), _SAMPLED, into=found)[:32]


@torch.no_grad()
def fresh_answer(decoder: ProbeDecoder) -> list[float]:
    """What a fresh decoder's layers and norm make of one fixed short sequence, as numbers that every state enters.

    Weights do not tell of a norm's epsilon, nor of rotary frequencies: those show here. Numbers and not their hash,
    because float32 sums depend on threads and device.
    """
    hidden, layers = int(decoder.config.hidden_size), len(decoder.injection_layers)
    device = next(decoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(3)).float()[None]
    target, three = torch.arange(9)[None] >= 6, torch.tensor([3])
    sequence = build_sequence(target, torch.ones_like(target), cells, three, three)
    # Of the sizes that projected and embedded tokens have; an epsilon counts where tokens are small.
    image = 0.5 * torch.randn(1, 9, hidden, generator=generator)
    words = 0.02 * torch.randn(1, 3, hidden, generator=generator)
    added = 0.5 * torch.randn(1, layers, 9, hidden, generator=generator).to(device) if layers else None
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
    config = {k: v for k, v in described(decoder.config).items() if k not in _NOT_MODEL}
    aside = _NOT_TRAINING if settings.image_mode == "window" else {*_NOT_TRAINING, "text_height", "page"}
    return {
        "decoder": fingerprint(decoder),
        "config": digest(config),
        "answer": fresh_answer(decoder),
        **{f"RProbe.{k}": v for k, v in vars(settings).items() if k not in aside},
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
        there, here = saved.get(name), key.get(name)
        same = bool(there == here)
        if name == "answer" and isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
            same = math.dist(there, here) <= _CLOSE * math.hypot(*here)
        if not same:
            return _MEANING.get(name) or f"{name} was {there!r} there and is {here!r} here"
    return ""
