"""One of two ranks that train one step: `python -m … FOLDER RANK`; rank 1 has no region."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_patch import AuxiliaryProbe, patch
from tests.support.auxiliary import regions
from tests.support.models import IMAGE, Host, hf_model

WEIGHT, RATE = 0.5, 0.1


def prepared():
    """Model, handle, and each rank's batch."""
    model = hf_model().train()
    handle = patch(model, probe=AuxiliaryProbe(weight=WEIGHT))
    handle.anatomy.tower.requires_grad_(False)
    host = Host("hf", model)
    samples = [[(3, IMAGE, 5), (4,), (2, IMAGE, 4)], [(2, IMAGE, 3), (6,)]]
    batches = [host.batch(s, labels=True, seed=i).inputs for i, s in enumerate(samples)]
    batches[0]["rprobe"] = regions(host)
    return model, handle, batches


def main(folder: Path, rank: int) -> None:
    """Train a step under DDP; the logged means and the weights go into files of the folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, handle, batches = prepared()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    parallel(**batches[rank]).loss.backward()
    torch.optim.SGD(trained, RATE).step()
    (folder / f"logs-{rank}.json").write_text(json.dumps(handle.auxiliary.take_logs()))
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, folder / f"weights-{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
