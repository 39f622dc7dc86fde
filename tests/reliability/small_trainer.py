"""A training script of standard Python, in milliseconds: writes, and goes on from, checkpoints as a Trainer does.

In place, file by file, trainer_state.json last; a newest checkpoint that is not whole ends it, as it ends a stock one.
With --evaluated it stands for lmms-eval.
"""

import argparse
import hashlib
import json
import shutil
import struct
import sys
import time
import zipfile
from pathlib import Path

STEPS, PAUSE = 6, 0.002


def tensors(path: Path, value: float) -> None:
    """A safetensors file of one number, in two writes."""
    header = json.dumps({"weight": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    with path.open("wb", buffering=0) as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        time.sleep(PAUSE)
        stream.write(struct.pack("<d", value))


def pickled(path: Path) -> None:
    """A file in the outer form of torch's."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 99)
        time.sleep(PAUSE)


def text(path: Path, value: object) -> None:
    """JSON in two writes."""
    words = json.dumps(value).encode()
    with path.open("wb", buffering=0) as stream:
        stream.write(words[: len(words) // 2])
        time.sleep(PAUSE)
        stream.write(words[len(words) // 2 :])


def train(output: Path, seed: int, words: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    history: list[dict] = []
    step = 0
    value = float(int(hashlib.md5(f"{seed} {words}".encode()).hexdigest()[:6], 16))
    folders = sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    if folders:
        state = json.loads((folders[-1] / "trainer_state.json").read_text())  # raises as the Trainer does
        step, history = state["global_step"], state["log_history"]
        value = struct.unpack("<d", (folders[-1] / "model.safetensors").read_bytes()[-8:])[0]
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            zipfile.ZipFile(folders[-1] / name).close()
    while step < STEPS:
        time.sleep(0.01)
        step, value = step + 1, value / 2 + 1
        history.append({"step": step, "loss": value})
        if step % 2 == 0:
            folder = output / f"checkpoint-{step}"
            folder.mkdir(exist_ok=True)
            tensors(folder / "model.safetensors", value)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                pickled(folder / name)
            text(folder / "trainer_state.json", {"global_step": step, "max_steps": STEPS, "log_history": history})
            for old in output.glob("checkpoint-*"):
                if old != folder:
                    shutil.rmtree(old)
    text(output / "trainer_state.json", {"global_step": step, "max_steps": STEPS, "log_history": history})
    tensors(output / "model.safetensors", value)


def evaluate(trained: Path, output: Path) -> None:
    value = struct.unpack("<d", (trained / "model.safetensors").read_bytes()[-8:])[0]
    folder = output / "model"
    folder.mkdir(parents=True, exist_ok=True)
    text(folder / f"{time.time_ns()}_results.json", {"results": {"pope": {"acc,none": value, "f1,none": value / 2}}})


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--gin_file", "--gin_param"):
        parser.add_argument(flag, action="append", default=[])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--evaluated", type=Path)
    parser.add_argument("--output_path", type=Path)
    options = parser.parse_args()
    if options.evaluated is not None:
        evaluate(options.evaluated, options.output_path)
    else:
        train(options.output_dir, options.seed, " ".join(options.gin_param))


if __name__ == "__main__":
    sys.exit(main())
