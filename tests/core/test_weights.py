"""Weight files, read by their headers and tensor by tensor."""

import json
import pickle
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from llava_patch.core.errors import CheckpointError, StorageError
from llava_patch.core.weights import (
    StoredTensor,
    check_output,
    folder_of,
    lacks_config,
    nothing_at,
    open_weights,
    read_file,
    read_files,
    same_values,
    weight_files,
    write_json,
)
from llava_patch.patching.keys import sample


class _Numbered:
    """A matrix whose values are their places."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __getitem__(self, part):
        return torch.tensor([[part[0].start * self.columns + part[1].start]])


@pytest.mark.parametrize("side", [4096, 4098, 10_001])
def test_places_of_large_matrices_are_the_fingerprints(side):
    """float32 skips integers above 2^24, and would sample behind the last row."""
    tensor = StoredTensor("m", (side, side), "float32", Path("m"), lambda: torch.zeros(0), _Numbered(side))
    places = tensor.sample(4)
    assert places[0] == 0 and places[-1] == side * side - 1
    if side == 4098:
        flat = torch.arange(side * side, dtype=torch.int32).view(side, side)
        assert places == [pytest.approx(v, abs=1) for v in sample(flat, 4).tolist()]


def test_a_tensor_is_read_when_it_is_called(tmp_path):
    values = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(values, tmp_path / "model.safetensors")
    found = open_weights(str(tmp_path))
    assert {n: (t.shape, t.dtype, t.parameters) for n, t in found.items()} == {
        "a": ((2, 3), "float32", 6), "b": ((4,), "bfloat16", 4),
    }  # fmt: skip
    assert all(torch.equal(found[n](), values[n]) for n in values)


def test_a_shard_that_the_index_names_must_be_there(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": places})
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        open_weights(str(tmp_path))


def test_an_old_torch_file_is_read_whole_or_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="tensor by tensor"):
        read_file(tmp_path / "a.bin")
    (tensor,) = read_file(tmp_path / "a.bin", whole=True)
    assert torch.equal(tensor(), torch.ones(2))


def test_two_roundings_are_the_same_and_a_step_of_training_is_not():
    assert same_values([1.0, -2.0], [1.0, -2.0 * (1 + 2**-8)])
    assert not same_values([1.0, -2.0], [1.0, -2.02])


# --- what is damaged or not there -------------------------------------------------------------------------------------


class _Harmful:
    def __reduce__(self):
        return eval, ("1 / 0",)


@pytest.mark.parametrize(
    "index, says",
    [
        ([], "expected an object"), ({}, "weight_map is missing"), ({"weight_map": []}, "weight_map = .*an object"),
        ({"weight_map": {}}, "names no tensor"), ({"weight_map": {"a": 3}}, "has a in 3: expected the name of a file"),
        ({"weight_map": {"a": "../one.safetensors"}}, "name of a file beside it"),
        ({"weight_map": {"a": "/one.safetensors"}}, "name of a file beside it"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_named(index, says, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json: .*{says}"):
        weight_files(str(tmp_path))


def test_a_name_in_two_shards_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor a is there twice, in one\.safetensors too"):
        read_files([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


@pytest.mark.parametrize("whole", [False, True])
def test_a_torch_file_with_more_than_tensors_runs_nothing_and_is_named(whole, tmp_path):
    torch.save({"a": torch.ones(1), "b": _Harmful()}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin: holds something besides tensors, which is not read"):
        read_file(tmp_path / "a.bin", whole)
    (tmp_path / "a.bin").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(CheckpointError, match=r"a\.bin: .*save it again as model\.safetensors"):
        read_file(tmp_path / "a.bin", whole)


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no", b"PK\x03\x04", b"\x80", b"\xff" * 100])
def test_a_file_that_is_not_whole_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*again"):
        read_file(tmp_path / name)


def test_a_torch_file_of_no_tensors_at_all_is_read(tmp_path):
    """LLaVA writes one beside LoRA files when nothing else was trained."""
    torch.save({}, tmp_path / "a.bin")
    assert read_file(tmp_path / "a.bin") == []
    torch.save({"a": 1}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_file(tmp_path / "a.bin")


def test_what_is_not_there_says_what_is_the_matter(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("")
    for source, says in [
        (str(tmp_path / "no"), "no such folder: name"), ("./no", "no such folder: name"), ("a/b/c", "no such folder"),
        ("", "'': no such folder"), (str(tmp_path / "file"), "is a file: name the folder"),
        ("nosuch/model", "as a hub name: it is not on this machine: hf download nosuch/model"),
    ]:  # fmt: skip
        assert says in str(nothing_at(source)) and says in str(lacks_config(source))
        with pytest.raises(CheckpointError, match=re.escape(says)):
            folder_of(source)
    assert "it has no config.json: name the folder" in str(lacks_config(str(tmp_path)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "the hub does not give it" in str(nothing_at("nosuch/model"))


def test_places_that_must_not_be_written(tmp_path):
    given, link = tmp_path / "outer" / "in", tmp_path / "link"
    given.mkdir(parents=True)
    link.symlink_to(given)
    (tmp_path / "file").write_text("")
    for out, says in [
        (given, "the input itself"), (link, "the input itself"), (given / "out", "inside the input"),
        (link / "out", "inside the input"), (tmp_path / "outer", "has the input"),
        (tmp_path / "file", "name a new one"),
        (tmp_path / "file" / "out", "is a file, so no folder"), (tmp_path / ("x" * 300), "too long"),
        (Path("a\0b"), "name another"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=says):
            check_output(out, [str(given)])
    check_output(tmp_path / "new" / "out", [str(given), "a/hub-name"])
    check_output(tmp_path / "inner", [str(given)])  # the name alone is alike
    with mock.patch("os.access", return_value=False), pytest.raises(StorageError, match="may not write"):
        check_output(tmp_path / "new", [str(given)])
