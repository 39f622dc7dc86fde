"""Runs a training script under DeepSpeed on the CPU: `cpu_deepspeed.py SCRIPT ...`.

DeepSpeed itself runs there; only checks and calls that take a GPU for granted stand in its way (`--use_cpu` is no way
out: it switches DeepSpeed off). Nothing here touches llava_patch, llava or what DeepSpeed does with weights.
"""

import importlib.util
import os
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

DEEPSPEED = Path(importlib.util.find_spec("deepspeed").origin).parent
EXTENSIONS = ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch")
# On a CPU DeepSpeed 0.12 asks for Intel's extensions of torch, of which it uses nothing but a backend: here it is gloo.
asked = "\nimport oneccl_bindings_for_pytorch" in (DEEPSPEED / "accelerator" / "cpu_accelerator.py").read_text()
if asked:
    sys.modules.update({name: ModuleType(name) for name in EXTENSIONS})
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "2")}

import deepspeed

if asked:
    for name in EXTENSIONS:  # others, too, would take them for installed
        del sys.modules[name]
    deepspeed.accelerator.get_accelerator()._communication_backend_name = "gloo"

import collectives
import torch
import transformers.training_args as training_args
from accelerate.state import PartialState
from rank import leave

torch.cuda.synchronize = lambda *args, **kwargs: None  # LLaVA's final save calls it
training_args.is_torch_bf16_gpu_available = lambda *args, **kwargs: True  # --bf16 asks for a GPU
training_args.is_torch_tf32_available = training_args.is_torch_bf16_gpu_available
if hasattr(PartialState, "_prepare_backend"):
    # Newer versions of accelerate take ranks without an accelerator for one process, unless the CPU is asked for.
    _prepare = PartialState._prepare_backend
    PartialState._prepare_backend = lambda self, cpu=False, *args, **kwargs: _prepare(self, True, *args, **kwargs)
else:  # older ones: DeepSpeed's ranks for such with GPUs
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    _initialise = deepspeed.comm.init_distributed
    deepspeed.comm.init_distributed = lambda *args, **kwargs: _initialise(*args, **kwargs | {"dist_backend": "gloo"})
    collectives.install()
    sys.modules["deepspeed.comm.torch"].get_coalescing_manager = lambda *args: nullcontext()
# It would compile a faster all-reduce for CPUs, which takes a minute. (deepspeed.comm.torch as a name is torch itself.)
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

if __name__ == "__main__":
    del sys.argv[0]
    script = next(argument for argument in sys.argv if not argument.startswith("-"))  # after deepspeed's --local_rank
    sys.argv.remove(script)
    sys.argv.insert(0, script)
    runpy.run_path(script, run_name="__main__")
    leave()
