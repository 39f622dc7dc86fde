"""What an inspection found, in words and as JSON."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from llava_patch.settings.methods import from_dict

KINDS = ("fusion", "routing", "pruning", "probe")
FORMS = {
    "full": "a full checkpoint",
    "adapter": "an adapter: what was added or trained, over its base",
    "lora": "LLaVA's LoRA files; load them with the base (model_base, --base)",
    "projector": "a stage-1 projector; give it to stage 2 with --pretrain_mm_mlp_adapter and these settings",
    "settings": "settings and configuration without weights",
}


@dataclass(frozen=True)
class Added:
    """One tensor that the patch added, widened or trained."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's name of its type
    parameters: int  # how many values it has
    role: str  # "side branch", "projector", "second projector", "tower", "LoRA" or "decoder"


@dataclass(frozen=True)
class Share:
    """What the settings leave trainable."""

    trainable: int | None  # parameters
    total: int | None  # parameters of the whole model, vision tower included
    by_part: dict[str, int] = field(default_factory=dict)  # trainable parameters by role
    note: str = ""  # how it was found, or why it is not known (both numbers are then None)


@dataclass(frozen=True)
class Match:
    """How a base compares."""

    same: bool | None  # whether it is the right one; None: cannot be told
    compared: int  # matrices that were compared, by a few values each
    differing: int  # how many of them differ
    note: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found."""

    checkpoint: str  # the folder
    host: str | None  # "llava" or "hf"; None where the folder does not say
    form: str  # one of `FORMS`
    # By kind ("fusion", "routing", ...) every field of the settings; None: no such method.
    settings: dict[str, dict[str, Any] | None]
    trained_tower: bool  # whether the vision tower's weights are not the original ones
    parameters: int  # values in the folder's own weight files
    weight_bytes: int  # size of these files
    added: list[Added]  # tensors of the patch
    base: str | None  # the model below, by record or --base; None for a full checkpoint without --base
    match: Match | None  # how that base compares; None where there is none
    share: Share  # what the settings leave trainable
    stage1: list[str]  # files of LLaVA's stage 1
    versions: dict[str, str]  # what wrote it, as far as it is recorded
    files: list[str]  # further files of a training run that lie there

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


def facts_of(found: Inspection) -> list[tuple[str, str]]:
    """The inspection's single facts, as text."""
    hosts = {"llava": "the original llava package", "hf": "Hugging Face's LlavaForConditionalGeneration", None: "?"}
    patch = [f"{kind}: {values['method']}" for kind, values in found.settings.items() if values]
    patch += ["vision tower: trained"] if found.trained_tower else []
    word = {True: "yes", False: "NO", None: "not known"}
    share = found.share
    trains = share.note
    if share.trainable is not None:
        whole = f" of {share.total:,} parameters ({100 * share.trainable / share.total:.2f} %)" if share.total else ""
        parts = ", ".join(f"{part} {count:,}" for part, count in share.by_part.items())
        trains = f"{share.trainable:,}{whole}: {parts or 'nothing'} ({share.note})"
    rows = [
        ("checkpoint", found.checkpoint),
        ("host", hosts[found.host]),
        ("form", FORMS[found.form]),
        ("patch", "; ".join(patch) or "none: a stock checkpoint"),
        ("weights", f"{found.parameters:,} parameters in its own files, {found.weight_bytes / 1e6:,.1f} MB"),
        ("trainable", trains),
        ("base", found.base or ""),
        ("base matches", "" if found.match is None else f"{word[found.match.same]}: {found.match.note}"),
        ("stage-1 files", "\n".join(found.stage1)),
        ("written by", ", ".join(f"{name} {value}" for name, value in found.versions.items())),
        ("of its run", ", ".join(found.files)),
    ]
    return [(name, text) for name, text in rows if text]
