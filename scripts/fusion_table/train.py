"""The launch commands: LLaVA's unmodified train.py, ZeRO-2, two CPU ranks, the same flags for every arm."""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from quickstart.data import TrainingData
from quickstart.fileset import FileSet, write_atomically

from .arms import Arm

ON_CPU = Path(__file__).with_name("on_cpu.py")
RANKS = 2
AUTO = "auto"
# LLaVA's scripts/zero2.json, in float32: on a CPU half precision is slower.
ZERO2 = {
    "fp16": {"enabled": AUTO},  # without them the Trainer would hand on images in half precision
    "bf16": {"enabled": AUTO},
    "train_micro_batch_size_per_gpu": AUTO,
    "train_batch_size": AUTO,
    "gradient_accumulation_steps": AUTO,
    "zero_optimization": {
        "stage": 2, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": AUTO,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What all arms share.

    Attributes:
        steps: optimiser steps of stage 1 and stage 2.
        learning_rates: of stage 1 and stage 2.
        batch_size: samples a step, over all ranks.
        seed: of new weights and the order of the data.
    """

    steps: tuple[int, int] = (32, 160)
    learning_rates: tuple[float, float] = (2e-3, 1e-3)
    batch_size: int = 64
    seed: int = 42

    def __post_init__(self):
        if self.batch_size % RANKS or min(self.batch_size, *self.steps) < 1:
            raise ValueError(f"{self}: steps and batch size must be positive, the latter a multiple of {RANKS}")


def llava_train() -> Path:
    """LLaVA's train.py as it is installed.

    Raises:
        SystemExit: it is not.
    """
    spec = importlib.util.find_spec("llava")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the llava package is not installed: run scripts/fusion_table.sh, which installs it")
    return Path(spec.submodule_search_locations[0]) / "train" / "train.py"


def write_zero2(out: Path) -> Path:
    """DeepSpeed's configuration as a file; returns its path."""
    path = out / "zero2.json"
    write_atomically(path, (json.dumps(ZERO2, indent=2) + "\n").encode())
    return path


def command(arm: Arm, stage: int, recipe: Recipe, base: Path, arm_folder: Path, zero2: Path) -> list[str]:
    """The whole launch command of one stage.

    Args:
        arm: what to train.
        stage: 1 (a new projector alone) or 2 (everything).
        recipe: what all arms share.
        base: the small file set with its data.
        arm_folder: gets stage1/ and llava-stage2/.
        zero2: DeepSpeed's configuration.
    """
    files, data = FileSet.at(base), TrainingData.at(base)
    flags = {
        "deepspeed": zero2, "model_name_or_path": files.language_model, "image_folder": data.images,
        "vision_tower": files.tower, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "bf16": False, "num_train_epochs": 1,
        "max_steps": recipe.steps[stage - 1], "per_device_train_batch_size": recipe.batch_size // RANKS,
        "gradient_accumulation_steps": 1, "evaluation_strategy": "no", "save_strategy": "no",
        "learning_rate": recipe.learning_rates[stage - 1], "weight_decay": 0.05, "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine", "logging_steps": 1, "model_max_length": 2048, "gradient_checkpointing": False,
        "dataloader_num_workers": 0, "lazy_preprocess": True, "report_to": "none", "log_level": "info",
        "output_dir": stage_folder(arm_folder, stage),
    }  # fmt: skip
    if stage == 1:
        flags |= {"version": "plain", "data_path": data.plain, "tune_mm_mlp_adapter": True}
    else:
        flags |= {
            "version": "v1", "data_path": data.v1, "image_aspect_ratio": "pad", "group_by_modality_length": True,
            "pretrain_mm_mlp_adapter": stage_folder(arm_folder, 1) / "mm_projector.bin",
        }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    # The seed through gin for plain LLaVA too: its script makes the new projector before it seeds anything.
    bindings = [f"Flags.seed = {recipe.seed}", *arm.parameters(stage)]
    gin = [word for binding in bindings for word in ("--gin_param", binding)]
    return [*launcher, str(ON_CPU), str(llava_train()), *words, *gin]


def environment() -> dict[str, str]:
    """One thread a rank: two ranks fill the two cores that this is made for."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_DISABLED": "true",
        "DS_ACCELERATOR": "cpu",
    }


def stage_folder(arm_folder: Path, stage: int) -> Path:
    """Where a stage writes; the second's name has "llava" in it, as llava's loader wants."""
    return arm_folder / ("stage1" if stage == 1 else "llava-stage2")
