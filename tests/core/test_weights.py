"""Weight files, read by their headers and tensor by tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import StoredTensor, open_weights, read_file, same_values, write_json
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
