"""One of two processes that freeze the same pages: `python -m … FOLDER RANK`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from llava_patch.data.pages import Pages
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store import freeze
from llava_patch.measurements.rprobe.store.freeze import Encoder, freeze_samples
from llava_patch.probe.view import make_transform
from tests.support.probes import Characters, processor, tiny_model


class Broke(Exception):
    pass


def main(folder: Path, rank: int) -> None:
    """Share one data set, then fail on another in process 0; what happened goes into files of the folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    freeze.SHARD_IMAGES = 3
    model, calls, failing = tiny_model(), [], []

    def count(module, args, kwargs):
        if failing:
            raise Broke
        calls.append(1)
        time.sleep(0.2)  # so that neither has done all before the other begins

    model.model.vision_tower.register_forward_pre_hook(count, with_kwargs=True)
    anatomy = find(model)
    transform = make_transform(anatomy, processor(), "resize")
    torch.distributed.barrier()
    data = freeze_samples(Encoder(anatomy, transform, Characters()), Pages(10, 56), RProbe())
    assert len(data.batch(torch.arange(10)).counts) == 10
    (folder / f"calls-{rank}").write_text(str(len(calls) - 1))  # one is for the key
    if rank == 0:
        failing.append(True)
    try:
        freeze_samples(Encoder(anatomy, transform, Characters()), Pages(4, 56, seed=1), RProbe())
    except Exception as error:
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
