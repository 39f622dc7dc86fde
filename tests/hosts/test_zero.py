"""Weights that DeepSpeed ZeRO-3 has partitioned (in a process of their own: DeepSpeed's state is the process's)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_patch import Routing, patch
from llava_patch.core.errors import SettingError
from tests.support.paths import LAUNCHERS, ROOT

pytest.importorskip("deepspeed")


@pytest.mark.timeout(180)
def test_patching_training_saving_and_loading_partitioned_weights(tmp_path):
    script = Path(__file__).with_name("zero3_process.py")
    folders = [ROOT, LAUNCHERS, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    assert "every check passed" in done.stdout, done.stderr[-4000:]


def test_what_partitioned_weights_cannot_have_is_named(host):
    next(host.model.parameters()).ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(SettingError, match=r'by DeepSpeed ZeRO-3.*Routing.split = "auto" is not: use stage 2'):
        patch(host.model, routing=Routing(split="auto"))
