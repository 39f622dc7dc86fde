"""Reads what a checkpoint folder is: host, form, settings, added tensors, base, and what its settings let train."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from llava_patch.core import records
from llava_patch.core.errors import CheckpointError, LlavaPatchError
from llava_patch.core.weights import (
    StoredTensor,
    folder_of,
    read_file,
    read_files,
    read_json,
    same_values,
    weight_files,
)
from llava_patch.hosts import compat, configs
from llava_patch.hosts.anatomy import LLAVA
from llava_patch.hosts.host import is_computed
from llava_patch.integrations.training.stage1 import PROJECTOR
from llava_patch.settings.methods import from_dict, from_record, to_dict
from llava_patch.tools.inspect.result import KINDS, Added, Inspection, Match, Share

_RUN_FILES = ("llava_patch_operative.gin", "trainer_state.json", "llava_patch_adapter")
_VALUES = 4  # of a matrix that are compared
_ROLES = {"decoder.side_branch": "side branch", "stack": "second projector", "projector": "projector", "tower": "tower"}


def inspect_checkpoint(folder: str | os.PathLike[str], base: str = "") -> Inspection:
    """Read a checkpoint's files; no weights are loaded.

    Args:
        folder: a checkpoint of either host, an adapter, LLaVA's LoRA files, or a stage-1 folder; a hub name where the
            model is on this machine.
        base: likewise, the model below, to compare with; "": what the adapter's record names.

    Raises:
        CheckpointError: no folder, no checkpoint in it, or a damaged one; names the file.
    """
    given = os.fspath(folder)
    source = folder_of(given)
    base = base and folder_of(base, setting="--base")
    files = configs.look(source)
    record = files.record or {}
    if not files.host and not record and not (Path(source) / f"{PROJECTOR}.bin").is_file():
        raise CheckpointError(
            f"{source}: not a checkpoint, it holds neither {records.SETTINGS_FILE} nor config.json nor {PROJECTOR}.bin"
            ": name the folder that has one of them"
        )
    host = files.host or LLAVA
    form, own = _form(Path(source), record)
    if record:
        from_record(record, source)  # refuses a newer format
    # Every field of every method: what an older version did not write down yet has its default.
    settings = {kind: to_dict(from_dict(record[kind], source)) if record.get(kind) else None for kind in KINDS}
    below = base or (records.find_base(source, record) or record["base"] if record.get("base") else None)
    tensors = read_files(own, whole=True)
    if form in (records.ADAPTER, records.FULL):
        records.check_weights(record, own[0] if form == records.ADAPTER else Path(source))
    trained_tower = bool(record.get("trained_tower"))
    added = [Added(t.name, t.shape, t.dtype, t.parameters, role(t.name, host)) for t in tensors]
    if form not in ("adapter", "lora", "projector"):
        ours = {"side branch", "second projector", "projector" * bool(settings["fusion"]), "tower" * trained_tower}
        added = [tensor for tensor in added if tensor.role in ours]
    stage1 = []
    for path in sorted([*Path(source).glob(f"{PROJECTOR}.bin"), *Path(source).glob(f"checkpoint-*/{PROJECTOR}.bin")]):
        shapes = ["x".join(map(str, t.shape)) for t in read_file(path, whole=True) if t.name.endswith("weight")]
        stage1.append(f"{path.relative_to(source)}: {', '.join(shapes)}")
    versions = {"transformers": files.config.get("transformers_version"), "settings of format": record.get("format")}
    return Inspection(
        checkpoint=given,
        host=files.host or None,
        form=form,
        settings=settings,
        trained_tower=trained_tower,
        parameters=sum(t.parameters for t in tensors if not is_computed(t.name)),
        weight_bytes=sum(path.stat().st_size for path in own),
        added=added,
        base=below,
        match=_match(below, host, record.get("fingerprint"), tensors, form) if below else None,
        share=_share(files, form, settings, added, below),
        stage1=stage1,
        versions={name: str(value) for name, value in versions.items() if value is not None},
        files=[name for name in _RUN_FILES if (Path(source) / name).exists()],
    )


def _form(folder: Path, record: dict[str, Any]) -> tuple[str, list[Path]]:
    if record.get("form") == "adapter":
        path = folder / records.WEIGHTS_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: {records.WEIGHTS_FILE} is missing, which {records.SETTINGS_FILE} goes with"
            )
        return "adapter", [path]
    if (folder / "adapter_config.json").is_file():
        names = ("adapter_model.safetensors", "adapter_model.bin", records.LORA_FILE)
        found = [folder / name for name in names if (folder / name).is_file()]
        if not any(p.name.startswith("adapter_model") for p in found):
            raise CheckpointError(f"{folder}: adapter_config.json without adapter_model.safetensors or .bin")
        return "lora", found
    whole = weight_files(os.fspath(folder))
    if whole:
        return "full", whole
    projector = folder / f"{PROJECTOR}.bin"
    return ("projector", [projector]) if projector.is_file() else ("settings", [])


def role(name: str, host: str) -> str:
    """Which part of a patched model a tensor belongs to."""
    plain = configs.files_of(host).neutral(name.removeprefix("base_model.model."))
    if "lora_" in name:
        return "LoRA"
    for prefix, part in _ROLES.items():
        if plain is not None and plain.startswith(f"{prefix}."):
            return part
    return "decoder"


def _share(
    files: configs.CheckpointFiles, form: str, settings: dict[str, Any], added: list[Added], base: str | None
) -> Share:
    """From the configuration alone: the patched model is built without weights, and says itself what trains."""
    if form == "lora":
        whole = _parameters_of(base) if base else None
        parts = Counter[str]()
        for tensor in added:
            parts[tensor.role] += tensor.parameters
        note = "what the LoRA files hold" + ("" if whole else "; the whole is not known without --base")
        return Share(parts.total(), whole, dict(parts), note)
    if not files.host:
        return Share(None, None, note="not known: the folder has no config.json")
    if not any(settings.values()):
        return Share(None, None, note="decided by the training script: a stock checkpoint")
    try:
        methods = {k: from_dict(v, files.source) for k, v in settings.items() if v and k != "probe"}
        return _count(files.config, files.host, methods, stage1=form == "projector")
    except LlavaPatchError as error:
        return Share(None, None, note=f"not known: {error}")


def _count(config: dict[str, Any], host: str, methods: dict[str, Any], stage1: bool) -> Share:
    """Patch the model without its weights and ask what trains.

    Where the settings say nothing it is as in LLaVA's stage 2: the vision tower is frozen, in `stage1` the decoder too.
    """
    from llava_patch.patching.patch import patch  # seconds, which a stock checkpoint does not need

    model = configs.skeleton(config, host)
    handle = patch(model, **methods, loading=True)
    vision = handle.anatomy.vision_model
    if vision is not None and handle.fusion is None:
        vision.requires_grad_(False)
    if stage1:
        handle.anatomy.decoder.requires_grad_(False)
        handle.anatomy.lm_head.requires_grad_(False)
        for parameter in handle.adapter_parameters():  # llava's projector hangs in the decoder
            parameter.requires_grad_(True)
    handle.apply_freeze()
    trains = set(handle.trainable())
    parts = Counter[str]()
    for name, parameter in model.named_parameters():
        if name in trains:
            parts[role(name, host)] += parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    note = f"what the settings leave trainable in stage {1 if stage1 else 2}"
    return Share(parts.total(), total, dict(parts), note)


def _parameters_of(base: str) -> int | None:
    """Of the whole model: llava's own files lack the vision tower, which the configuration names."""
    try:
        files = configs.read(base)
        return sum(parameter.numel() for parameter in configs.skeleton(files.config, files.host).parameters())
    except LlavaPatchError:
        pass
    found = weight_files(base)
    return sum(tensor.parameters for tensor in read_files(found, whole=True)) if found else None


def _match(
    base: str, host: str, fingerprint: dict[str, list[float]] | None, own: list[StoredTensor], form: str
) -> Match:
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
    below = {_neutral(t.name, below_host): t for t in read_files(files, whole=True)}
    if fingerprint is None:
        compare = {"full": _against_own, "lora": _under_lora}.get(form)
        return compare(below, host, own) if compare else Match(None, 0, 0, "these files record no base")
    if below_host != host:  # which pads its embeddings in another way, so that recorded places are other places
        return Match(None, 0, 0, "it is a checkpoint of the other host: llava-patch convert makes one to compare with")
    tower: dict[str, StoredTensor] = {}
    if below_host == LLAVA:  # whose tower lies in a folder of its own
        place = (read_json(base, "config.json") or {}).get("mm_vision_tower", "")
        paths = weight_files(place) if os.path.isdir(place) else []
        tower = {compat.neutral_tower(t.name): t for t in read_files(paths, whole=True)}
    below |= tower
    differing, lacking, away = [], [], 0
    for name, values in fingerprint.items():
        plain = _neutral(name, host)
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
        there = below.get(_neutral(tensor.name, host))
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
        plain = _neutral(name, host)
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


def _neutral(name: str, host: str) -> str:
    """A tensor's name in the neutral spelling, which both hosts share; one that is not known stays as it is."""
    return configs.files_of(host).neutral(name) or name
