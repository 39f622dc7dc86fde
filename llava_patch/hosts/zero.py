"""Weights that an engine keeps in parts: every rank holds a slice, and a collective call puts a tensor together.

DeepSpeed ZeRO-3 does so with every tensor for itself, while its module runs. FSDP does it with a decoder layer at a
time: torch's FullyShardedDataParallel (FSDP1), which wraps the layer, and `fully_shard` (FSDP2), which makes DTensors
of its parameters. So whatever uses a layer's weights does it while the layer runs.

Whatever gathers must run on every rank, in the same order: a rank that leaves it out leaves the others waiting.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_MARKS = ("ds_id", "_fsdp_flattened", "full_tensor")  # on a parameter, of ZeRO-3, FSDP1 and FSDP2


def bare(module: Any) -> Any:
    """What torch.compile, torch's CheckpointWrapper and FSDP1 wrap: they run it as it is."""
    while True:
        inside: Any = getattr(module, "_modules", ())
        for name in _WRAPPERS:  # asked several times a layer and call
            if name in inside:
                module = inside[name]
                break
        else:
            return module


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of `bare`: what it is called in a checkpoint."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_partitioned(parameters: Iterable[Tensor]) -> bool:
    """Whether any of these parameters is partitioned."""
    return any(hasattr(p, mark) for p in parameters for mark in _MARKS)


def by_fsdp(parameters: Iterable[Tensor]) -> bool:
    """Whether FSDP, of either kind, has partitioned any of these parameters."""
    return any(hasattr(p, mark) for p in parameters for mark in _MARKS[1:])


def in_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 engine has already taken the model over (it numbers the modules then)."""
    return any(hasattr(m, "ds_id") for m in model.modules())


def shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def numel(parameter: Tensor) -> int:
    """The number of values of the whole tensor."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], changed: bool = False) -> Iterator[None]:
    """Inside the block the parameters are whole; ones that are not partitioned are left alone.

    `changed`: the block changes them, alike on every rank; the first rank's values are kept.
    """
    parts = [p for p in parameters if hasattr(p, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if changed else None):
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or, of FSDP2's, all of it; inside `gathered` and `whole_model` every engine's are whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def whole_model(wrapped: Any) -> Iterator[None]:
    """Inside the block the parameters of a model inside FSDP1 are whole on the first rank, on the CPU, to be read.

    `wrapped` is the outermost module, what a Trainer's `model` is while it trains; others are left alone.
    """
    if type(wrapped).__name__ != "FullyShardedDataParallel":
        yield
        return
    with type(wrapped).summon_full_params(wrapped, writeback=False, rank0_only=True, offload_to_cpu=True):
        yield


def in_pieces(model: nn.Module) -> bool:
    """Whether FSDP1 holds a model's matrices as flat pieces now, which `whole_model` puts together."""
    if any(name.rpartition(".")[2] == "_flat_param" for name, _ in model.named_parameters()):
        return True
    matrices = (m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
    return any(hasattr(w, _MARKS[1]) and w.ndim != 2 for w in matrices)


def copy_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the parameters of the same names and shapes, whatever their dtype and device."""
    with torch.no_grad():
        for name, value in values.items():
            with gathered([parameters[name]], changed=True):
                parameters[name].copy_(value)


def _layers(optimizer: Any) -> list[Any]:
    """An optimizer with accelerate's and DeepSpeed's wrappers around it, the outermost first."""
    return [optimizer, *(_layers(optimizer.optimizer) if hasattr(optimizer, "optimizer") else ())]


def innermost(optimizer: Any) -> Any:
    """The torch optimizer under accelerate's and DeepSpeed's wrappers."""
    return _layers(optimizer)[-1]


def groups(optimizer: Any) -> list[list[Tensor]]:
    """The model's own parameters in each group of an optimizer, possibly inside accelerate's and DeepSpeed's wrappers.

    ZeRO-1 and -2 put one flat tensor into each group, and remember what was there.
    """
    for wrapper in _layers(optimizer):
        for name in ("bit16_groups", "bf16_groups"):
            if hasattr(wrapper, name):
                return [list(group) for group in getattr(wrapper, name)]
    return [list(group["params"]) for group in innermost(optimizer).param_groups]


def reset_state(optimizer: Any, group: int) -> None:
    """Bring the state of one group of torch's Adam or AdamW, wrapped or not, back to its beginning.

    In place: DeepSpeed's parameters refer to the same tensors. ZeRO-1 and -2 put one flat tensor into each group;
    ZeRO-3 empties the groups between steps and knows which tensors were there.
    """
    *wrappers, inner = _layers(optimizer)
    tensors = inner.param_groups[group]["params"]
    for wrapper in wrappers:
        if hasattr(wrapper, "sub_group_to_group_id"):
            flat = wrapper.fp32_partitioned_groups_flat
            tensors = [flat[i] for i, owner in wrapper.sub_group_to_group_id.items() if owner == group]
    for tensor in tensors:
        for value in inner.state.get(tensor, {}).values():
            if isinstance(value, Tensor):  # moments, and the step counter
                value.zero_()
