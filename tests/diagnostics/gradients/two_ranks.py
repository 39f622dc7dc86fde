"""One of two ranks under DDP: `python -m tests.diagnostics.gradients.two_ranks FOLDER`, with torchrun's variables.

Trains twice, without and with the measurement, and writes weights and history of both.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava_patch.diagnostics.gradients import Gradients
from llava_patch.diagnostics.gradients.training import follow

from .training_cases import history, model, trainer

SETTINGS = Gradients(window=2)


def measured_run(folder: Path, **more: Any) -> Any:
    """A run without dropout, so that it does not matter which rank draws which number; its gradients not clipped."""
    made = trainer(folder, model(dropout=0.0), max_grad_norm=0.0, max_steps=2, **more)
    return made, follow(made, SETTINGS)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
