"""LLaVA's unmodified train.py in LLaVA's own environment: equal to the last bit with the package and without it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from canary.environments import ROOT, Environment

STEPS = 3


def train(environment: Environment, name: str, **env: str) -> tuple[list[float], str]:
    """Train a tiny model; its losses and a digest of its weights."""
    out = environment.folder / "runs" / name
    environment.run(environment.python, "-m", "canary.pinned", environment.folder / "data", out, **_paths(), **env)
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS, f"{len(losses)} losses, not {STEPS}"
    weights = sorted([*out.glob("*.safetensors"), *out.glob("pytorch_model*.bin")])
    assert weights, f"no weights in {out}"
    return losses, hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()


def same(one: tuple[list[float], str], other: tuple[list[float], str] | None) -> str:
    """What they have in common.

    Raises:
        AssertionError: they differ, or the other run failed.
    """
    assert other is not None, "the run without the package failed"
    assert one[0] == other[0], f"losses {one[0]}, not {other[0]}"
    assert one[1] == other[1], "the weights differ"
    return f"losses {one[0]} and weights equal"


def _paths() -> dict[str, str]:
    return {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def _main(data: Path, out: Path) -> None:
    """Inside the environment: the suite's tiny model and flags, LLaVA's script."""
    import os

    import tiny_train
    from quickstart.fileset import FileSet

    if not (data / "v1.json").exists():
        data.mkdir(parents=True, exist_ok=True)
        tiny_train.make_data(data)
    files = FileSet.at(data / "set", tiny_train.VISION["image_size"])
    # That torch has no float16 convolution on a CPU, and LLaVA's tower is of that type unless bf16 is asked for.
    flags = tiny_train.arguments((data, files), 2, out, STEPS, bf16=True)
    os.execv(sys.executable, [sys.executable, str(tiny_train.TRAIN), *flags])


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
