"""Short runs of Hugging Face's Trainer on a tiny model with Skip-Links, with dropout in tower and decoder."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llava_patch import SkipLinks, patch
from tests.support.models import HF_IMAGE_TOKEN, hf_model

STEPS = 6


class Pages(torch.utils.data.Dataset):
    """Random images, each with a few words of its own."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(3, 90, (3 + index % 4,), generator=generator)
        return {"pixels": torch.randn(3, 56, 56, generator=generator), "words": words}


def collate(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to the longest; labels on the words alone."""
    longest = max(len(one["words"]) for one in records)
    ids = torch.zeros(len(records), 16 + longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    ids[:, :16] = HF_IMAGE_TOKEN
    for row, one in enumerate(records):
        n = len(one["words"])
        ids[row, 16 : 16 + n] = labels[row, 16 : 16 + n] = one["words"]
    pixels = torch.stack([one["pixels"] for one in records])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels, "labels": labels}


def model(dropout: float = 0.1, **fusion: Any) -> nn.Module:
    """A patched model whose tower trains."""
    made = hf_model().train()
    for module in made.modules():
        if hasattr(module, "attention_dropout"):  # the decoder's attention
            module.attention_dropout = dropout
        elif type(module).__name__ == "CLIPAttention":
            module.dropout = dropout
    _count_calls(made.model.multi_modal_projector)
    # With new columns at zero nothing would come through the taps in the first step.
    patch(made, fusion=SkipLinks(**{"stride": 2, "detach": 0, "train_tower": "all", **fusion}), zero_start=False)
    return made


def _count_calls(module: nn.Module) -> None:
    """Its forward then changes buffers, in place and by another tensor, and draws Python's and NumPy's numbers."""
    module.register_buffer("calls", torch.zeros(()))
    module.register_buffer("drawn", torch.zeros(()))

    def count(module: nn.Module, args: Any) -> None:
        module.calls += 1
        module.drawn = module.drawn + random.random() + np.random.rand()

    module.register_forward_pre_hook(count)


def trainer(out: Path, made: nn.Module | None = None, **more: Any) -> Any:
    """A Trainer that takes STEPS steps; keyword arguments go into its TrainingArguments."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # an earlier Trainer's precision would stay in force
    AcceleratorState._reset_state(reset_partial_state=True)
    made = model() if made is None else made
    values = {"per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": 1, "learning_rate": 3e-3,
              "report_to": "none", "use_cpu": True, "remove_unused_columns": False, "save_strategy": "no",
              "disable_tqdm": True, "weight_decay": 0.1, **more}  # fmt: skip
    arguments = TrainingArguments(str(out), **values)
    return Trainer(made, arguments, train_dataset=Pages(), data_collator=collate)


def history(made: Any) -> list[tuple[float, ...]]:
    """What a Trainer logged of each step: loss, gradient norm and learning rate."""
    return [(e["loss"], e["grad_norm"], e["learning_rate"]) for e in made.state.log_history if "loss" in e]
