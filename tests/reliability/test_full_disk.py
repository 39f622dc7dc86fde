"""A disk that takes no more: one error with path and advice, exit code 1, and nothing that is written in half."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import fileset
from tests.support.paths import ROOT

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error, as on a full disk
limit = int(sys.argv[1])
sys.argv = ["llava-patch", *sys.argv[2:]]
import matplotlib.font_manager  # its cache is no file of ours
from llava_patch.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
main()
"""
COMMANDS = {
    "saturation": (["saturation", "MODEL", "--samples", "2"], 2_000),
    "drift": (["drift", "MODEL", "--base", "MODEL", "--samples", "2"], 2_000),
    "gradients": (
        ["gradients", "MODEL", "--steps", "4", "--batch-size", "1", "--window", "2", "--gin-param",
         "SkipLinks.stride = 1", "--gin-param", "SkipLinks.detach = 0"],
        400,
    ),
    "rprobe": (
        ["rprobe", "MODEL", "--train-pages", "4", "--heldout-pages", "2", "--steps", "2", "--gin-param",
         "RProbe.store = False"],
        4_000,
    ),
    "rprobe's store": (
        ["rprobe", "MODEL", "--train-pages", "4", "--heldout-pages", "2", "--steps", "2"], 4_000,
    ),
    "report": (["report", "MODEL", "--only", "saturation"], 1_500),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fileset.write_hf(tmp_path_factory.mktemp("full") / "model")


def run(words: list[str], limit: int, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLAVA_PATCH_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    code = [sys.executable, "-c", LIMITED, str(limit), *words]
    return subprocess.run(code, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_error_and_nothing_is_half_written(name: str, model: Path, tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    words, limit = COMMANDS[name]
    done = run([str(model) if word == "MODEL" else word for word in words] + ["--output", "out"], limit, tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("llava-patch: ")]
    assert done.returncode == 1 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "cannot be written" in said[0] and ("name another folder" in said[0] or "with room" in said[0]), said
    assert "unexpected" not in said[0] and str(limit) not in said[0]
    for path in (tmp_path / "out").rglob("*"):
        assert not path.name.startswith(".") and path.stat().st_size < limit, path
        if path.suffix == ".json":
            json.loads(path.read_text())
