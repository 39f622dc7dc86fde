"""A script of TRL that knows nothing of llava_patch under DeepSpeed ZeRO-2 and ZeRO-3: two ranks, bf16."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_patch import get_handle
from tests.support import hf_train
from tests.support.models import needs_hf
from tests.support.paths import LAUNCHERS, ROOT

from .test_deepspeed import ZERO2, ZERO3

pytest.importorskip("deepspeed")


@pytest.mark.timeout(400)
def test_the_documented_script_trains_alike_in_both_stages(tmp_path, record_property):
    needs_hf()
    root, base = hf_train.write_rows(tmp_path)
    script = tmp_path / "sft.py"
    script.write_text(re.search(r"```python\n(# sft\.py.*?)```", (ROOT / "docs/training.md").read_text(), re.S)[1])
    flags = {"bf16": True, "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 1, "logging_steps": 1,
             "save_strategy": "no", "report_to": "none", "gradient_checkpointing": False}  # fmt: skip
    environment = {**os.environ, "LLAVA_PATCH_GIN_PARAM": "Routing.split = 4", "OMP_NUM_THREADS": "1"}
    losses, weights = {}, {}
    for name, zero in (("2", ZERO2), ("3", ZERO3)):
        config, out = tmp_path / f"zero{name}.json", tmp_path / f"run{name}"
        config.write_text(json.dumps(zero))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [LAUNCHERS / "cpu_deepspeed.py", script, base, root / "rows.json", out, "--deepspeed", config]
        command += [word for k, v in flags.items() for word in (f"--{k}", v)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=180)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert done.stdout.count("parameters train") == 1
        losses[name] = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
        model = LlavaForConditionalGeneration.from_pretrained(out)  # under ZeRO-3 files may have names of their own
        assert get_handle(model).routing.split == 4
        weights[name] = model.state_dict()
    assert len(losses["2"]) == 3
    record_property("figure", f"losses {losses['2']} in stage 2, {losses['3']} in stage 3")
    assert losses["3"] == pytest.approx(losses["2"], rel=2**-8)  # the same arithmetic in parts: roundings of bf16
    before = LlavaForConditionalGeneration.from_pretrained(base).state_dict()
    same = {n for n, t in weights["3"].items() if n in before and torch.equal(t.bfloat16(), before[n].bfloat16())}
    moved = set(weights["3"]) - same
    assert moved == {n for n in weights["3"] if ".side_branch." in n}
    for name in moved:
        assert torch.allclose(weights["3"][name].float(), weights["2"][name].float(), atol=2e-2), name
