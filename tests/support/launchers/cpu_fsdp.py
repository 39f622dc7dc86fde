"""Runs a training script under FSDP on the CPU: `cpu_fsdp.py SCRIPT ...`.

torch's FSDP and FSDP2 run there; only what accelerate takes for granted of a GPU stands in their way (`--use_cpu` is no
way out: it switches FSDP off). Nothing here touches llava_patch, llava or what FSDP does with weights.
"""

import contextlib
import os
import runpy
import sys

import torch
import transformers.training_args as training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp._flat_param import FlatParamHandle

_after_init = FullyShardedDataParallelPlugin.__post_init__


def _set_device(self: PartialState) -> None:
    self.device = torch.device("cpu")


def _without_broadcast(self: FullyShardedDataParallelPlugin) -> None:
    """Ranks here start from equal weights, whose broadcast would ask for a GPU."""
    os.environ["FSDP_SYNC_MODULE_STATES"] = "false"
    _after_init(self)


def install() -> None:
    """Let FSDP take the CPU for its device, in this process."""
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = _set_device
    FullyShardedDataParallelPlugin.__post_init__ = _without_broadcast
    # It would move nothing, and free the storage that what is saved is a view of.
    FlatParamHandle.to_cpu = lambda self: contextlib.nullcontext()
    training_args.is_torch_bf16_gpu_available = lambda *args, **kwargs: True
    torch.cuda.synchronize = lambda *args, **kwargs: None


if __name__ == "__main__":
    from rank import leave

    install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    leave()
