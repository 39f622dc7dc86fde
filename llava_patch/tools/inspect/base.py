"""Whether the model below a checkpoint is the one that it was made on."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import StoredTensor, read_file, read_json, same_values, weight_files
from llava_patch.hosts import configs
from llava_patch.hosts.anatomy import LLAVA

_VALUES = 4


@dataclass(frozen=True)
class Match:
    """How a base compares."""

    same: bool | None  # whether it is the right one; None: cannot be told
    compared: int  # matrices that were compared, by a few values each
    differing: int  # how many of them differ
    note: str


def match_base(
    base: str, host: str, fingerprint: dict[str, list[float]] | None, own: list[StoredTensor], form: str
) -> Match:
    """Compare a base with an adapter's record, or with the checkpoint's own tensors."""
    if not os.path.isdir(base):
        lost = "not there any more" if os.path.isabs(base) else "a name of the hub, which is not looked up"
        return Match(None, 0, 0, f"{base} is {lost}; name a folder with --base to compare")
    files = weight_files(base)
    if not files:
        raise CheckpointError(f"--base {base}: holds no weights")
    try:
        below_host = configs.look(base).host or host
    except CheckpointError:  # a plain language model, which LLaVA's training starts from
        below_host = host
    below = {neutral(t.name, below_host): t for path in files for t in read_file(path, whole=True)}
    if fingerprint is None:
        compare = {"full": _against_own, "lora": _under_lora}.get(form)
        return compare(below, host, own) if compare else Match(None, 0, 0, "these files record no base")
    if below_host != host:  # which pads its embeddings in another way, so that recorded places are other places
        return Match(None, 0, 0, "it is a checkpoint of the other host: llava-patch convert makes one to compare with")
    tower: dict[str, StoredTensor] = {}
    if below_host == LLAVA:  # whose tower lies in a folder of its own
        place = (read_json(base, "config.json") or {}).get("mm_vision_tower", "")
        paths = weight_files(place) if os.path.isdir(place) else []
        tower = {f"tower.{t.name}": t for path in paths for t in read_file(path, whole=True)}
    below |= tower
    differing, lacking, away = [], [], 0
    for name, values in fingerprint.items():
        plain = neutral(name, host)
        there = below.get(plain)
        if there is not None:
            differing += [name] * (not same_values(there.sample(len(values)), values))
        elif not tower and below_host == LLAVA and plain.startswith("tower."):
            away += 1
        else:
            lacking.append(name)
    compared = len(fingerprint) - len(lacking) - away
    if differing:
        return Match(False, compared, len(differing), f"another base: {differing[0]} differs")
    if lacking:
        return Match(False, compared, 0, f"another base: it has no tensor {lacking[0]}")
    note = f"the base it was made on ({compared} matrices compared at {_VALUES} places)"
    return Match(True, compared, 0, note + (f"; its vision tower is elsewhere ({away} not compared)" if away else ""))


def _against_own(below: dict[str, StoredTensor], host: str, own: list[StoredTensor]) -> Match:
    """A full checkpoint records no base: what was frozen equals the base's, what was trained does not."""
    differing = compared = 0
    for tensor in own:
        there = below.get(neutral(tensor.name, host))
        if there is not None and there.shape == tensor.shape and len(tensor.shape) == 2:
            compared += 1
            differing += not same_values(there.sample(_VALUES), tensor.sample(_VALUES))
    if not compared:
        return Match(False, 0, 0, "another base: no matrix in common")
    equal = compared - differing
    note = f"a full checkpoint records no base; {equal} of {compared} matrices are this one's, at {_VALUES} places each"
    return Match(None if differing else True, compared, differing, note)


def _under_lora(below: dict[str, StoredTensor], host: str, own: list[StoredTensor]) -> Match:
    """LoRA files record no base either: what they change must be there, in the sizes that they change."""
    wanted = {
        t.name.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight": t.shape[1]
        for t in own
        if ".lora_A." in t.name
    }
    fit = 0
    for name, columns in wanted.items():
        plain = neutral(name, host)
        there = below.get(plain)
        if there is None and plain.startswith("tower."):  # llava's lies in a folder of its own
            continue
        if there is None:
            return Match(False, len(wanted), 0, f"another base: it has no tensor {name}")
        if there.shape[-1] != columns:
            what = f"{name} is {'x'.join(map(str, there.shape))}, the LoRA files want {columns} columns"
            return Match(False, len(wanted), 1, f"another base: {what}")
        fit += 1
    return Match(None, fit, 0, f"LoRA files record no base; the {fit} matrices that they change there fit in size")


def neutral(name: str, host: str) -> str:
    """A tensor's name in the neutral spelling, which both hosts share; one that is not known stays as it is."""
    return configs.files_of(host).neutral(name) or name
