"""The projector that LLaVA's stage 1 saves (mm_projector.bin), read for stage 2 and compared with its fusion."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_patch.core import records, stored
from llava_patch.core.errors import CheckpointError, refuse
from llava_patch.core.undo import meanwhile
from llava_patch.core.weights import read_file
from llava_patch.fusion.base import TRAINING, differs
from llava_patch.settings import active
from llava_patch.settings.methods import from_record

PROJECTOR = "mm_projector"

pending: dict[int, tuple[bool, dict[str, Any] | None]] = {}
"""What `initialize_vision_modules` learned and the patch, applied when the Trainer is made, needs, by the decoder's id.

Whether the projector is a new one, and tensors of a stage-1 file that only the widened projector can take.
"""


def initialize_vision_modules(original: Callable[..., Any], decoder: Any, model_args: Any, fsdp: Any) -> Any:
    """LLaVA's method of this name, in training: a fused projector's file is kept for the patch that comes later."""
    asked, path = active.configuration(), model_args.pretrain_mm_mlp_adapter
    projector = None
    if path is not None:
        fusion = None if asked is None else asked.fusion
        record = records.config_record(decoder.config)
        if fusion is None and record:
            fusion = from_record(record, "config.json").get("fusion")
        projector = check_projector(path, fusion)
    if asked is None or not asked.patches:
        return original(decoder, model_args, fsdp)
    fresh = getattr(decoder, "mm_projector", None) is None and path is None
    fused = False  # whether the stock layer cannot hold it: it is loaded once the projector is widened
    if projector is not None:
        first = next((projector[n] for n in (f"{PROJECTOR}.0.weight", f"{PROJECTOR}.weight") if n in projector), None)
        if first is None:
            raise CheckpointError(f"projector file without a first Linear; it holds {sorted(projector)}")
        fused = first.shape[1] != tower_width(decoder, model_args) or _has_stack(projector)
    with meanwhile(model_args, pretrain_mm_mlp_adapter=None if fused else path):
        original(decoder, model_args, fsdp)
    pending[id(decoder)] = fresh, projector if fused else None


def _has_stack(projector: dict[str, Any]) -> bool:
    return not all(name.startswith(f"{PROJECTOR}.") for name in projector)


def check_projector(path: str, fusion: Any) -> dict[str, Any]:
    """Read LLaVA's stage-1 file and compare it with the fusion of this run.

    Returns the tensors by their names in the decoder. The settings that it was trained with lie beside it, if
    llava_patch was there. CheckpointError: no such file, no projector in it, or another fusion's; detach and what
    trains may differ.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"--pretrain_mm_mlp_adapter {path}: no such file")
    try:
        tensors = {tensor.name: tensor() for tensor in read_file(Path(path), whole=True)}
    except CheckpointError as error:
        raise CheckpointError(
            f"--pretrain_mm_mlp_adapter {error}: run stage 1 again, or take its last checkpoint's"
        ) from error
    stored.check_values({k: v for k, v in tensors.items() if PROJECTOR in k}, path)
    # "model.mm_projector.0.weight", or "base_model.model.model.mm_projector.0.weight" after LoRA
    projector = {k[k.index(PROJECTOR) :]: v for k, v in tensors.items() if PROJECTOR in k}
    if not any(k.startswith(f"{PROJECTOR}.") for k in projector):
        raise CheckpointError(f"--pretrain_mm_mlp_adapter {path}: holds no mm_projector tensors")
    folder = os.path.dirname(path)
    record = records.read_settings(folder or ".")
    there = None if record is None else from_record(record, folder).get("fusion")
    against = {
        f"--pretrain_mm_mlp_adapter {path} was trained with {there}, but this run has {fusion or 'no fusion'}: give it "
        "the same settings (--gin_file, --gin_param)": (
            there is not None and differs(fusion, there, (*TRAINING, "detach"))
        ),
        f"--pretrain_mm_mlp_adapter {path} holds DeepStack's projector, but this run has no fusion: give it the "
        "settings that it was trained with (--gin_file, --gin_param)": fusion is None and _has_stack(projector),
    }
    refuse(against, CheckpointError)
    return projector


def tower_width(decoder: Any, model_args: Any) -> int:
    """Channels of the vision tower, which may not be built yet."""
    tower = decoder.get_vision_tower()
    if tower is not None:
        return int(tower.hidden_size)
    from transformers import CLIPVisionConfig

    from llava_patch.hosts.towers import layout as towers
    from llava_patch.hosts.towers import models as tower_models

    config = tower_models.read_config(model_args.vision_tower)
    return towers.shape_of(config or CLIPVisionConfig.from_pretrained(model_args.vision_tower)).width


def load(anatomy: Any, projector: dict[str, Any], fusion: Any) -> None:
    """Put a stage-1 file's tensors into a fused model of the same shapes; DeepSpeed ZeRO-3 may have partitioned it."""
    from llava_patch.hosts import zero

    modules = {n: m for n, m in anatomy.projector_owner.named_children() if n.startswith(PROJECTOR)}
    parameters = {f"{n}.{k}": p for n, m in modules.items() for k, p in m.named_parameters()}
    expected = {k: tuple(zero.shape(p)) for k, p in parameters.items()}
    given = {k: tuple(v.shape) for k, v in projector.items()}
    if expected != given:
        raise CheckpointError(
            f"--pretrain_mm_mlp_adapter holds a projector of shapes {given}, but {fusion or 'no fusion'} "
            f"makes {expected}: use the fusion settings that it was trained with"
        )
    zero.copy_values(parameters, projector)
