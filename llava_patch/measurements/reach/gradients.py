"""Norms of gradients as they arrive: each is dropped at once, so that a model's gradients are never held together."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import InputError
from llava_patch.core.undo import UndoStack
from llava_patch.fusion.training import let_tower_train
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.passes import keeping_flags
from llava_patch.routing.layers import Observer, observing


@dataclass
class Arrivals:
    """Squared norms of what arrived, summed over samples."""

    squares: dict[Any, float] = field(default_factory=dict)  # sum of ‖g‖² by name; missing where nothing arrived
    nonzero: set[Any] = field(default_factory=set)  # names for which a value other than 0 arrived
    _new: list[tuple[Any, Tensor]] = field(default_factory=list)

    def note(self, name: Any, gradient: Tensor) -> None:
        """Take a gradient's norm and its largest value; nothing is read from the device yet."""
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        largest = torch.linalg.vector_norm(gradient, float("inf"))  # tiny values square to zero
        self._new.append((name, torch.stack([norm, largest.float()])))

    def collect(self) -> None:
        """Read what one backward pass brought, with one synchronisation a device; InputError: it is not finite."""
        rows: dict[Any, list[float]] = {}
        for device in {values.device for _, values in self._new}:
            there = [(name, values) for name, values in self._new if values.device == device]
            numbers = torch.stack([values for _, values in there]).tolist()
            rows.update({name: row for (name, _), row in zip(there, numbers, strict=True)})
        self._new.clear()
        for name, (norm, largest) in rows.items():
            if not norm < float("inf"):
                raise InputError(
                    f"the gradient of {name} is not finite: measure with --dtype bfloat16 or float32; in that already, "
                    "the model's weights have grown too large: take an earlier checkpoint"
                )
            self.squares[name] = self.squares.get(name, 0.0) + norm**2
            if largest:
                self.nonzero.add(name)


class SideOutput(Observer):
    """Watches the side branch's output: every layer that reads it gets an alias of its own.

    What arrives at an alias came through that layer; the sum over the aliases is the whole gradient.
    """

    WHOLE = "the side branch's output"

    def __init__(self) -> None:
        """Nothing has been seen yet."""
        self.arrivals = Arrivals()
        self.seen = False

    def side_output(self, states: Tensor) -> Tensor:
        """Ask for the whole gradient, whether or not the branch trains."""
        self.seen = True
        if not states.requires_grad:
            states = states.detach().requires_grad_()
        self._listen(states, self.WHOLE)
        return states

    def side_input(self, states: Tensor, number: int) -> Tensor:
        """An alias for one layer."""
        if not torch.is_grad_enabled():
            return states
        alias = states.view_as(states)
        self._listen(alias, number)
        return alias

    def _listen(self, states: Tensor, name: Any) -> None:
        states.register_hook(lambda gradient: self.arrivals.note(name, gradient))


@contextlib.contextmanager
def training_step(anatomy: Anatomy, everything: bool) -> Iterator[None]:
    """The model as a training step finds it, without gradient checkpointing; as it was afterwards.

    Gradients that were there, flags, training mode and the state of the random generators come back. With `everything`,
    every parameter asks for a gradient.
    """
    model = anatomy.model
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.enable_grad(), keeping_flags(model), UndoStack() as undo:
        model.train()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                undo.set_attribute(module, "gradient_checkpointing", False)
        for parameter in model.parameters():
            undo.push(functools.partial(setattr, parameter, "grad", parameter.grad))
            parameter.grad = None
            if everything and parameter.is_floating_point():
                parameter.requires_grad_(True)
        if everything:
            let_tower_train(anatomy, undo)
        yield


@contextlib.contextmanager
def listening(parameters: dict[str, nn.Parameter], arrivals: Arrivals) -> Iterator[None]:
    """Note the gradient of every parameter that asks for one, and drop it."""

    def note(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        arrivals.note(name, parameter.grad)
        parameter.grad = None

    with UndoStack() as undo:
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                undo.push(parameter.register_post_accumulate_grad_hook(functools.partial(note, name)).remove)
        yield


def backward(model: Any, sample: dict[str, Any], side: SideOutput) -> float:
    """One forward and backward pass; returns the loss. InputError: it is not finite, or the sample has no labels."""
    with observing(side):
        loss = model(**sample, use_cache=False).loss
    if loss is None:
        raise InputError("a sample without labels has no loss: make samples with training_inputs(...)")
    value = float(loss.detach())
    if not abs(value) < float("inf"):
        raise InputError(
            f"the loss is {value}: has the sample an answer? In float16 it may "
            "overflow: measure with --dtype bfloat16 or float32"
        )
    if loss.requires_grad:  # else nothing asks for a gradient, and none arrives
        loss.backward()
    return value
