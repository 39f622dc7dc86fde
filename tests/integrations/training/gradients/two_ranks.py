"""Two ranks under DDP: `python -m … FOLDER`, with torchrun's variables but RANK.

Each trains twice, without and with the measurement, and writes weights, history and what it printed. The ranks are
forked after the imports, which take longer than the runs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava_patch.integrations.training.gradients import follow
from llava_patch.measurements.gradients.measurement import Gradients

from .training_cases import history, model, trainer

SETTINGS = Gradients(window=2)


def measured_run(folder: Path, **more: Any) -> Any:
    """A run without dropout, so that it does not matter which rank draws which number; its gradients not clipped."""
    made = trainer(folder, model(dropout=0.0), max_grad_norm=0.0, max_steps=2, **more)
    return made, follow(made, SETTINGS)


def run_rank(folder: Path, rank: str) -> None:
    os.environ.update(RANK=rank, LOCAL_RANK=rank)
    printed = os.open(folder / f"printed-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    torch.set_num_threads(1)
    for name, settings in (("plain", None), ("measured", Gradients(window=2))):
        made = trainer(folder / name, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
                       ddp_find_unused_parameters=False)  # fmt: skip
        if settings is not None:
            follow(made, settings)
        made.train()
        weights = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        save_file(weights, folder / f"{name}-{rank}.safetensors")
        (folder / f"{name}-{rank}.json").write_text(json.dumps(history(made)))
    made, _ = measured_run(folder / "joint", per_device_train_batch_size=2)
    made.train()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(folder: Path) -> int:
    """The number of ranks that failed."""
    from transformers import Trainer  # noqa: F401  imported before the fork

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(folder, rank)) for rank in "01"]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return sum(process.exitcode != 0 for process in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
