"""GPU, precision, CPU, memory and disk."""

import os
import shutil

from llava_patch.core.paths import VARIABLE, cache_folder
from llava_patch.core.terminal import counted
from llava_patch.tools.doctor import NOTE, OK, Row

SEVEN_B = 14.1
"""GB that LLaVA-1.5-7B needs in half precision: 7.06 billion parameters of 2 bytes."""
LITTLE_DISK = 10.0


def check_device() -> list[Row]:
    """GPUs, what precision they can do, and whether 7B fits."""
    import torch

    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "no GPU that this torch can use"
        return [
            Row("GPU", f"none ({why})", NOTE, "training a 7B model needs one; measuring and inspecting do not"),
            Row("precision", "float32", advice="on a CPU half precision is slow: leave --dtype out (float32)"),
        ]
    rows = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        size = about.total_memory / 1e9
        found = f"{about.name}, {size:.0f} GB, compute capability {about.major}.{about.minor}"
        small = size <= SEVEN_B * 1.15
        advice = f"7B in half precision needs about {SEVEN_B:.0f} GB and some room" if small else ""
        rows.append(Row(f"GPU {number}" if number else "GPU", found, NOTE if small else OK, advice))
    capability, state = torch.cuda.get_device_capability(), NOTE
    found, advice = "float32", "this GPU is slow in half precision: --fp16 False --bf16 False"
    if capability >= (8, 0) and torch.cuda.is_bf16_supported():
        found, state, advice = "bfloat16", OK, "train with --bf16 True --tf32 True; --dtype bfloat16 to measure"
    elif capability >= (7, 0):
        found = "float16 (no bfloat16 in hardware)"
        advice = "train with --fp16 True instead of LLaVA's --bf16 True, without --tf32 True; attention: sdpa"
    return [*rows, Row("precision", found, state, advice)]


def check_memory() -> list[Row]:
    """CPU threads, main memory and whether a 7B model fits."""
    import torch

    from llava_patch.core import memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    idle = threads < cores
    advice = f"OMP_NUM_THREADS holds torch to {threads} of {cores} cores" if idle else ""
    rows = [Row("CPU", f"{counted(cores, 'core')}, {counted(threads, 'thread')}", NOTE if idle else OK, advice)]
    size = memory.machine_memory()
    if size is None:
        return rows
    state, fits = NOTE, f"a 7B model needs about {SEVEN_B:.0f} GB in half precision"
    if size / 1e9 >= SEVEN_B * 2.3:
        state, fits = OK, "7B fits, in float32 too"
    elif size / 1e9 >= SEVEN_B * 1.15:
        fits = f"7B fits in half precision ({SEVEN_B:.0f} GB: --dtype bfloat16), not in float32 ({2 * SEVEN_B:.0f} GB)"
    return [*rows, Row("memory", f"{size / 1e9:.0f} GB", state, fits)]


def check_disk() -> Row:
    """The cache folder, what it holds, and the room around it."""
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free / 1e9
    found = f"{folder}: {size / 1e9:.2f} GB; {free:.0f} GB free on its disk"
    advice = f"little room for R-Probe's tokens: set {VARIABLE} to a larger disk" if free < LITTLE_DISK else ""
    if not os.access(there, os.W_OK):
        advice = f"cannot be written, so that nothing is kept: set {VARIABLE} to another folder"
    return Row("cache", found, NOTE if advice else OK, advice)
