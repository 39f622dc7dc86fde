"""A shard on disk is mapped, whole, and refused when it is not what was written."""

import json
from pathlib import Path

import pytest
import torch

from llava_patch.measurements.rprobe.store.shard import DamagedShard, open_shard, write_shard
from tests.support.probes import made_up


@pytest.fixture
def written(tmp_path):
    shard = made_up(6, 1, "true").shards[0]
    shard.tensors["tokens"] = shard.tensors["tokens"].to(torch.bfloat16)
    path = tmp_path / "shard-00002.safetensors"
    write_shard(path, shard, "key", 2)
    return shard, path


def test_what_was_written_is_read(written):
    shard, path = written
    found = open_shard(path, "key", 2)
    assert set(found.tensors) == set(shard.tensors)
    assert all(torch.equal(found.tensors[n], t) and found.tensors[n].dtype == t.dtype for n, t in shard.tensors.items())
    assert (found.records, found.skipped) == (shard.records, shard.skipped)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_tensors_lie_in_the_mapped_file(written):
    """Nothing is copied into memory: the tensors' addresses are those at which the file is mapped."""
    _, path = written
    found = open_shard(path, "key", 2)
    mapped = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path.name)
    ]
    ranges = [(int(low, 16), int(high, 16)) for low, high in mapped]
    for name in ("tokens", "pixels"):
        first = found.tensors[name].data_ptr()
        last = first + found.tensors[name].numel() * found.tensors[name].element_size() - 1
        assert any(low <= first and last < high for low, high in ranges), name


def test_a_missing_shard_is_none(tmp_path):
    assert open_shard(tmp_path / "shard-00000.safetensors", "key", 0) is None


def flip_record(raw):
    at = raw.index(b"records")
    at = raw.index(b"0", at)
    return raw[:at] + b"7" + raw[at + 1 :]


def flip_table(raw):
    size = int.from_bytes(raw[:8], "little")
    first, _ = json.loads(raw[8 : 8 + size])["target"]["data_offsets"]
    at = 8 + size + first
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: raw[:-1], id="one byte less"),
        pytest.param(lambda raw: raw[: len(raw) // 2], id="half"),
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: raw + b"0", id="one byte more"),
        pytest.param(lambda raw: bytes(8) + raw[8:], id="no header"),
        pytest.param(lambda raw: raw[:8] + b"x" + raw[9:], id="broken header"),
        pytest.param(flip_record, id="a name"),
        pytest.param(flip_table, id="a bit of a table"),
    ],
)
def test_damage_is_noticed(written, damage):
    _, path = written
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedShard):
        open_shard(path, "key", 2)


@pytest.mark.parametrize(("key", "number"), [("other", 2), ("key", 3)])
def test_a_shard_of_another_store_or_place_is_refused(written, key, number):
    with pytest.raises(DamagedShard, match="another format or store"):
        open_shard(written[1], key, number)
