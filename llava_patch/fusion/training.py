"""What trains in the vision tower and how gradients reach it, who shares a learning rate, and the warm-up.

Adapter first: until a training step the rest of what trains gets no gradient, then it starts like a new run.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import HostError, SettingError
from llava_patch.core.undo import UndoStack
from llava_patch.fusion.base import Fusion, Taps
from llava_patch.hosts import known, storage, zero
from llava_patch.hosts.anatomy import Anatomy, when_loaded
from llava_patch.hosts.towers.layout import Tower

Group = dict[str, Any]
_FUNCTION = "_gradient_checkpointing_func"


# --- the tower --------------------------------------------------------------------------------------------------------


def set_tower_flags(anatomy: Anatomy, settings: Fusion, taps: Taps) -> None:
    """Set requires_grad in the vision tower as `train_tower` says; SettingError: more blocks asked for than are used.

    Blocks above the deepest feature that carries a gradient never train, nor does the final norm unless that feature is
    read through it: nothing would give them a gradient.
    """
    vision = anatomy.vision_model
    if vision is None:
        return
    tower = anatomy.vision_parts()
    vision.requires_grad_(False)
    if settings.train_tower == "frozen":
        return
    if storage.quantised_parameters(vision):
        raise SettingError(
            f"{type(settings).__name__}.train_tower = {settings.train_tower!r}, but the vision tower's weights are "
            "quantised: configure the fusion before the model is loaded (LLAVA_PATCH_GIN_PARAM), which keeps the tower "
            "in floating point, or load the model in 16 bit"
        )
    parts: list[Any] = list(tower.blocks[: taps.deepest])
    if settings.train_tower == "all":
        parts += [*tower.before, *tower.own]
    else:
        k = int(settings.train_tower)
        if k > len(parts):
            raise SettingError(
                f"{type(settings).__name__}.train_tower = {k}: only {len(parts)} blocks of this tower are used"
            )
        parts = parts[len(parts) - k :]
    for part in (*parts, *tower.final_norm(taps.deepest)):
        part.requires_grad_(True)
    for parameter in tower.idle:
        parameter.requires_grad_(False)


def let_tower_train(anatomy: Anatomy, undo: UndoStack) -> None:
    """Make gradients reach the tower; see `keep_gradients` and `lift_no_grad` for the modifications."""
    when_loaded(anatomy, undo, lambda late: keep_gradients(anatomy, late))
    if anatomy.tower_apart:
        lift_no_grad(anatomy, undo)


def lift_no_grad(anatomy: Anatomy, undo: UndoStack) -> None:
    """Run `llava`'s tower with gradients while something in it asks for one; LLaVA-NeXT's does so by itself.

    HostError: a tower of which nobody knows where its `no_grad` is. Modifications: the tower's instance attribute
    `forward`.
    """
    tower = anatomy.tower
    undecorated = getattr(type(tower).forward, "__wrapped__", None)
    if undecorated is None and known.name_of(tower, by_class=True).endswith(known.WITHOUT_NO_GRAD):
        return
    if undecorated is None:
        raise HostError(f"{type(tower).__name__}.forward is not under torch.no_grad() as LLaVA's is: cannot lift it")

    def forward_with_gradients(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters()):
            return undecorated(tower, *args, **kwargs)
        return forward(*args, **kwargs)

    undo.wrap(tower, "forward", forward_with_gradients)


@dataclass(eq=False)
class _WhereGradientsPass:
    """A block's checkpointing function that runs the block as it is where its input requires no gradient.

    A reentrant checkpoint would give none to the first block that trains. The frozen blocks below keep no activations
    anyway, so checkpointing that one block is all that is given up.
    """

    function: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], states: Tensor, *args: Any) -> Any:
        if not states.requires_grad:
            return function(states, *args)
        return self.function(function, states, *args)


def keep_gradients(anatomy: Anatomy, undo: UndoStack) -> None:
    """Let the first block that trains get its gradient where the blocks below it are frozen.

    Modifications: a forward pre-hook on the vision model, which wraps the checkpointing function of each block (of the
    encoder up to 4.52) once the host has set it (training scripts switch checkpointing on after the patch).
    """
    vision = anatomy.vision_model

    def wrap_checkpoints(module: nn.Module, args: Any) -> None:
        for part in vision.modules():
            function = vars(part).get(_FUNCTION)
            if function is not None and not isinstance(function, _WhereGradientsPass):
                setattr(part, _FUNCTION, _WhereGradientsPass(function))

    hook = vision.register_forward_pre_hook(wrap_checkpoints)

    def restore() -> None:
        hook.remove()
        for part in vision.modules():
            function = vars(part).get(_FUNCTION)
            if isinstance(function, _WhereGradientsPass):
                setattr(part, _FUNCTION, function.function)

    undo.push(restore)


# --- learning rates ---------------------------------------------------------------------------------------------------


def distances(tower: Tower, deepest: int) -> dict[int, int]:
    """How far below the last used block D (`deepest`, 1..N) each parameter of a vision tower is, by its id.

    D - i in block i, D in the embeddings, which are one below block 1, and 0 in a final norm that is read. What is not
    used is left out.
    """
    found = {id(p): deepest for m in tower.before for p in m.parameters()}
    found |= {id(p): deepest for p in tower.own}
    for number, block in enumerate(tower.blocks[:deepest], 1):
        found |= {id(p): deepest - number for p in block.parameters()}
    for norm in tower.final_norm(deepest):
        found |= {id(p): 0 for p in norm.parameters()}
    return found


def regroup(
    groups: Iterable[Group], below: Mapping[int, int], fusion: Fusion, base_lr: float, adapter: Collection[int]
) -> list[Group]:
    """Give the vision tower groups of its own, and keep apart what waits in a warm-up.

    `below` is what `distances` found, by parameters' ids; the tower's learning rate is tower_lr * layer_decay **
    distance. Where there is no `tower_lr` it is its group's (LLaVA-NeXT's mm_vision_tower_lr), or else `base_lr`. With
    neither setting the tower stays where it is. The parameters whose ids are in `adapter` share no group with others.

    Groups keep their other entries and their order, none is empty, and every parameter is in exactly one; the tower's
    come after the rest of their group, the deepest block first.
    """
    own_rate = fusion.tower_lr is not None or fusion.layer_decay is not None
    made = []
    for group in groups:
        parts: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            distance = below.get(id(parameter)) if own_rate else None
            rate = group.get("lr", base_lr)
            if distance is not None:
                rate = (rate if fusion.tower_lr is None else fusion.tower_lr) * (fusion.layer_decay or 1.0) ** distance
            parts.setdefault((distance is not None, -rate, id(parameter) in adapter), []).append(parameter)
        for (_, rate, _), parameters in sorted(parts.items(), key=lambda item: item[0]):
            made.append({**group, "params": parameters, "lr": -rate})
    return made


def apart(groups: Iterable[Group], own: Collection[int], lr: float) -> list[Group]:
    """Give parameters, by their ids, groups of their own with learning rate `lr`; none is empty, other entries stay."""
    made = []
    for group in groups:
        inside = [p for p in group["params"] if id(p) in own]
        rest = [p for p in group["params"] if id(p) not in own]
        if rest:
            made.append({**group, "params": rest})
        if inside:
            made.append({**group, "params": inside, "lr": lr})
    return made


def by_kind(
    parameters: Iterable[nn.Parameter],
    projector: Collection[int],
    lr: float,
    weight_decay: float,
    projector_lr: float | None,
) -> list[Group]:
    """Up to four groups as LLaVA's trainer makes them: with and without weight decay, of the projector and of the rest.

    Matrices (and convolutions) have weight decay; biases, norms and other vectors have none. `projector` holds ids,
    whose learning rate is `projector_lr`; None: as the rest.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        apart = projector_lr is not None and id(parameter) in projector
        groups.setdefault((apart, len(zero.shape(parameter)) < 2), []).append(parameter)
    return [
        {"params": members, "lr": projector_lr if apart else lr, "weight_decay": 0.0 if vectors else weight_decay}
        for (apart, vectors), members in sorted(groups.items(), key=lambda item: item[0])
    ]


# --- the warm-up ------------------------------------------------------------------------------------------------------


def steps_of(share: float, total: int) -> int:
    """The number of training steps in a share of the run; a share above 0 is at least one step."""
    return math.ceil(share * total - 1e-9)  # 0.1 * 30 is a little more than 3


class WarmUp:
    """Holds back everything in an optimizer but the adapter.

    What waits keeps requires_grad (DDP's buckets and DeepSpeed's partitions are made once, from what trains); its
    gradients are replaced by zeros before anything else sees them, so the clipped norm is the adapter's alone, and its
    groups have no weight decay. An Adam step then changes nothing, not even a bit. At the switch the step counters and
    moments of what waited are set to zero: bias correction would otherwise take the first gradients for the thousandth.
    """

    def __init__(self, optimizer: Any, adapter: Iterable[nn.Parameter], steps: int) -> None:
        """Remember what waits for the `adapter`; changes nothing yet.

        The optimizer is torch's AdamW or Adam over whole parameters, before DeepSpeed takes it over, and before a saved
        state is loaded into it. Its groups must not mix the adapter with the rest. SettingError: another optimizer, a
        mixed group, or nothing that waits or that learns meanwhile.
        """
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise SettingError(
                f"unfreeze_after needs torch's Adam or AdamW, whose state it resets at the switch; the optimizer is "
                f"{type(optimizer).__name__} (--optim adamw_torch)"
            )
        learns = {id(p) for p in adapter}
        self.steps = steps  # how many optimizer steps the warm-up lasts
        self._waiting: dict[int, float] = {}  # groups by number, and the weight decay that they will have
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        for number, group in enumerate(optimizer.param_groups):
            inside = sum(id(p) in learns for p in group["params"])
            if 0 < inside < len(group["params"]):
                raise SettingError(
                    "unfreeze_after: an optimizer group mixes the projector with other parameters: make the groups "
                    "with handle.param_groups()"
                )
            if not inside:
                self._waiting[number] = group["weight_decay"]
                self._parameters += group["params"]
        if not self._parameters or len(self._waiting) == len(optimizer.param_groups):
            what = "nothing but the projector" if not self._parameters else "no part of the projector"
            raise SettingError(f"unfreeze_after: {what} is in the optimizer, so there is no one to wait for the other")
        self._optimizer = optimizer

    @property
    def active(self) -> bool:
        """Whether something is held back now."""
        return bool(self._hooks)

    def begin_step(self, step: int, optimizer: Any = None) -> None:
        """Do what an optimizer step needs; call it before the step's first forward pass.

        `step` counts the optimizer steps done so far, in earlier parts of a resumed run too; `optimizer` is what now
        steps, if it was wrapped (accelerate, DeepSpeed).
        """
        optimizer = self._optimizer if optimizer is None else optimizer
        if step < self.steps:
            if not self.active:
                self._hooks = [p.register_hook(torch.zeros_like) for p in self._parameters]
                self._set_decay(optimizer, dict.fromkeys(self._waiting, 0.0))
        elif self.active or step == self.steps:  # a run that was resumed right at the switch has no hooks
            self.end()
            self._set_decay(optimizer, self._waiting)
            for number in self._waiting:
                zero.reset_state(optimizer, number)

    def end(self) -> None:
        """Let every gradient through again; can be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _set_decay(self, optimizer: Any, values: dict[int, float]) -> None:
        for number, value in values.items():
            zero.innermost(optimizer).param_groups[number]["weight_decay"] = value
