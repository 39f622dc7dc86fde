"""`merge` and `convert`: what the commands of the same names do, and one host's checkpoint as the other's."""

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_patch.core import weights
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.core.files import atomic
from llava_patch.core.locks import output_lock
from llava_patch.core.records import CONFIG_KEY, FULL, write_settings
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.hosts.configs import files_of
from llava_patch.hosts.hf import whole_config
from llava_patch.tools.convert import companions, source
from llava_patch.tools.convert.plain import on_meta, without_patch
from llava_patch.tools.convert.source import Checkpoint, check_samples, first_difference, tower_tensors

TOWER_FOLDER = "vision_tower"
VOCAB_MULTIPLE = 64
_EMBEDDINGS = ("decoder.embed_tokens.weight", "head.weight")


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
    made = to_llava(found, Path(out), vision_tower) if to == LLAVA else to_hf(found, vision_tower)
    fusion = made.methods().get("fusion")
    if to == HF and fusion is not None:
        made = replace(made, files=(*made.files, on_meta(made, fusion).fit_files))
    return _write(found, made, Path(out), shard_bytes)


def merge(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str | None = None,
    vision_tower: str | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> Path:
    """Write a plain checkpoint, which needs no llava_patch, where a patch can be expressed in one exactly.

    The folder is an adapter or a full patched checkpoint; `to` converts in the same go (None: the host that it is of).
    All else is as in `convert`.

    Raises:
        CheckpointError: a stock checkpoint, or a patch that the stock model cannot express: says why and what to do.
        SettingError: another host than the two.
    """
    found = _read(folder, out, to, vision_tower)
    if found.record is None:
        raise CheckpointError(f"{found.name} carries no patch: there is nothing to merge")
    target = to or found.host
    if target == HF:  # whose model can express more: convert first
        made = without_patch(found if found.host == HF else to_hf(found, vision_tower), target)
    elif found.host == HF:
        made = to_llava(without_patch(found, target), Path(out), vision_tower)
    else:
        made = without_patch(found, target)
        if found.trains_tower():  # the stock loader takes the tower from its own folder
            made = with_tower_folder(made, Path(out), vision_tower)
        elif vision_tower is not None:
            raise SettingError("--vision-tower: this checkpoint's tower is the base's own; there is nothing to replace")
    return _write(found, made, Path(out), shard_bytes)


def _read(folder: str | os.PathLike[str], out: str | os.PathLike[str], to: str | None, tower: str | None) -> Checkpoint:
    if to not in (None, HF, LLAVA):
        raise SettingError(f"--to {to}: expected {HF} or {LLAVA}")
    found = source.read(folder, tower if to == HF else None)
    weights.check_output(Path(out), [*found.sources, *([tower] if tower else [])])
    companions.check_files(found)
    return found


def _write(found: Checkpoint, made: Checkpoint, out: Path, shard_bytes: int) -> Path:
    single = made.host == LLAVA and "projector.1.weight" not in made.tensors
    tensors = {files_of(made.host).written(name, single): load for name, load in made.tensors.items()}
    config = made.config if made.record is None else {**made.config, CONFIG_KEY: made.record}
    # What is joined or cut is counted as it lies on the disk now; a llava tower's own folder is among what was found.
    stored = {**made.tensors, **found.tensors}.values()
    size = sum(load.nbytes for load in stored if isinstance(load, weights.StoredTensor))
    with output_lock(out):
        weights.check_output(out, ())  # another process may have been before
        with atomic(out, folder=True, size=size) as partial:
            weights.write_weights(partial, tensors, shard_bytes)
            weights.write_json(partial / "config.json", config)
            if made.record is not None:
                write_settings(partial, {**made.record, "form": FULL}, weights=partial)
            for write in made.files:
                write(partial)
    return out


def to_hf(found: Checkpoint, vision_tower: str | None) -> Checkpoint:
    """A llava checkpoint as one of HF."""
    companions.check_convertible(found.config, LLAVA)
    place = vision_tower or found.config["mm_vision_tower"]
    vision = companions.vision_config(place)
    tensors = dict(found.tensors)
    if not any(name.startswith("tower.") for name in tensors):
        tensors |= tower_tensors(place, vision)
        check_samples(tensors, found.tower_samples, found.name)
    tokenizer, tokens, added = companions.hf_tokenizer(found)
    rows = tensors[_EMBEDDINGS[0]]().shape[0]
    longest = max(rows, *(i + 1 for i in tokens.values()))
    vocab = -(-longest // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    tensors |= {k: functools.partial(_lengthened, tensors[k], vocab) for k in _EMBEDDINGS if k in tensors}
    config = companions.hf_config(found.config, vision, tokens, added, vocab)
    write = functools.partial(companions.write_hf, found, config, tokenizer, vision, companions.clip_images(place))
    return replace(found, host=HF, config=config, tensors=tensors, files=(write,))


def to_llava(found: Checkpoint, out: Path, vision_tower: str | None) -> Checkpoint:
    """An HF checkpoint as one of llava."""
    companions.check_convertible(found.config, HF)
    rows, removed = companions.llava_vocabulary(found)
    cut = {k: lambda k=k: found.tensors[k]()[:rows] for k in _EMBEDDINGS if k in found.tensors}
    config = companions.llava_config(found.config, "", rows)
    write = functools.partial(companions.write_llava, found, config, companions.llava_tokenizer(found, removed))
    made = replace(found, host=LLAVA, config=config, tensors=found.tensors | cut, files=(write,))
    vision = whole_config(found.config).vision_config
    return with_tower_folder(made, out, vision_tower, vision, companions.images_of(found.sources))


def with_tower_folder(
    made: Checkpoint, out: Path, vision_tower: str | None, vision: Any = None, images: str | None = None
) -> Checkpoint:
    """A llava checkpoint whose vision tower is in a folder of its own, where llava's stock loader looks for it.

    With `vision_tower` it points at that one, which must have the same weights; else OUT/vision_tower is written.
    Configuration and image processor that are not given are those of the tower that it points at now.
    """
    tower = {name: load for name, load in made.tensors.items() if name.startswith("tower.")}
    pointed = made.config["mm_vision_tower"]
    config_of_tower = companions.vision_config(pointed) if vision is None else vision
    if vision_tower is not None:
        differs = first_difference(tower, tower_tensors(vision_tower, companions.vision_config(vision_tower)))
        if differs is not None:
            raise CheckpointError(
                f"--vision-tower {vision_tower}: {differs} differs from this checkpoint's; leave it out, so that the "
                "tower is written beside"
            )
        place, files = vision_tower, made.files
    else:
        place = str(out.resolve() / TOWER_FOLDER)
        processor = images or pointed
        if not processor or companions.images_of((processor,)) is None:
            raise CheckpointError(
                f"{processor or made.name}: no preprocessor_config.json there, which the vision tower's folder needs: "
                "name a tower that has one with --vision-tower"
            )

        image_processor = companions.clip_images(processor)

        def write_tower(partial: Path) -> None:
            folder = partial / TOWER_FOLDER
            folder.mkdir()
            weights.write_weights(
                folder, {f"vision_model.{n.removeprefix('tower.')}": load for n, load in tower.items()}
            )
            config = {**companions.plain(config_of_tower), "architectures": ["CLIPVisionModel"]}
            weights.write_json(folder / "config.json", config)
            image_processor.save_pretrained(folder)

        files = (*made.files, write_tower)
    left = made.tensors if made.reads_own_tower() else {k: v for k, v in made.tensors.items() if k not in tower}
    return replace(made, config={**made.config, "mm_vision_tower": place}, tensors=left, files=files)


def _lengthened(load: weights.Load, rows: int) -> Tensor:
    weight = load()
    # The mean row: an added token is never likelier than every real one.
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])
