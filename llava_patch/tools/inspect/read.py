"""What a checkpoint folder is: host, form, settings, added tensors, base, and what its settings leave trainable."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError, LlavaPatchError
from llava_patch.core.records import CONFIG_KEY
from llava_patch.core.weights import read_json
from llava_patch.hosts import configs
from llava_patch.hosts import tensor_names as names
from llava_patch.hosts.anatomy import LLAVA
from llava_patch.integrations.training.stage1 import PROJECTOR
from llava_patch.patching import checkpoint as patched
from llava_patch.patching.tower_weights import LORA_FILE
from llava_patch.settings.methods import from_dict, from_record, to_dict
from llava_patch.tools.inspect.base import Match, match_base
from llava_patch.tools.inspect.headers import Tensor, read_header, read_headers, weight_files
from llava_patch.tools.inspect.place import folder_of

KINDS = ("fusion", "routing", "pruning", "probe")
FORMS = {
    "full": "a full checkpoint",
    "adapter": "an adapter: what was added or trained, over its base",
    "lora": "LLaVA's LoRA files; load them with the base (model_base, --base)",
    "projector": "a stage-1 projector; give it to stage 2 with --pretrain_mm_mlp_adapter and these settings",
    "settings": "settings and configuration without weights",
}
_ROLES = {"decoder.side_branch": "side branch", "stack": "second projector", "projector": "projector", "tower": "tower"}


@dataclass(frozen=True)
class Added:
    """One tensor that the patch added, widened or trained.

    Attributes:
        name: in the file.
        shape: its shape.
        dtype: torch's name of its type.
        parameters: how many values it has.
        role: "side branch", "projector", "second projector", "tower", "LoRA" or "decoder".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    role: str


@dataclass(frozen=True)
class Share:
    """What the settings leave trainable.

    Attributes:
        trainable: parameters.
        total: parameters of the whole model, vision tower included.
        by_part: trainable parameters by role.
        note: how it was found, or why it is not known (both numbers are then None).
    """

    trainable: int | None
    total: int | None
    by_part: dict[str, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found.

    Attributes:
        checkpoint: the folder.
        host: "llava" or "hf"; None where the folder does not say.
        form: one of `FORMS`.
        settings: by kind ("fusion", "routing", ...) every field of the settings; None: no such method.
        trained_tower: whether the vision tower's weights are not the original ones.
        parameters: values in the folder's own weight files.
        weight_bytes: size of these files.
        added: tensors of the patch.
        base: the model below, by record or --base; None for a full checkpoint without --base.
        match: how that base compares; None where there is none.
        share: what the settings leave trainable.
        stage1: files of LLaVA's stage 1.
        versions: what wrote it, as far as it is recorded.
        files: further files of a training run that lie there.
    """

    checkpoint: str
    host: str | None
    form: str
    settings: dict[str, dict[str, Any] | None]
    trained_tower: bool
    parameters: int
    weight_bytes: int
    added: list[Added]
    base: str | None
    match: Match | None
    share: Share
    stage1: list[str]
    versions: dict[str, str]
    files: list[str]

    @property
    def is_patched(self) -> bool:
        """Whether it carries a patch of ours."""
        return any(value is not None for value in self.settings.values()) or self.trained_tower

    def methods(self) -> dict[str, Any]:
        """The settings dataclasses by kind, the methods that last beyond training."""
        chosen = {k: v for k, v in self.settings.items() if v is not None and k != "probe"}
        return {k: from_dict(v, self.checkpoint) for k, v in chosen.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": 1, "patched": self.is_patched, **dataclasses.asdict(self)}


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
    config = read_json(source, "config.json")
    record = patched.read_settings(source) or (config or {}).get(CONFIG_KEY)
    if config is None and record is None and not (Path(source) / f"{PROJECTOR}.bin").is_file():
        raise CheckpointError(
            f"{source}: not a checkpoint, it holds neither {patched.SETTINGS_FILE} nor config.json nor {PROJECTOR}.bin"
        )
    host = LLAVA if config is None else configs.host_of(config, source)
    form, own = _form(Path(source), record or {})
    settings = _settings(record or {}, source)
    below = base or (record or {}).get("base")
    tensors = read_headers(own)
    share = _share(source, host, config, form, settings, tensors, below)
    match = None
    if below:
        fingerprint = (record or {}).get("fingerprint")
        match = match_base(below, host, fingerprint, tensors, form)
    return Inspection(
        checkpoint=given,
        host=host if config is not None else None,
        form=form,
        settings=settings,
        trained_tower=bool((record or {}).get("trained_tower")),
        parameters=sum(t.parameters for t in tensors if not names.is_computed(t.name)),
        weight_bytes=sum(path.stat().st_size for path in own),
        added=_added(tensors, form, host, settings, bool((record or {}).get("trained_tower"))),
        base=below,
        match=match,
        share=share,
        stage1=_stage1(Path(source)),
        versions=_versions(config or {}, record or {}),
        files=[
            n
            for n in ("llava_patch_operative.gin", "trainer_state.json", "llava_patch_adapter")
            if (Path(source) / n).exists()
        ],
    )


def _form(folder: Path, record: dict[str, Any]) -> tuple[str, list[Path]]:
    """The form, and the files that hold the folder's own weights."""
    if record.get("form") == "adapter":
        path = folder / patched.WEIGHTS_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: {patched.WEIGHTS_FILE} is missing, which {patched.SETTINGS_FILE} goes with"
            )
        return "adapter", [path]
    if (folder / "adapter_config.json").is_file():
        found = [
            p for n in ("adapter_model.safetensors", "adapter_model.bin", LORA_FILE) if (p := folder / n).is_file()
        ]
        if not any(p.name.startswith("adapter_model") for p in found):
            raise CheckpointError(f"{folder}: adapter_config.json without adapter_model.safetensors or .bin")
        return "lora", found
    whole = weight_files(os.fspath(folder))
    if whole:
        return "full", whole
    projector = folder / f"{PROJECTOR}.bin"
    return ("projector", [projector]) if projector.is_file() else ("settings", [])


def _settings(record: dict[str, Any], source: str) -> dict[str, dict[str, Any] | None]:
    """Every field of every method: what an older version did not write down yet has its default."""
    if record:
        from_record(record, source)  # refuses a newer format
    return {kind: to_dict(from_dict(record[kind], source)) if record.get(kind) else None for kind in KINDS}


def role(name: str, host: str) -> str:
    """Which part of a patched model a tensor belongs to."""
    plain = names.neutral(name.removeprefix("base_model.model."), host)
    if "lora_" in name:
        return "LoRA"
    for prefix, part in _ROLES.items():
        if plain is not None and plain.startswith(f"{prefix}."):
            return part
    return "decoder"


def _added(
    tensors: list[Tensor], form: str, host: str, settings: dict[str, dict[str, Any] | None], tower: bool
) -> list[Added]:
    ours = {"side branch", "second projector"}
    ours |= {"projector"} if settings["fusion"] else set()
    ours |= {"tower"} if tower else set()
    found = [Added(t.name, t.shape, t.dtype, t.parameters, role(t.name, host)) for t in tensors]
    return found if form in ("adapter", "lora", "projector") else [t for t in found if t.role in ours]


def _share(
    source: str,
    host: str,
    config: dict[str, Any] | None,
    form: str,
    settings: dict[str, dict[str, Any] | None],
    tensors: list[Tensor],
    base: str | None,
) -> Share:
    """From the configuration alone: the patched model is built without weights, and says itself what trains."""
    if form == "lora":
        whole = _parameters_of(base) if base else None
        parts: dict[str, int] = {}
        for tensor in tensors:
            part = role(tensor.name, host)
            parts[part] = parts.get(part, 0) + tensor.parameters
        note = "what the LoRA files hold" + ("" if whole else "; the whole is not known without --base")
        return Share(sum(parts.values()), whole, parts, note)
    if config is None:
        return Share(None, None, note="not known: the folder has no config.json")
    if not any(settings.values()):
        return Share(None, None, note="decided by the training script: a stock checkpoint")
    from llava_patch.tools.inspect.share import count

    try:
        methods = {k: from_dict(v, source) for k, v in settings.items() if v and k != "probe"}
        return count(config, host, methods, stage1=form == "projector")
    except LlavaPatchError as error:
        return Share(None, None, note=f"not known: {error}")


def _parameters_of(base: str) -> int | None:
    """Of the whole model: llava's own files lack the vision tower, which the configuration names."""
    from llava_patch.tools.inspect.share import total

    try:
        config = read_json(base, "config.json") or {}
        return total(config, configs.host_of(config, base))
    except LlavaPatchError:
        pass
    files = weight_files(base)
    return sum(t.parameters for t in read_headers(files)) if files else None


def _stage1(folder: Path) -> list[str]:
    found = []
    for path in sorted([folder / f"{PROJECTOR}.bin", *folder.glob(f"checkpoint-*/{PROJECTOR}.bin")]):
        if path.is_file():
            shapes = [t.shape for t in read_header(path) if t.name.endswith("weight")]
            found.append(f"{path.relative_to(folder)}: {', '.join('x'.join(map(str, s)) for s in shapes)}")
    return found


def _versions(config: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    found = {"transformers": config.get("transformers_version"), "settings of format": record.get("format")}
    return {name: str(value) for name, value in found.items() if value is not None}


def to_json(found: Inspection) -> str:
    """The same as `to_dict`, as text."""
    return json.dumps(found.to_dict(), indent=1, default=str)
