"""Joining and parting; what several processes say to each other is tested with the R-Probe that needs it."""

import gc
import weakref

import torch.distributed as dist

from llava_patch.core import parallel


def test_no_group_outlives_the_processes_block(monkeypatch, tmp_path):
    """Threads of a gloo group that the interpreter meets at its end abort a process that has done all its work."""
    join = dist.init_process_group
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda *_, **__: join("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1),
    )
    with parallel.processes():
        groups = [weakref.ref(group) for group in (dist.group.WORLD, parallel._control_group())]
        assert all(group() is not None for group in groups)
    gc.collect()
    assert [group() for group in groups] == [None, None]


def test_a_group_of_ours_ends_before_anothers(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        group = weakref.ref(parallel._control_group())
        parallel._end_control_group()  # as at exit
        gc.collect()
        assert group() is None and dist.is_initialized()
    finally:
        dist.destroy_process_group()
    parallel._end_control_group()  # nothing is left to end
