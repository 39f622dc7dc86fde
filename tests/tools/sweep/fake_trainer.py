"""Stands in for a training script: takes the flags a sweep appends and logs losses that depend on them.

FAKE_FAIL: a split that fails. FAKE_SLEEP: seconds to wait for before the end. FAKE_SCORES: what
the evaluation finds, as JSON. Each call is noted in FAKE_CALLS.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--gin_file", action="append", default=[])
parser.add_argument("--gin_param", action="append", default=[])
parser.add_argument("--seed", type=int)
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--evaluated", type=Path)
parser.add_argument("--output_path", type=Path)
options = parser.parse_args()

with open(os.environ["FAKE_CALLS"], "a") as stream:
    stream.write(" ".join(sys.argv[1:]) + "\n")
if options.evaluated is not None:  # lmms-eval's part
    loss = json.loads((options.evaluated / "trainer_state.json").read_text())["log_history"][-2]["loss"]
    folder = options.output_path / "model"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"alias": "pope", "pope_accuracy,none": 1 - loss / 100, "pope_accuracy_stderr,none": 0.1,
               "pope_f1,none": 0.5}  # fmt: skip
    numbers = json.loads(os.environ.get("FAKE_SCORES") or json.dumps(numbers))
    results = {"results": {"pope": numbers}}
    (folder / f"{time.time_ns()}_results.json").write_text(json.dumps(results))
    sys.exit()

split = next(param.split("=")[1].strip() for param in options.gin_param if param.startswith("Routing.split"))
if os.environ.get("FAKE_FAIL") == split:
    print("first line\nthe reason why", file=sys.stderr)
    sys.exit(3)
options.output_dir.mkdir(parents=True, exist_ok=True)
(options.output_dir / "started").touch()
time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
history = [
    {"step": step, "loss": 100.0 if step <= 10 else int(split) + options.seed} for step in range(1, 1 + options.steps)
]
history.append({"step": options.steps, "train_loss": 1.0})
(options.output_dir / "trainer_state.json").write_text(json.dumps({"log_history": history}))
