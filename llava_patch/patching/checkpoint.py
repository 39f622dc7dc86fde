"""Our part of a checkpoint: settings, added weights, and a fingerprint of the base model.

A full checkpoint is what the host itself saves: our modules are part of its state dict and the settings part of its
config. An adapter folder holds only what was added or trained (safetensors), the settings with the fingerprint
(json), and the base's configuration and tokenizer files, so that the host's own loaders open it; the start-up hook
sends them on to the base.
"""

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_patch.core.errors import CheckpointError, SilentFusionWarning, refuse
from llava_patch.core.files import check_space, staged, storage_errors, write_text
from llava_patch.core.hub import OPTIONS, adapter_folder
from llava_patch.core.records import (
    ADAPTER,
    CONFIG_KEY,
    FULL,
    LORA_FILE,
    SETTINGS_FILE,
    UNFINISHED,
    WEIGHTS_FILE,
    base_of,
    check_weights,
    find_base,
    read_settings,
    write_settings,
)
from llava_patch.core.stored import check_values, first_unknown, read_object, read_tensors
from llava_patch.core.weights import WEIGHT_FORMATS, nothing_at, open_weights, read_file
from llava_patch.hosts import compat, lora, storage, zero
from llava_patch.hosts.anatomy import when_loaded
from llava_patch.patching import model_card
from llava_patch.patching.handle import Handle, get_handle
from llava_patch.patching.keys import base_fingerprint, check_as_loaded, check_fingerprint
from llava_patch.patching.patch import patch
from llava_patch.patching.vocabulary import names_of_ends, resize_for, resized
from llava_patch.settings.methods import from_record

logger = logging.getLogger("llava_patch")

PEFT_CONFIG = "adapter_config.json"
_TOWER = "vision_tower."
_LAST = {SETTINGS_FILE: None, "config.json": json.dumps({CONFIG_KEY: UNFINISHED})}
"""What makes a folder a checkpoint, with what stands there while files are replaced."""
_WHOLE = tuple(
    pattern
    for stem, suffix in WEIGHT_FORMATS
    for pattern in (f"{stem}.{suffix}", f"{stem}-[0-9]*-of-[0-9]*.{suffix}", f"{stem}.{suffix}.index.json")
)
_WEIGHTS = (WEIGHTS_FILE, *_WHOLE)
"""Patterns of the files of weights that a save of the whole model takes the place of."""
_SIDE_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip


def adapter_tensors(handle: Handle) -> dict[str, Tensor]:
    """What an adapter holds: the side branch, the projector, everything that trains, and a resized vocabulary.

    {state-dict name: tensor on the CPU}, in the model's own shapes and dtypes.
    """
    model = handle.model
    kept = {id(p) for p in (*handle.added_parameters(), *handle.anatomy.projector.parameters(), *resized(model))}
    training = {id(p) for p in handle.training_parameters()}
    if handle.trained_tower and handle.anatomy.vision_model is not None:
        kept |= {id(p) for p in handle.anatomy.vision_model.parameters()}  # trained in this run or an earlier one
    trained = set(handle.trainable())
    tensors = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in training or not (id(parameter) in kept or name in trained):
            continue
        if parameter.is_floating_point():  # quantised weights are the base's
            with zero.gathered([parameter]):
                value = zero.whole(storage.value(model, name).detach())
                tensors[zero.plain_name(name)] = value.to("cpu").clone().contiguous()
    return tensors


def save(
    handle: Handle,
    directory: str | os.PathLike[str],
    form: str = "adapter",
    base: str = "",
    measured: Mapping[str, Any] | None = None,
) -> Path:
    """Save a patched model.

    Args:
        handle: the patch.
        directory: folder to write. A new one appears at once; in an earlier save's, files are replaced when all are
            on the disk. With weights that DeepSpeed ZeRO-3 or FSDP2 has partitioned, every rank must call this
            (gathering is collective) and the first one writes.
        form: "adapter": only what was added or trained, with a pointer to the base; "full": everything.
        base: what an adapter is to name as its base, a hub name where others are to load it; "": where the model came
            from.
        measured: what was measured on the model, by name, for the model card.

    Returns:
        The folder.

    Raises:
        CheckpointError: the handle was removed, an unknown form, or an adapter without a base to point at, or whose
            model is not that base any more (LoRA merged into it), or a folder that holds another checkpoint.
        StorageError: the disk or folder does not take it.
    """
    _check_can_save(handle, form)
    folder = Path(directory)
    named, base = base, getattr(handle.model.config, "_name_or_path", "") or ""
    record = {**handle.settings(), "form": form}
    if form == FULL:
        _check_folder(folder, form)
        state = storage.whole_state(handle.anatomy.model)
        size = sum(p.numel() * p.element_size() for p in handle.anatomy.model.parameters())
        check_space(folder, size, "the model")
        with staged(folder, _LAST, _WEIGHTS) as new:
            handle.anatomy.model.save_pretrained(new, state_dict=state)
            _complete(handle, base, folder, new)
            model_card.write(handle, new, folder, form, named or base, measured)
            write_settings(new, record, weights=new)
        return folder
    base = _base_of(base, folder)
    _check_folder(folder, form)
    tensors = adapter_tensors(handle)
    _check_tensors(handle, tensors)
    record["base"] = named or base
    record["fingerprint"] = base_fingerprint(handle.model, set(tensors))
    if zero.is_partitioned(handle.model.parameters()) and torch.distributed.get_rank() != 0:
        return folder  # every rank gathers, the first one writes
    check_as_loaded(handle.anatomy, record["fingerprint"], base)
    check_space(folder, sum(t.nbytes for t in tensors.values()), "the adapter")
    config: Any = copy.deepcopy(handle.model.config)
    config.use_cache = True  # training scripts switch it off while they train
    with staged(folder, _LAST) as new:
        config.save_pretrained(new)
        path = new / "config.json"
        values = read_object(path)
        if values.pop("quantization_config", None) is not None:  # the base's files say how they are quantised
            write_text(path, json.dumps(values, indent=2) + "\n")
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        _complete(handle, base, folder, new)
        model_card.write(handle, new, folder, form, named or base, measured)
        write_settings(new, record, weights=new / WEIGHTS_FILE)
    return folder


def _complete(handle: Handle, base: str, folder: Path, new: Path) -> None:
    """Put what a host's loaders need beside the weights into a `new` folder that is to become `folder`."""
    _copy_side_files(base, folder, new)
    handle.fit_files(new)


def _check_tensors(handle: Handle, tensors: Mapping[str, Tensor]) -> None:
    """Say what an adapter of most of the model, or of weights that are not finite, means."""
    size = sum(t.numel() for t in tensors.values())
    whole = sum(zero.numel(p) for p in handle.model.parameters())
    if size > whole // 2:
        logger.warning(
            "the adapter holds %.0f %% of the model, because requires_grad is set on that much: if all of it was "
            'trained, save with form="full"; if not, switch requires_grad off where nothing trains, before',
            100 * size / whole,
        )
    check_values(tensors, "the adapter is not saved")


def _check_folder(folder: Path, form: str) -> None:
    """Refuse a folder in which a save of this form would spoil a checkpoint that is none of ours, or a whole one."""
    with storage_errors(folder):
        if (folder / PEFT_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} holds an adapter of peft ({PEFT_CONFIG}), which the host would put onto what is saved: "
                "save to another folder"
            )
        held = next((path for pattern in _WHOLE for path in folder.glob(pattern)), None)
    if held is None:
        return
    config = folder / "config.json"
    ours = (folder / SETTINGS_FILE).is_file() or (config.is_file() and CONFIG_KEY in read_object(config))
    if form == ADAPTER or not ours:
        what = "a whole checkpoint" if ours else "a checkpoint without a patch"
        raise CheckpointError(f"{folder} holds {what} ({held.name}), which would be lost: save to another folder")


def _check_can_save(handle: Handle, form: str) -> None:
    merged = lora.changed(handle.model)
    against = {
        "this patch was removed from its model: there is nothing to save": not handle.active,
        f'form = {form!r}: expected "adapter" or "full"': form not in ("adapter", "full"),
        "the model carries LoRA layers, which an adapter of ours could not bring back: merge them first "
        "(merge_and_unload), or save with peft and LLaVA's own files": lora.has_lora(handle.anatomy.model),
        f"LoRA was merged into {merged} (merge_and_unload), whose quantised weights an adapter does not hold: save "
        'with form="full"': form == "adapter" and merged is not None,
        'the weights are partitioned (DeepSpeed ZeRO-3, FSDP), where form="full" is not available: save with '
        "trainer.save_model() (stage3_gather_16bit_weights_on_model_save in the DeepSpeed config; FULL_STATE_DICT in "
        "FSDP's)": form == "full" and zero.is_partitioned(handle.model.parameters()),
        "FSDP holds the weights in flat pieces: save inside `FullyShardedDataParallel.summon_full_params(model, "
        "writeback=False, rank0_only=True)`, which all ranks enter, on the first rank": (zero.in_pieces(handle.model)),
    }
    refuse(against, CheckpointError)


def _base_of(name: str, folder: Path) -> str:
    """The base that an adapter in `folder` is to point at: where its model came from, or that adapter's own base."""
    record = read_settings(name) if name else None
    base = base_of(name, record) if record is not None and record.get("form") == ADAPTER else name
    if not base:
        raise CheckpointError('the model does not say where it was loaded from: save it with form="full"')
    if os.path.isdir(base) and os.path.realpath(base) == os.path.realpath(folder):
        raise CheckpointError(f"{folder} is the base model's own folder: save the adapter elsewhere")
    return base


def _lies_on(folder: Path, base: str) -> bool:
    """Whether a folder holds no earlier adapter, or one on the same base."""
    try:
        record = read_settings(folder)
    except CheckpointError:  # which is replaced now
        return False
    if record is None or record.get("form") != ADAPTER:
        return True
    return os.path.realpath(find_base(folder, record) or "") == os.path.realpath(base)


def _copy_side_files(base: str, folder: Path, new: Path) -> None:
    """Copy the base's tokenizer and processor files, but for those that an earlier save, or the host, has put there."""
    from transformers.utils import cached_file

    keep = _lies_on(folder, base)  # they may have been changed there
    for name in _SIDE_FILES:
        if (new / name).exists():
            continue
        if (folder / name).is_file() and keep:
            shutil.copyfile(folder / name, new / name)
            continue
        try:
            found = cached_file(base, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            found = None  # the base has no such file: which of these exist depends on the host
        if found:
            shutil.copyfile(found, new / name)


def load(model: nn.Module, directory: str | os.PathLike[str], **hub: Any) -> Handle:
    """Apply a saved adapter to a base model that is already in memory.

    Args:
        model: the base, patched with the same settings or not at all.
        directory: a folder written by `save`, or the name of one on the Hugging Face hub.
        hub: where that name is looked up: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`.

    Returns:
        The model's handle.

    Raises:
        CheckpointError: no settings file, another base, a missing tensor or one of another shape, dtype or save, or
            that is not finite.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"load(model, directory) takes the base model itself, not {model!r}: load that one first")
    if unknown := first_unknown(hub, OPTIONS):
        raise CheckpointError(f"load(model, directory) has no argument {unknown!r}: expected some of {OPTIONS}")
    folder = Path(adapter_folder(os.fspath(directory), **hub))
    record = read_settings(folder)
    if record is None:
        if not folder.is_dir():
            raise nothing_at(os.fspath(directory))
        raise CheckpointError(f"{folder}: no {SETTINGS_FILE} here; was it saved with handle.save()?")
    if record.get("form") != ADAPTER:
        raise CheckpointError(f"{folder}: a full checkpoint; open it with the host's own from_pretrained")
    source, had_patch = folder / WEIGHTS_FILE, get_handle(model) is not None
    tensors = read_tensors(source, advice=": copy the folder again, or save again")
    check_values(tensors, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SilentFusionWarning)  # its weights follow
        handle = patch(model, **from_record(record, str(folder / SETTINGS_FILE)))
    try:
        base = record["fingerprint"]
        tower = {n: v for n, v in base.items() if "vision_tower" in n}  # which `llava` may load later
        check_fingerprint(handle.model, {n: v for n, v in base.items() if n not in tower}, folder)
        when_loaded(handle.anatomy, handle._undo, lambda _: check_fingerprint(handle.model, tower, folder))
        handle.trained_tower |= bool(record.get("trained_tower"))
        if handle.anatomy.vision_model is None:
            _put_into_tower(handle, tensors, source)
            tensors = {n: t for n, t in tensors.items() if not _is_of_tower(n)}
        missing = sorted(set(adapter_names(handle)) - set(tensors))
        if missing:
            raise CheckpointError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all)")
        ends = names_of_ends(handle.model)  # may be of another length
        check_names(handle.model, {n: t for n, t in tensors.items() if n not in ends}, source)
        check_weights(record, source)
        resize_for(handle.model, tensors)
        _make_floating(handle, tensors)
        copy_by_name(handle.model, tensors, source)
    except BaseException:
        if not had_patch:
            handle.remove()
        raise
    return handle


def adapter_names(handle: Handle) -> list[str]:
    """Names of the tensors that a patch adds, which an adapter must hold."""
    wanted = {id(p) for p in handle.added_parameters() if p.is_floating_point()}
    return [n for n, p in handle.model.named_parameters() if id(p) in wanted]


def _make_floating(handle: Handle, tensors: Collection[str]) -> None:
    """Dequantise the layers whose weights an adapter brings: they were trained, and are kept as they were."""
    for name in storage.quantised_parameters(handle.model) & set(tensors):
        layer = name.removesuffix(".weight")
        storage.dequantise(handle.model, handle.anatomy.norm.weight.dtype, handle._undo, layer)


def copy_by_name(owner: nn.Module, tensors: Mapping[str, Tensor], source: Any, what: str = "the model") -> None:
    """Put tensors into a module's parameters of the same names; CheckpointError: there is none, or of another shape."""
    for name, tensor in check_names(owner, tensors, source, what).items():
        storage.put(owner, name, tensor)


def check_names(
    owner: nn.Module, tensors: Mapping[str, Tensor], source: Any, what: str = "the model"
) -> Mapping[str, Tensor]:
    """Tensors by the names of a module's parameters; CheckpointError: there is none, or of another shape."""
    parameters = dict(owner.named_parameters())
    tensors = compat.as_here(tensors, parameters)
    for name, tensor in tensors.items():
        if name not in parameters:
            raise CheckpointError(f"{source}: {what} has no tensor {name}")
        shape = tuple(zero.shape(parameters[name]))
        if shape != tensor.shape:
            raise CheckpointError(f"{source}: {name} has shape {tuple(tensor.shape)}, {what}'s has {shape}")
    return tensors


# --- `llava` loads its vision tower after the model, from the tower's own checkpoint ----------------------------------


def _is_of_tower(name: str) -> bool:
    return f"model.{_TOWER}" in name


def _put_into_tower(handle: Handle, tensors: Mapping[str, Tensor], source: Path | str) -> bool:
    """Put those of a model's tensors that are a `llava` tower's into it, now or once the host has loaded it.

    What is not among them stays. Returns whether there are any.

    Modifications: while the tower is not loaded yet, its instance attribute `load_model`.
    """
    given = {name.split(_TOWER, 1)[1]: tensor for name, tensor in tensors.items() if _is_of_tower(name)}

    def copy_now(_: Any) -> None:
        tower = handle.anatomy.tower
        buffers = dict(tower.named_buffers())  # position numbers, which some versions save
        wanted = {n: t for n, t in compat.as_here(given, buffers).items() if n not in buffers}
        copy_by_name(tower, wanted, source, "the vision tower")

    if given:
        when_loaded(handle.anatomy, handle._undo, copy_now)
    return bool(given)


def restore_tower(handle: Handle, folder: Path | str) -> None:
    """Bring back trained vision-tower weights from a full checkpoint; CheckpointError where it holds none."""
    if not handle.anatomy.tower_apart:
        return  # the tower is part of HF's state dict and was loaded with it
    tensors = {name: load() for name, load in open_weights(str(folder)).items() if _is_of_tower(name)}
    if not _put_into_tower(handle, tensors, folder):
        raise CheckpointError(f"{folder}: its vision tower was trained, but the checkpoint holds no tower weights")


def restore_tower_beside_lora(handle: Handle, source: str, required: bool = True) -> None:
    """Bring back trained vision-tower weights from the file that LLaVA's LoRA script saves beside the adapter.

    LLaVA's own loader reads that file before there is a tower, and loses them without a word. They need not be there
    (`required`) when the base brought trained ones of its own; else CheckpointError.
    """
    from transformers.utils import cached_file

    if not source:
        raise CheckpointError(
            "the vision tower was trained, but the configuration does not say beside which checkpoint its weights lie: "
            "load it with from_pretrained, or set config._name_or_path"
        )
    path = cached_file(source, LORA_FILE, _raise_exceptions_for_missing_entries=False)
    tensors = {tensor.name: tensor() for tensor in read_file(Path(path), whole=True)} if path else {}
    if not _put_into_tower(handle, tensors, f"{source}/{LORA_FILE}") and required:
        lacks = "holds no tower weights" if path else "is missing"
        raise CheckpointError(f"{source}: its vision tower was trained, but {LORA_FILE} {lacks}")
