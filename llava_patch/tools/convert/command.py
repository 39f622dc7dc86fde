"""`merge` and `convert`: what the commands of the same names do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from llava_patch.core import weights
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.core.files import atomic_folder
from llava_patch.core.records import CONFIG_KEY, write_settings
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.hosts.configs import files_of
from llava_patch.tools.convert import hosts, source
from llava_patch.tools.convert.plain import on_meta, without_patch
from llava_patch.tools.convert.source import Checkpoint


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    vision_tower: str | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> Path:
    """Write a checkpoint for the other host, with the patch that it carries, tensor by tensor.

    Every tensor keeps its bits and its precision; HF's embedding is longer than llava's by "<image>", "<pad>" and the
    rows up to a multiple of 64, which are the mean of the others, and are cut off on the way back.

    Args:
        folder: a full checkpoint, stock or patched, or an adapter: the result is a full one.
        out: a folder that does not exist yet or is empty; it appears whole or not at all.
        to: "hf" or "llava".
        vision_tower: to "hf": where llava's tower is now, instead of where its config says. To "llava": a tower that
            the checkpoint is to point at; without it the tower is written to OUT/vision_tower.
        shard_bytes: size of one weight file, and of the memory that this takes.

    Returns:
        The folder.

    Raises:
        CheckpointError: what cannot be converted, a tensor that is not known, or a folder that must not be written to.
        SettingError: another host than the two.
    """
    found = _read(folder, out, to, vision_tower)
    if found.host == to:
        raise CheckpointError(f"{found.name} is a checkpoint of {to} already")
    if to == LLAVA:
        return _write(hosts.to_llava(found, Path(out), vision_tower), Path(out), shard_bytes)
    made = hosts.to_hf(found, vision_tower)
    fusion = made.methods().get("fusion")
    if fusion is not None:
        handle = on_meta(made, fusion)
        made = replace(made, files=(*made.files, handle.fit_files))
    return _write(made, Path(out), shard_bytes)


def merge(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str | None = None,
    vision_tower: str | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> Path:
    """Write a plain checkpoint, which needs no llava_patch, where a patch can be expressed in one exactly.

    Args:
        folder: an adapter or a full patched checkpoint.
        out: as in `convert`.
        to: "hf" or "llava", to convert in the same go; None: the host that it is of.
        vision_tower: as in `convert`.
        shard_bytes: as in `convert`.

    Returns:
        The folder.

    Raises:
        CheckpointError: a stock checkpoint, or a patch that the stock model cannot express: says why and what to do.
        SettingError: another host than the two.
    """
    found = _read(folder, out, to, vision_tower)
    if found.record is None:
        raise CheckpointError(f"{found.name} carries no patch: there is nothing to merge")
    target = to or found.host
    if target == HF:  # whose model can express more: convert first
        made = without_patch(found if found.host == HF else hosts.to_hf(found, vision_tower), target)
    elif found.host == HF:
        made = hosts.to_llava(without_patch(found, target), Path(out), vision_tower)
    else:
        made = without_patch(found, target)
        if found.trains_tower():  # the stock loader takes the tower from its own folder
            made = hosts.with_tower_folder(made, Path(out), vision_tower)
        elif vision_tower is not None:
            raise SettingError("--vision-tower: this checkpoint's tower is the base's own; there is nothing to replace")
    return _write(made, Path(out), shard_bytes)


def _read(folder: str | os.PathLike[str], out: str | os.PathLike[str], to: str | None, tower: str | None) -> Checkpoint:
    if to not in (None, HF, LLAVA):
        raise SettingError(f"--to {to}: expected {HF} or {LLAVA}")
    found = source.read(folder, tower if to == HF else None)
    weights.check_output(Path(out), found.sources)
    return found


def _write(made: Checkpoint, out: Path, shard_bytes: int) -> Path:
    single = made.host == LLAVA and "projector.1.weight" not in made.tensors
    tensors = {files_of(made.host).written(name, single): load for name, load in made.tensors.items()}
    config = made.config if made.record is None else {**made.config, CONFIG_KEY: made.record}
    with atomic_folder(out) as partial:
        weights.write_weights(partial, tensors, shard_bytes)
        weights.write_json(partial / "config.json", config)
        if made.record is not None:
            write_settings(partial, {**made.record, "form": "full"})
        for write in made.files:
            write(partial)
    return out
