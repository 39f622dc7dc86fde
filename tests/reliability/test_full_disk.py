"""A disk that takes no more: one error with path and advice, exit code 1, and nothing that is written in half."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - its cache is no file of ours
import pytest
import torch

from llava_patch.cli.main import main
from tests.support import fileset
from tests.support.models import needs_hf

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
    needs_hf()
    return fileset.write_hf(tmp_path_factory.mktemp("full") / "model")


def run(words: list[str], limit: int, folder: Path) -> tuple[int, str]:
    """(exit code, stderr) of a command in a fork of this process that may write no file beyond a size."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error, as on a full disk
        os.chdir(folder)
        os.environ["LLAVA_PATCH_CACHE"] = str(folder / "cache")
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            said = open(folder / name, "w")  # noqa: SIM115 - it stays
            os.dup2(said.fileno(), 1 if stream is sys.stdout else 2)
            setattr(sys, name, said)
        sys.argv = ["llava-patch", *words]
        torch.set_num_threads(1)
        code = 0
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            sys.stderr.flush()
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join(300)
    return process.exitcode, (folder / "stderr").read_text()


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_error_and_nothing_is_half_written(name: str, model: Path, tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    words, limit = COMMANDS[name]
    code, stderr = run(
        [str(model) if word == "MODEL" else word for word in words] + ["--output", "out"], limit, tmp_path
    )
    said = [line for line in stderr.splitlines() if line.startswith("llava-patch: ")]
    assert code == 1 and len(said) == 1 and "Traceback" not in stderr, stderr[-2000:]
    assert "cannot be written" in said[0] and ("name another folder" in said[0] or "with room" in said[0]), said
    assert "unexpected" not in said[0] and str(limit) not in said[0]
    for path in (tmp_path / "out").rglob("*"):
        assert not path.name.startswith(".") and path.stat().st_size < limit, path
        if path.suffix == ".json":
            json.loads(path.read_text())
