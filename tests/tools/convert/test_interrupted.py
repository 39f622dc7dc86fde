"""A conversion that is killed, meets another one, or has no room leaves nothing that can be taken for a checkpoint."""

import hashlib
import os
import random
import shutil
import signal
import sys

import pytest

from llava_patch.core.errors import BusyError, StorageError
from llava_patch.core.locks import output_lock
from llava_patch.core.weights import open_weights
from llava_patch.tools.convert.command import convert
from tests.support import fileset

KILLS = 20


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "config.json"  # it names the folder itself
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny llava checkpoint, and what its conversion is."""
    root = tmp_path_factory.mktemp("interrupted")
    fileset.llava_model(root / "tower").save_pretrained(root / "llava")
    fileset.tokenizer().save_pretrained(root / "llava")
    convert(root / "llava", root / "whole", "hf", shard_bytes=40_000)
    return root / "llava", digests(root / "whole")


def in_child(source, out, at):
    """Convert in a process that kills itself at a step (an open, rename, ... of Python's); how many steps it made."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def step(event, arguments):
            nonlocal steps
            if event in ("open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir", "os.scandir"):
                steps += 1
                if steps == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(step)
            convert(source, out, "hf", shard_bytes=40_000)
            os.write(write, str(steps).encode())
        finally:
            os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as stream:
        said = stream.read()
    return int(said or 0), os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")
def test_after_a_kill_anywhere_the_same_command_makes_the_same(checkpoint, tmp_path):
    source, whole = checkpoint
    steps, _ = in_child(source, tmp_path / "counted", 0)
    assert steps > 50 and digests(tmp_path / "counted") == whole
    left = 0
    for number, at in enumerate(random.Random(0).sample(range(steps // 2, steps), KILLS)):
        place = tmp_path / str(number)
        place.mkdir()
        assert in_child(source, place / "out", at) == (0, signal.SIGKILL)
        left += len(list(place.iterdir()))
        if (place / "out").exists():  # killed after it was whole
            assert digests(place / "out") == whole
            shutil.rmtree(place / "out")
        convert(source, place / "out", "hf", shard_bytes=40_000)
        assert digests(place / "out") == whole
        assert [path.name for path in place.iterdir()] == ["out"]  # what the killed one left is gone
    assert left


def test_two_conversions_into_one_folder_do_not_meet(checkpoint, tmp_path):
    with output_lock(tmp_path / "out"), pytest.raises(BusyError, match=r"another run works in .*out"):
        _locked_by_another(checkpoint[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _locked_by_another(source, out):
    from llava_patch.core import locks

    held, locks._held = locks._held, set()  # as in another process
    try:
        convert(source, out, "hf")
    finally:
        locks._held = held


def test_hidden_folders_of_others_stay(checkpoint, tmp_path):
    """Only a lock's file that is left says that a killed conversion was here."""
    other = tmp_path / f".out-{'0' * 32}"
    other.mkdir()
    convert(checkpoint[0], tmp_path / "out", "hf")
    assert other.is_dir() and len(list(tmp_path.iterdir())) == 2


def test_a_disk_without_room_is_told_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    size = sum(tensor.nbytes for tensor in open_weights(str(checkpoint[0])).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=size - 1))
    with pytest.raises(StorageError, match="GB left: free some or name another folder"):
        convert(checkpoint[0], tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())
