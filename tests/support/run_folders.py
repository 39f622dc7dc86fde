"""Checkpoint folders as a Trainer writes them, of a few bytes: nothing there was trained."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def checkpoint(folder: Path, step: int | None = None, **state: Any) -> Path:
    """A full model's; the step is the folder's number."""
    step = int(folder.name.split("-")[-1]) if step is None else step
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(3)}, folder / name)
    (folder / "config.json").write_text("{}")
    values = {"global_step": step, "max_steps": 20, "log_history": [{"step": step, "loss": 1.0}], **state}
    (folder / "trainer_state.json").write_text(json.dumps(values))
    return folder


def sharded(folder: Path) -> Path:
    """With the model in two files."""
    checkpoint(folder)
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file({f"weight{i}": torch.zeros(3)}, folder / name)
    index = {"metadata": {}, "weight_map": {f"weight{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def lora(folder: Path) -> Path:
    """peft's."""
    checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    save_file({"projector": torch.zeros(3)}, folder / "llava_patch_trained.safetensors")
    return folder


def stage1(folder: Path) -> Path:
    """LLaVA's projector alone, with what is kept beside it."""
    checkpoint(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"projector": torch.zeros(3)}, folder / "mm_projector.bin")
    save_file({"projector": torch.zeros(3)}, folder / "llava_patch_trained.safetensors")
    return folder


def deepspeed(folder: Path, ranks: int = 2) -> Path:
    """DeepSpeed's, of several ranks."""
    checkpoint(folder)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
        (folder / name).unlink()
    states = folder / f"global_step{folder.name.split('-')[-1]}"
    states.mkdir()
    torch.save({"module": torch.zeros(3)}, states / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        torch.save({"state": torch.zeros(3)}, states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save({"state": torch.zeros(3)}, folder / f"rng_state_{rank}.pth")
    (folder / "latest").write_text(states.name)
    return folder


def fsdp(folder: Path) -> Path:
    """FSDP's, sharded."""
    checkpoint(folder)
    for name in ("optimizer.pt", "model.safetensors"):
        (folder / name).unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(b"x" * 9)
        (folder / name / ".metadata").write_bytes(b"\x80\x04.")
    return folder


def cut(path: Path, share: float = 0.5) -> Path:
    """Cut a file off."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path
