"""Which parameters share a learning rate: the vision tower's blocks, the projector, and the rest. Mathematics only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from llava_patch.hosts import zero
from llava_patch.hosts.towers.layout import Tower

Group = dict[str, Any]


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
    groups: Iterable[Group],
    below: Mapping[int, int],
    *,
    base_lr: float,
    tower_lr: float | None = None,
    layer_decay: float | None = None,
    adapter: Collection[int] = (),
) -> list[Group]:
    """Give the vision tower groups of its own, and keep apart what waits in a warm-up.

    `below` is what `distances` found, by parameters' ids; the tower's learning rate is tower_lr * layer_decay **
    distance, with `base_lr` where there is no `tower_lr`. With neither setting the tower stays where it is. The
    parameters whose ids are in `adapter` share no group with others.

    Returns:
        Groups that keep their other entries, none empty, every parameter in exactly one; in the order of the given
        groups, the tower's after the rest of its group, the deepest block first.
    """
    own_rate = tower_lr is not None or layer_decay is not None
    made = []
    for group in groups:
        parts: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            distance = below.get(id(parameter)) if own_rate else None
            rate = group.get("lr", base_lr)
            if distance is not None:
                rate = (base_lr if tower_lr is None else tower_lr) * (layer_decay or 1.0) ** distance
            place = (distance is not None, -rate, id(parameter) in adapter)
            parts.setdefault(place, []).append(parameter)
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
    *,
    lr: float,
    weight_decay: float = 0.0,
    projector_lr: float | None = None,
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
