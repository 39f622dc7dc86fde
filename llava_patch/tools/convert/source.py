"""A checkpoint on disk, read without loading a model: full ones of both hosts, and adapters over their base.

It must hold what its configuration and settings call for, and nothing else.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from llava_patch.core import stored
from llava_patch.core.errors import CheckpointError
from llava_patch.core.records import FORMAT, base_of, check_weights
from llava_patch.core.weights import StoredTensor, Tensors, folder_of, locate, open_weights, read_file
from llava_patch.hosts import compat, configs
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.hosts.hf import whole_config
from llava_patch.hosts.host import is_computed, made_of
from llava_patch.patching import checkpoint as patched
from llava_patch.patching.keys import check_values
from llava_patch.settings.methods import DeepStack, from_record
from llava_patch.tools.convert.companions import vision_config

_LASTING = ("format", "fusion", "routing", "pruning", "trained_tower")
_OTHER_CLIP_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint."""

    host: str  # "llava" or "hf"
    config: dict[str, Any]  # its config.json, without our key
    record: dict[str, Any] | None  # our settings (format, fusion, routing, pruning); None for a stock checkpoint
    tensors: Tensors  # by neutral names; on llava without the tower, unless its loader takes that from the checkpoint
    sources: tuple[str, ...]  # folders or hub names that its other files are taken from, the first one that has a file
    # what an adapter's fingerprint says of a tower that llava keeps in a folder of its own
    tower_samples: dict[str, list[float]] = field(default_factory=dict)
    files: tuple[Callable[[Path], None], ...] = ()  # what writes the files beside weights and configuration

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.sources[0]

    def methods(self) -> dict[str, Any]:
        """Its settings dataclasses by kind; none for a stock checkpoint."""
        return {} if self.record is None else from_record(self.record, self.name)

    def trains_tower(self) -> bool:
        """Whether its patch trained something in the vision tower."""
        fusion = self.methods().get("fusion")
        frozen_since = self.record is not None and bool(self.record.get("trained_tower"))
        return frozen_since or (fusion is not None and fusion.train_tower != "frozen")

    def reads_own_tower(self) -> bool:
        """Whether llava's loader takes the tower's weights from the checkpoint itself."""
        return self.trains_tower() or bool(self.config.get("unfreeze_mm_vision_tower"))

    def find(self, name: str) -> str | None:
        """The first of its folders that has this file."""
        return next((source for source in self.sources if locate(source, name) is not None), None)

    def path(self, name: str) -> Path | None:
        """This file of the first of its folders that has it."""
        return next((path for source in self.sources if (path := locate(source, name)) is not None), None)


def read(folder: str | os.PathLike[str], vision_tower: str | None = None) -> Checkpoint:
    """Read a full checkpoint, stock or patched, or an adapter together with its base, which must be the right one."""
    source = folder_of(os.fspath(folder))
    files = configs.read(source)
    host, config, settings, base = files.host, files.config, files.record or {}, files.base
    record = {k: settings[k] for k in _LASTING if k in settings} or None
    if record is not None and record.get("format") == FORMAT and not any(record.get(k) for k in _LASTING[1:]):
        record = None  # a run with the auxiliary loss alone leaves a stock model
    tower = vision_tower or config.get("mm_vision_tower", "")
    sources: tuple[str, ...] = (source,)
    samples: dict[str, list[float]] = {}
    if base is not None:
        base = base_of(source, settings)
        sources = (source, base)
        path = locate(source, patched.WEIGHTS_FILE)
        if path is None:
            raise CheckpointError(f"{source}: {patched.WEIGHTS_FILE} is missing")
        below = _neutral(open_weights(base), host, base)
        held = read_file(path)
        own = _neutral({tensor.name: tensor for tensor in held}, host, source)
        check_weights(settings, path)
        for tensor in held:  # one at a time in memory
            stored.check_values({tensor.name: tensor()}, path)
        if host == LLAVA:  # whatever a base says of the tower, llava's loader takes it from its own folder
            below = {k: v for k, v in below.items() if not k.startswith("tower.")}
            if any(k.startswith("tower.") for k in own):
                below |= tower_tensors(tower, vision_config(tower))
        fingerprint = {str(configs.files_of(host).neutral(k)): v for k, v in settings.get("fingerprint", {}).items()}
        if host == LLAVA and not any(k.startswith("tower.") for k in below):
            samples = {k: v for k, v in fingerprint.items() if k.startswith("tower.")}
        check_samples(below, {k: v for k, v in fingerprint.items() if k not in samples}, source)
        tensors = below | own
    else:
        tensors = _neutral(open_weights(source), host, source)
        check_weights(settings, Path(source))
    found = Checkpoint(host, config, record, tensors, sources, samples)

    def copy_side_files(out: Path) -> None:
        for name in patched._SIDE_FILES:
            if path := found.path(name):
                shutil.copyfile(path, out / name)

    found = replace(found, files=(copy_side_files,))
    if host == LLAVA and not found.reads_own_tower():
        found = replace(found, tensors={k: v for k, v in tensors.items() if not k.startswith("tower.")})
    check_complete(found, source, tower)
    return found


def _neutral(tensors: Tensors, host: str, source: str) -> Tensors:
    renamed: Tensors = {}
    for name, load in tensors.items():
        if is_computed(name):
            continue
        plain = configs.files_of(host).neutral(name)
        if plain is None:
            raise CheckpointError(f"{source}: tensor {name} is not one that llava_patch knows where to put")
        if isinstance(load, StoredTensor) and not load.is_floating:
            raise CheckpointError(
                f"{load.file}: {name} is of {load.dtype}: expected floating-point numbers; a quantised checkpoint is "
                "converted before it is quantised"
            )
        renamed[plain] = load
    return renamed


def check_complete(found: Checkpoint, source: str, tower: str) -> None:
    """Compare names and shapes with what the configuration and the settings call for."""
    text, shapes = configs.files_of(found.host).text_config(found.config), shapes_of(found.tensors)
    language = _shapes_by(transformers.AutoModelForCausalLM, text)
    expected = {"decoder." + name.removeprefix("model."): shape for name, shape in language.items()}
    expected["head.weight"] = expected.pop("decoder.lm_head.weight")
    if text.tie_word_embeddings and "head.weight" not in found.tensors:
        del expected["head.weight"]
    routing = found.methods().get("routing")
    side = 0 if routing is None or routing.split == text.num_hidden_layers else routing.side_layers
    for name in [n for n in expected if n.startswith("decoder.layers.0.")]:
        rest = name.removeprefix("decoder.layers.0.")
        expected |= {f"decoder.side_branch.{i}.{rest}": expected[name] for i in range(side)}
    compare({k: v for k, v in shapes.items() if k.startswith(("decoder.", "head."))}, expected, source)
    if found.host == HF or found.reads_own_tower():
        vision = whole_config(found.config).vision_config if found.host == HF else vision_config(tower)
        expected = _shapes_by(transformers.AutoModel, vision, compat.neutral_tower)
        compare({k: v for k, v in shapes.items() if k.startswith("tower.")}, expected, source)
    _check_projectors(found, shapes, int(text.hidden_size), source)


def _check_projectors(found: Checkpoint, shapes: dict[str, torch.Size], hidden: int, source: str) -> None:
    """The projector, DeepStack's second one, and the new line of anyres: each there if and only if it is called for."""
    width, fusion = configs.files_of(found.host).feature_width(found.config), found.methods().get("fusion")
    linears, biased, layers = 2, True, 1
    if found.host == LLAVA:
        depth = re.fullmatch(r"mlp(\d+)x_gelu", found.config.get("mm_projector_type", "linear"))
        linears, anyres = int(depth[1]) if depth else 1, "unpad" in (found.config.get("mm_patch_merge_type") or "")
    else:
        biased, anyres = found.config.get("multimodal_projector_bias", True), found.config["model_type"] != "llava"
        select = found.config.get("vision_feature_layer", -2)
        layers = len(select) if isinstance(select, list) else 1
    expected = {}
    for part in ["projector", *(["stack"] if isinstance(fusion, DeepStack) and not fusion.shares_projector else [])]:
        for i in range(linears):
            expected[f"{part}.{i}.weight"] = torch.Size([hidden, hidden if i else layers * width])
            if biased:
                expected[f"{part}.{i}.bias"] = torch.Size([hidden])
        first = shapes.get(f"{part}.0.weight")
        if fusion is not None and first is not None and len(first) == 2 and first[1] and first[1] % width == 0:
            expected[f"{part}.0.weight"] = torch.Size([hidden, first[1]])  # how wide is the fusion's business
    if anyres:
        expected["image_newline"] = torch.Size([hidden])
    compare({k: v for k, v in shapes.items() if not k.startswith(("decoder.", "head.", "tower."))}, expected, source)


def _shapes_by(kind: Any, config: Any, spelled: Callable[[str], str] = str) -> dict[str, torch.Size]:
    with torch.device("meta"), made_of("config.json"):
        tensors = kind.from_config(config).state_dict()
    return {spelled(name): tensor.shape for name, tensor in tensors.items() if not is_computed(name)}


def shapes_of(tensors: Tensors) -> dict[str, torch.Size]:
    """The shape of every tensor, from the headers of the files."""
    shapes = {name: load.shape if isinstance(load, StoredTensor) else load().shape for name, load in tensors.items()}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def compare(found: dict[str, torch.Size], expected: dict[str, torch.Size], source: str) -> None:
    """Compare names and shapes."""
    other = ": its weights and its config.json are not of one model, copy or download both from one place"
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise CheckpointError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all){other}")
    if unknown:
        raise CheckpointError(
            f"{source}: tensor {unknown[0]} has no place in this model ({len(unknown)} in all){other}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            wrong = f"{name} has shape {tuple(found[name])}, expected {tuple(shape)}"
            raise CheckpointError(f"{source}: {wrong}{other}")


def check_samples(tensors: Tensors, samples: dict[str, list[float]], source: str) -> None:
    """Compare an adapter's fingerprint with the base that it is put on."""
    for name, values in samples.items():
        if name not in tensors:
            raise CheckpointError(f"{source}: made on a base with a tensor {name}, which its base does not have")
        check_values(name, tensors[name](), values, source)


def tower_tensors(source: str, vision: Any) -> Tensors:
    """The vision model's tensors of a CLIP tower folder or hub name, by neutral names."""
    tensors = {
        compat.neutral_tower(name): load
        for name, load in open_weights(source).items()
        if not name.startswith(_OTHER_CLIP_PARTS) and not is_computed(name)
    }
    compare(shapes_of(tensors), _shapes_by(transformers.AutoModel, vision, compat.neutral_tower), source)
    return tensors


def first_difference(one: Tensors, other: Tensors) -> str | None:
    """The first tensor that differs between two towers; one may be rounded to the other's precision, as llava's are."""
    for name, load in one.items():
        pair = load(), other[name]() if name in other else torch.empty(0)
        narrow = min((tensor.dtype for tensor in pair), key=lambda dtype: torch.finfo(dtype).bits)
        if not torch.equal(*(tensor.to(narrow) for tensor in pair)):
            return name
    return None
