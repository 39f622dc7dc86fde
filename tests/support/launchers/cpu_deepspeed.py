"""Runs a training script under DeepSpeed on the CPU: `cpu_deepspeed.py SCRIPT ...`.

DeepSpeed itself runs there; only checks and calls that take a GPU for granted stand in its way (`--use_cpu` is no way
out: it switches DeepSpeed off). Nothing here touches llava_patch, llava or what DeepSpeed does with weights.
"""

import runpy
import sys

import deepspeed  # noqa: F401
import torch
import transformers.training_args as training_args
from accelerate.state import PartialState
from rank import leave

torch.cuda.synchronize = lambda *args, **kwargs: None  # LLaVA's final save calls it
training_args.is_torch_bf16_gpu_available = lambda *args, **kwargs: True  # --bf16 asks for a GPU
# Newer versions of accelerate take ranks without an accelerator for one process, unless the CPU is asked for.
_prepare = PartialState._prepare_backend
PartialState._prepare_backend = lambda self, cpu=False, *args, **kwargs: _prepare(self, True, *args, **kwargs)
# It would compile a faster all-reduce for CPUs, which takes a minute. (deepspeed.comm.torch as a name is torch itself.)
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

if __name__ == "__main__":
    del sys.argv[0]
    script = next(argument for argument in sys.argv if not argument.startswith("-"))  # after deepspeed's --local_rank
    sys.argv.remove(script)
    sys.argv.insert(0, script)
    runpy.run_path(script, run_name="__main__")
    leave()
