"""One host's checkpoint as the other's: tensors, configuration, and what is written beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import Load, write_weights
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.hosts.hf import whole_config
from llava_patch.tools.convert import companions, configs
from llava_patch.tools.convert.source import Checkpoint, check_samples, same_tower, tower_tensors

TOWER_FOLDER = "vision_tower"
VOCAB_MULTIPLE = 64
_EMBEDDINGS = ("decoder.embed_tokens.weight", "head.weight")


def to_hf(found: Checkpoint, vision_tower: str | None) -> Checkpoint:
    """A llava checkpoint as one of HF."""
    configs.check_convertible(found.config, LLAVA)
    place = vision_tower or found.config["mm_vision_tower"]
    vision = configs.vision_config(place)
    tensors = dict(found.tensors)
    if not any(name.startswith("tower.") for name in tensors):
        tensors |= tower_tensors(place, vision)
        check_samples(tensors, found.tower_samples, found.name)
    tokenizer, tokens, added = companions.hf_tokenizer(found)
    rows = tensors[_EMBEDDINGS[0]]().shape[0]
    longest = max(rows, *(i + 1 for i in tokens.values()))
    vocab = -(-longest // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    for name in _EMBEDDINGS:
        if name in tensors:
            tensors[name] = _lengthened(tensors[name], vocab)
    config = configs.to_hf(found.config, vision, tokens, added, vocab)
    kind = config["text_config"]["model_type"]

    def files(out: Path) -> None:
        companions.write_hf(found, out, tokenizer, vision, place, kind, tokens[companions.PAD])

    return replace(found, host=HF, config=config, tensors=tensors, files=(files,))


def to_llava(found: Checkpoint, out: Path, vision_tower: str | None) -> Checkpoint:
    """An HF checkpoint as one of llava."""
    configs.check_convertible(found.config, HF)
    rows, removed = companions.llava_vocabulary(found)
    tensors = dict(found.tensors)
    for name in _EMBEDDINGS:
        if name in tensors:
            tensors[name] = _shortened(tensors[name], rows)
    config = configs.to_llava(found.config, "", rows)

    def files(partial: Path) -> None:
        companions.write_llava(found, partial, config, removed)

    made = replace(found, host=LLAVA, config=config, tensors=tensors, files=(files,))
    vision = whole_config(found.config).vision_config
    return with_tower_folder(made, out, vision_tower, vision, found.find("preprocessor_config.json"))


def with_tower_folder(
    made: Checkpoint, out: Path, vision_tower: str | None, vision: Any = None, images: str | None = None
) -> Checkpoint:
    """A llava checkpoint whose vision tower is in a folder of its own, where llava's stock loader looks for it.

    Args:
        made: a llava checkpoint that holds its tower.
        out: the folder that it will be in.
        vision_tower: folder or hub name of a tower with the same weights, to point at; None: write OUT/vision_tower.
        vision: the tower's configuration; None: that of the tower which the checkpoint points at.
        images: folder or hub name with the image processor's settings; None: that tower's.

    Raises:
        CheckpointError: the named tower has other weights.
    """
    tower = {name: load for name, load in made.tensors.items() if name.startswith("tower.")}
    pointed = made.config["mm_vision_tower"]
    config_of_tower = configs.vision_config(pointed) if vision is None else vision
    if vision_tower is not None:
        other = tower_tensors(vision_tower, configs.vision_config(vision_tower))
        differs = same_tower(tower, other)
        if differs is not None:
            raise CheckpointError(
                f"--vision-tower {vision_tower}: {differs} differs from this checkpoint's; leave it out, so that the "
                "tower is written beside"
            )
        place, files = vision_tower, made.files
    else:
        place = str(out.resolve() / TOWER_FOLDER)
        processor = images or pointed
        companions.check_image_processor(processor)

        def write_tower(partial: Path) -> None:
            folder = partial / TOWER_FOLDER
            folder.mkdir()
            write_weights(folder, {name.removeprefix("tower."): load for name, load in tower.items()})
            companions.write_tower_files(processor, folder, config_of_tower)

        files = (*made.files, write_tower)
    made = replace(made, config={**made.config, "mm_vision_tower": place}, files=files)
    if made.reads_own_tower():
        return made
    return replace(made, tensors={name: load for name, load in made.tensors.items() if name not in tower})


def _lengthened(load: Load, rows: int) -> Load:

    def longer() -> Tensor:
        weight = load()
        # The mean row: an added token is never likelier than every real one.
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])

    return longer


def _shortened(load: Load, rows: int) -> Load:
    return lambda: load()[:rows]
