"""Runs a training script under DeepSpeed on the CPU: `cpu_deepspeed.py SCRIPT ...`.

DeepSpeed itself runs there; only checks and calls that take a GPU for granted stand in its way (`--use_cpu` is no way
out: it switches DeepSpeed off). Nothing here touches llava_patch, llava or what DeepSpeed does with weights.
"""

import runpy
import sys

import torch

torch.cuda.synchronize = lambda *args, **kwargs: None  # LLaVA's final save calls it

import transformers.training_args as training_args  # noqa: E402

training_args.is_torch_bf16_gpu_available = lambda *args, **kwargs: True  # --bf16 asks for a GPU

del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
