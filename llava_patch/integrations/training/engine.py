"""What a run trains with, and what that engine cannot do for a patched model: refused before anything is trained."""

import os
from typing import Any

from llava_patch.core.errors import refuse
from llava_patch.hosts import llava_code, lora
from llava_patch.patching.handle import Handle

_SEQUENCE = ("cp_size", "sp_size")  # of accelerate's ParallelismConfig: ranks that share one sample's tokens


def uses_fsdp(training_args: Any) -> bool:
    """Whether FSDP shards the model: by --fsdp, or by accelerate's configuration, of which the flags know nothing."""
    accelerates = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return bool(getattr(training_args, "fsdp", None)) or accelerates


def flat_parameters(training_args: Any) -> bool:
    """Whether FSDP1 makes one flat parameter of each decoder layer's, for the optimizer too."""
    own = _flags(training_args).get("use_orig_params")
    flat = os.environ.get("FSDP_USE_ORIG_PARAMS", "true").lower() == "false" if own is None else not own
    return flat and not _second(training_args)


def _second(training_args: Any) -> bool:
    own = _flags(training_args).get("fsdp_version")
    return str(os.environ.get("FSDP_VERSION", "1") if own is None else own) == "2"


def _flags(training_args: Any) -> dict[str, Any]:
    """What --fsdp and --fsdp_config say, from transformers 5.0 on; they go before accelerate's environment.

    From 5.10 on --fsdp is FSDP2 where they do not say.
    """
    return getattr(training_args, "fsdp_plugin_args", None) or {}


def check_llavas_script(training_args: Any) -> None:
    """Refuse what LLaVA's own script ends in: a save for which the first rank waits for the others (SettingError)."""
    refuse(
        {
            "FSDP2 (fsdp_version: 2) with LLaVA's script, which gathers the weights for its save on the first rank "
            "alone, where FSDP2 waits for the others: set fsdp_version: 1 in accelerate's configuration (or in the "
            'file of --fsdp_config, {"fsdp_version": 1}; with --fsdp transformers 5.10 and newer take 2), or use '
            "DeepSpeed": uses_fsdp(training_args) and _second(training_args),
        }
    )


def outside(handle: Handle) -> bool:
    """Whether the vision tower lies outside the model, where LLaVA's script puts it for --fsdp."""
    inside = {id(p) for p in handle.model.parameters()}
    return any(id(p) not in inside for p in handle.anatomy.tower.parameters())


def check(handle: Handle, training_args: Any) -> None:
    """Refuse an engine under which this patch would train, or be saved, as something else (SettingError)."""
    parallel = getattr(training_args, "parallelism_config", None)
    shared = next((name for name in _SEQUENCE if (getattr(parallel, name, 1) or 1) > 1), None)
    against = {
        f"parallelism_config.{shared}: ranks that share a sample's tokens each see a part of its image, which a patch "
        "cannot follow: leave it out": shared is not None,
    }
    if uses_fsdp(training_args):
        rates = [n for n in ("tower_lr", "layer_decay", "unfreeze_after") if getattr(handle.fusion, n, None)]
        name = f"{type(handle.fusion).__name__}.{next(iter(rates), '')}"
        against |= {
            "FSDP beside LoRA: peft's and LLaVA's files would get the first rank's part of what trains beside it: use "
            "DDP (torchrun) or DeepSpeed": lora.has_lora(handle.model),
            "FSDP in stage 1 (--tune_mm_mlp_adapter True, or LLaVA-NeXT's --mm_tunable_parts mm_mlp_adapter): LLaVA "
            "saves the projector's tensors as they are on the first rank, in parts: use DDP or DeepSpeed": (
                llava_code.saves_projector_alone(training_args)
            ),
            f"{name} holds gradients back parameter by parameter, which FSDP does not see: use DDP (torchrun) or "
            "DeepSpeed": "unfreeze_after" in rates,
            f"{name} needs optimizer groups, and FSDP without use_orig_params makes one flat parameter of a layer: "
            "set use_orig_params to true in the FSDP config": bool(rates) and flat_parameters(training_args),
        }
    refuse(against)
