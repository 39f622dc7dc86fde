"""A tiny LLaVA-1.5 on disk and short runs of LLaVA's unmodified train.py on it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.support.models import multiplies
from tests.support.release import write_fileset

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
TRAIN = Path(importlib.util.find_spec("llava").submodule_search_locations[0]) / "train" / "train.py"

HALVES = multiplies(torch.float16)
"""Without --bf16 LLaVA's script runs its tower in float16, which older versions of torch (2.1) do not have on the CPU."""


def make_data(root):
    """Write a tiny LLaVA-1.5's files, 64 images and both stages' conversations; returns what `arguments` takes."""
    files = write_fileset(root / "set", vision=VISION, text=TEXT, vocab_size=512)
    rng = np.random.default_rng(0)
    plain, chat = [], []
    for i in range(64):
        Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(root / f"{i}.png")
        answer = str(rng.integers(100, 999))
        plain.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "Read.\n<image>"}, {"from": "gpt", "value": answer}]})  # fmt: skip
        row = {"id": str(i), "conversations": [
            {"from": "human", "value": "<image>\nWhat is the number?"}, {"from": "gpt", "value": answer}]}  # fmt: skip
        if i % 8 == 7:
            row["conversations"][0]["value"] = "What is a number?"
        else:
            row["image"] = f"{i}.png"
        chat.append(row)
    (root / "plain.json").write_text(json.dumps(plain))
    (root / "v1.json").write_text(json.dumps(chat))
    return root, files


def arguments(data, stage, out, steps=3, **extra):
    """Flags of a run; extra ones replace the defaults, and None leaves one out."""
    root, files = data
    values = {
        "model_name_or_path": files.language_model, "image_folder": root, "vision_tower": files.tower,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "output_dir": out, "num_train_epochs": 1, "max_steps": steps,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1,
        "evaluation_strategy": "no", "save_strategy": "steps", "save_steps": 1000, "save_total_limit": 1,
        "weight_decay": 0.0, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "logging_steps": 1,
        "model_max_length": 512, "gradient_checkpointing": True, "dataloader_num_workers": 0, "lazy_preprocess": True,
        "report_to": "none", "use_cpu": True, "bf16": not HALVES, "learning_rate": 1e-3,
    }  # fmt: skip
    if stage == 1:
        values |= {"version": "plain", "data_path": root / "plain.json", "tune_mm_mlp_adapter": True}
    else:
        values |= {
            "version": "v1", "data_path": root / "v1.json", "image_aspect_ratio": "pad",
            "group_by_modality_length": True, "pretrain_mm_mlp_adapter": files.projector,
        }  # fmt: skip
    values |= extra
    return [text for k, v in values.items() if v is not None for text in (f"--{k}", str(v))]


def run(command, **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", **env}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    return done


def ok(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def losses(out):
    history = json.loads((Path(out) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
