"""What a model is: as a short digest, or as a few values that a base loaded in another precision still has.

One rule: every tensor counts, norms, biases and buffers too, by its name, shape and evenly spaced values; what is there
for training alone (the auxiliary loss's head) is no part of a model. `base_fingerprint` is the form that adapters keep.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import CheckpointError, HostError
from llava_patch.core.files import digest
from llava_patch.core.weights import evenly_spaced, folder_of, read_file, weight_files
from llava_patch.hosts import compat, storage, zero
from llava_patch.hosts.anatomy import HOSTS, Anatomy, get_handle

_MODEL_SETTINGS = (
    "mm_vision_select_layer", "mm_vision_select_feature", "vision_feature_layer", "vision_feature_select_strategy",
)  # fmt: skip
_DECODER_SETTINGS = ("rope_theta", "rope_scaling", "sliding_window")
_VALUES = 1024
"""Of each tensor that `model_digest` reads: a 13 B model takes a second; training changes nearly all of a tensor."""
_FINGERPRINT_VALUES = 4


# --- digests ----------------------------------------------------------------------------------------------------------


def weights_digest(
    tensors: Iterable[tuple[str, Tensor]], values: int | None = None, rounded: bool = False, into: Any = None
) -> str:
    """Hexadecimal digest of any tensors by name, shape and values; under DeepSpeed ZeRO-3 every rank must call this.

    About `values` evenly spaced values of each tensor count, as float32 and, if `rounded`, rounded to bfloat16, so that
    one model loaded in two precisions is one model; None: all of them bit by bit, and the dtype. `into` is a hash
    object that has begun with something else. HostError: a tensor lies outside memory.
    """
    found = hashlib.blake2b(digest_size=16) if into is None else into
    for name, tensor in tensors:
        if tensor.is_meta:
            raise HostError(f"{name} lies outside memory (device_map): load the model without offloading")
        with zero.gathered([tensor]):
            flat, shape = zero.whole(tensor.detach()).reshape(-1), tuple(tensor.shape)
            if values is None:
                found.update(f"{name} {tensor.dtype} {shape}".encode())
                part = flat.to("cpu").contiguous().view(torch.uint8) if len(flat) else flat.to("cpu", torch.uint8)
            else:
                found.update(f"{name} {shape} ".encode())
                part = flat[:: max(1, len(flat) // values)]
                part = (part.to(torch.bfloat16) if rounded else part).to("cpu", torch.float32)
            found.update(part.numpy().tobytes())
    return found.hexdigest()


def tensors_of(anatomy: Anatomy, without: Iterable[nn.Module] = ()) -> list[tuple[str, Tensor]]:
    """A model's parameters and buffers by name, each once, its vision tower's too, without those of some modules.

    llava may hold its tower in a list, where the model does not list its weights.
    """
    handle = get_handle(anatomy.model)
    seen = {id(p) for p in (() if handle is None else handle.training_parameters())}
    seen |= {id(tensor) for module in without for tensor in _named(module).values()}
    found = []
    named = {**_named(anatomy.model), **{f"tower.{n}": t for n, t in _named(anatomy.tower).items()}}
    for name in sorted(named):
        if id(named[name]) not in seen:
            seen.add(id(named[name]))
            found.append((name, named[name]))
    return found


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def model_digest(anatomy: Anatomy) -> str:
    """Hexadecimal digest of a model as a measurement sees it, its vision tower and a patch on it included.

    Precision does not count, nor does what is there for training alone. HostError: a tensor lies outside memory.
    """
    model, handle = anatomy.model, get_handle(anatomy.model)
    settings = [getattr(model.config, name, None) for name in _MODEL_SETTINGS]
    settings += [getattr(anatomy.text_config, name, None) for name in _DECODER_SETTINGS]
    weights = weights_digest(tensors_of(anatomy), _VALUES, rounded=True)
    return digest_of([anatomy.host, weights, settings, None if handle is None else handle.settings()])


def patch_name(model: nn.Module) -> str:
    """A short name of the patch on a model, "" when there is none; equal patches and weights give equal names."""
    handle = get_handle(model)
    if handle is None:
        return ""
    added = ((str(number), parameter) for number, parameter in enumerate(handle.added_parameters()))
    return digest([handle.record(), weights_digest(added, _VALUES)])[:16]


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


# --- the values that an adapter keeps of its base ---------------------------------------------------------------------


def base_fingerprint(model: nn.Module, changed: Collection[str]) -> dict[str, list[float]]:
    """Sampled values of the matrices that a patch does not change: {tensor name: values}, as adapters keep them.

    Values rather than a digest, because a base may be loaded in another precision than it was saved in; quantised ones
    are left out. `changed` names the tensors that are not the base's.
    """
    handle = get_handle(model)
    training = {id(p) for p in (() if handle is None else handle.training_parameters())}
    return {
        zero.plain_name(name): sample(storage.value(model, name), _FINGERPRINT_VALUES).tolist()
        for name, parameter in model.named_parameters()
        if zero.plain_name(name) not in changed and id(parameter) not in training and len(zero.shape(parameter)) == 2
        if parameter.is_floating_point()
    }


def sample(tensor: Tensor, count: int) -> Tensor:
    """Evenly spaced values of a tensor of any shape and dtype: float32 [count] on the CPU."""
    with zero.gathered([tensor]):
        flat = zero.whole(tensor.detach()).flatten()
        return flat[evenly_spaced(flat.numel(), count, flat.device)].float().cpu()


def check_fingerprint(model: nn.Module, saved: Mapping[str, list[float]], source: Path) -> None:
    """Compare a model with what `base_fingerprint` saved; CheckpointError names the first tensor that differs.

    Weights that are quantised here cannot tell: embeddings and the head, which never are, do.
    """
    parameters = dict(model.named_parameters())
    for name, values in compat.as_here(saved, parameters).items():
        if name not in parameters:
            raise CheckpointError(f"{source}: made on a base with a tensor {name}, which this model does not have")
        if parameters[name].is_floating_point():
            check_values(name, storage.value(model, name), values, source)


def check_as_loaded(anatomy: Anatomy, fingerprint: Mapping[str, list[float]], base: str) -> None:
    """Compare what `base_fingerprint` gives with the files of the base, where they are on this machine.

    CheckpointError: a matrix is not the base's any more, so that an adapter, which has none of it, would be lost.
    """
    try:
        paths = weight_files(folder_of(base))
    except CheckpointError:
        return
    files = HOSTS[anatomy.host][1]
    below = {files.neutral(t.name) or t.name: t for path in paths for t in read_file(path, whole=True)}
    for own, parameter in anatomy.model.named_parameters():
        name = zero.plain_name(own)
        there = below.get(files.neutral(name) or name) if name in fingerprint else None
        if there is None or there.shape != tuple(zero.shape(parameter)) or not parameter.is_floating_point():
            continue  # quantised
        here = torch.tensor(fingerprint[name])
        if not _is_rounded(here, torch.tensor(there.sample(len(here)))):
            raise CheckpointError(
                f"{name} is not as in the base {base} any more: LoRA was merged into it (merge_and_unload), or it was "
                'trained and then frozen. An adapter holds what was added and what trains: save with form="full"'
            )


def _is_rounded(here: Tensor, there: Tensor) -> bool:
    """Whether float32 values are others of which some precision may have kept less."""
    half, brain = (there.to(dtype).float() for dtype in (torch.float16, torch.bfloat16))
    forms = torch.stack([there, half, brain, half.bfloat16().float(), brain.half().float()])
    return bool((forms == here).any(0).all())


def check_values(name: str, tensor: Tensor, values: list[float], source: Path | str) -> None:
    """Compare a tensor, whatever its shape and dtype, with what an adapter keeps; CheckpointError: they differ."""
    here, there = sample(tensor, len(values)), torch.tensor(values)
    # Two roundings to bfloat16 (8 bits of mantissa) are the same base; training moves values further.
    if not torch.allclose(here, there, rtol=2**-7, atol=1e-6):
        raise CheckpointError(
            f"{source}: made on another base model: {name} differs "
            f"(for example {there[0]:.6g} there, {here[0]:.6g} here)"
        )
