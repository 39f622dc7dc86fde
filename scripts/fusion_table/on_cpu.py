"""Runs a training script under DeepSpeed where there is no GPU: `python -m torch.distributed.run … on_cpu.py SCRIPT …`.

`--use_cpu` would switch DeepSpeed off. Without it, two things take a GPU for granted, and both are answered here;
neither touches weights, gradients or the script.
"""

import os
import runpy
import sys

import torch


def without_gpu() -> None:
    """Let LLaVA's final save and DeepSpeed's start pass on a CPU."""
    import deepspeed  # noqa: F401  (loads the module that is changed below)

    torch.cuda.synchronize = lambda *args, **kwargs: None  # LLaVA calls it before it saves
    # DeepSpeed would compile its own all-reduce for CPUs first, for a minute; gloo has one.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


if __name__ == "__main__":
    without_gpu()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written. A rank that takes its interpreter down may abort in gloo's threads, whether or not its
    # groups were destroyed, and takes the others along.
    os._exit(0)
