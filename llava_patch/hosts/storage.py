"""Weights that are not there as plain tensors: offloaded by accelerate's hooks, or quantised by bitsandbytes.

A `device_map` that offloads leaves weights on the meta device and hooks on their modules, which bring them in while a
module is called; a quantised layer holds integers and what they stand for. What is partitioned is in `zero`.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import HostError, SettingError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import compat, lora, zero

# --- offloaded --------------------------------------------------------------------------------------------------------


def _hooks(module: Any) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    return list(getattr(hook, "hooks", [] if hook is None else [hook]))


def _offloading(module: Any) -> Any:
    """Accelerate's hook that brings a module's weights in, or None."""
    return next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def is_out_of_reach(module: nn.Module) -> bool:
    """Whether some weights are on the meta device and no hook brings them in."""
    with brought_in(module):
        return any(p.is_meta for p in module.parameters())


@contextlib.contextmanager
def brought_in(module: nn.Module) -> Iterator[None]:
    """Inside the block a module's offloaded weights are where it runs; changes of them are lost."""
    hooks = [(child, hook) for child in module.modules() if (hook := _offloading(child)) is not None]
    for child, hook in hooks:
        hook.pre_forward(child)
    try:
        yield
    finally:
        for child, hook in hooks:
            hook.post_forward(child, None)


def value(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name; where it is offloaded, the values that its hook would bring in."""
    found, place = _stored(model, name)
    return found.get(place, None) if found is not None else _tensor(model, name)


def whole_state(model: Any) -> dict[str, Any] | None:
    """A model's state dict with the values of what is offloaded, for a `save_pretrained` that cannot bring them in.

    None where it can, which takes less memory, or where nothing is offloaded. HostError: a tensor is out of reach.
    """
    state = model.state_dict()
    away = [name for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_meta]
    if not away or compat.saves_offloaded(model):
        return None
    state.update((name, value(model, name)) for name in away)
    if lost := [name for name in away if state[name].is_meta]:
        raise HostError(
            f"{lost[0]} ({len(lost)} tensors) lies outside memory and nothing brings it in: load the model without "
            "offloading (device_map)"
        )
    return state


def put(model: nn.Module, name: str, values: Tensor) -> None:
    """Give a parameter other values, whatever its dtype and device, and wherever it is kept."""
    found, place = _stored(model, name)
    if found is None:
        zero.copy_values({name: _tensor(model, name)}, {name: values})
        return
    while hasattr(found, "prefix"):  # accelerate's views of one table
        found, place = found.dataset, f"{found.prefix}{place}"
    table = getattr(found, "state_dict", found)  # what is in memory comes before what is on the disk
    table[place] = values.detach().to("cpu", _tensor(model, name).dtype).clone()


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _stored(model: nn.Module, name: str) -> tuple[Any, str]:
    """The table that an offloaded tensor lies in, with its name there; (None, "") for one that is in memory."""
    if not _tensor(model, name).is_meta:
        return None, ""
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):  # a hook may bring in what lies in the modules below
        hook = _offloading(model.get_submodule(".".join(path[:depth])))
        if hook is not None and (place := ".".join(path[depth:])) in hook.weights_map:
            return hook.weights_map, place
    return None, ""


def _run_at(module: nn.Module, hook: Any) -> None:
    """Have a module's inputs brought where it runs, as a hook of the module that it stands for does."""
    if getattr(hook, "execution_device", None) is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    like = AlignDevicesHook(hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys)
    add_hook_to_module(module, like)


# --- quantised --------------------------------------------------------------------------------------------------------


def is_quantised(module: Any) -> bool:
    """Whether a module is a Linear whose weight bitsandbytes holds in 8 or 4 bit."""
    weight = vars(module).get("_parameters", {}).get("weight")
    return type(weight).__name__ in ("Int8Params", "Params4bit") and not weight.is_floating_point()


def quantised_parameters(model: nn.Module) -> set[str]:
    """Names of the weights that are integers."""
    return {f"{name}.weight" for name, module in model.named_modules() if is_quantised(module)}


def dequantised(linear: Any, dtype: torch.dtype) -> nn.Linear:
    """A plain Linear with exactly the values that a quantised one stands for, rounded to `dtype`; it does not train."""
    from bitsandbytes import functional

    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        data, state = weight.data, weight.quant_state
        about = dict(vars(state))
        linear.state_dict()  # brings 4 bit back from the layout of a fast CPU kernel, which nothing else can read
        values = functional.dequantize_4bit(weight.data, weight.quant_state)
        weight.data, weight.quant_state = data, state  # the way back rounds: the original stays what it is
        vars(state).clear()
        vars(state).update(about)
    else:
        scale = linear.state.SCB if weight.SCB is None else weight.SCB  # its first call moves them there
        values = functional.int8_vectorwise_dequant(weight.data, scale)
    bias = linear.bias is not None
    plain = nn.Linear(linear.in_features, linear.out_features, bias, weight.device, dtype).requires_grad_(False)
    with torch.no_grad():
        plain.weight.copy_(values)
        if bias:
            plain.bias.copy_(linear.bias)
    plain.train(linear.training)
    for hook in _hooks(linear):
        _run_at(plain, hook)
    return plain


def dequantise(parent: nn.Module, dtype: torch.dtype, undo: UndoStack, below: str = "") -> bool:
    """Put plain layers in the place of the quantised ones in a module's child `below`; whether there were any.

    Modifications: those layers.
    """
    root = parent.get_submodule(below)
    names = [f"{below}.{name}".strip(".") for name, module in root.named_modules() if is_quantised(module)]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        where = parent.get_submodule(owner)
        undo.replace_module(where, leaf, dequantised(getattr(where, leaf), dtype))
    return bool(names)


# --- copies -----------------------------------------------------------------------------------------------------------


def plain_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that shares nothing with a module and whose weights are whole, in memory, in floating point, without LoRA.

    Weights may be partitioned by DeepSpeed ZeRO-3 (then every rank must call this; the engine partitions the copy when
    it takes the model over), offloaded (the copy is in memory, on the device where the original runs) or quantised (the
    copy has the dequantised values in `dtype`, since integers cannot train). LoRA's updates are merged.
    """
    hooks = {id(hook): hook for child in module.modules() if (hook := vars(child).get("_hf_hook")) is not None}
    with zero.gathered(module.parameters()), brought_in(module):
        # A copied parameter has the gathered values and none of DeepSpeed's attributes; a copied hook would bring a
        # copy of every offloaded weight of the model with it.
        twin = copy.deepcopy(module, dict(hooks))
    for child in twin.modules():
        _take_hook_off(child)
    lora.merge(twin, lambda linear: dequantised(linear, dtype) if is_quantised(linear) else linear)
    dequantise(twin, dtype, UndoStack())
    children = dict(twin.named_modules())
    for name, original in module.named_modules():
        for hook in _hooks(original) if name in children else ():
            _run_at(children[name], hook)
    for name, parameter in twin.named_parameters():
        if not parameter.is_floating_point():
            raise SettingError(
                f"{type(module).__name__}'s weights are quantised ({name} is {parameter.dtype}), in a form that cannot "
                "be copied to train: bitsandbytes' 8 and 4 bit can; else load the model without quantisation"
            )
    return twin


def _take_hook_off(module: nn.Module) -> None:
    """Take off what accelerate's hook left on a copy, without asking the hook to bring weights back."""
    attributes = vars(module)
    if attributes.pop("_hf_hook", None) is None:
        return
    attributes.pop("forward", None)
    own = attributes.pop("_old_forward", None)
    if getattr(own, "__func__", None) is not type(module).forward:
        attributes["forward"] = own
