"""Weights that do not fit are told of before they are read."""

import json

import pytest
import torch

from llava_patch.core import memory
from llava_patch.core.errors import SettingError
from llava_patch.data.loaded import load_subject
from tests.support import fileset


def big(tmp_path, gigabytes, dtype="float16", suffix="bin"):
    stem = "pytorch_model" if suffix == "bin" else "model"
    index = {"metadata": {"total_size": int(gigabytes * 1e9)}, "weight_map": {}}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"torch_dtype": dtype}}))
    return str(tmp_path)


def test_a_7b_on_24_gb_runs_in_bfloat16_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "machine_memory", lambda: 24 * 2**30)
    source = big(tmp_path, 14.1)
    assert memory.parameter_count(source) == 7_050_000_000
    assert memory.cpu_dtype("", source) == torch.bfloat16
    said = capsys.readouterr().err
    assert "7.0 billion weights are 28.2 GB in float32" in said and "runs in bfloat16" in said
    assert memory.cpu_dtype("bfloat16", source) is None and memory.cpu_dtype("float16", source) is None
    with pytest.raises(SettingError, match=r"28.2 GB in float32.*25.8 GB of memory: give --dtype bfloat16"):
        load_subject(source, device="cpu", dtype="float32")
    for dtype in ("", "bfloat16"):
        with pytest.raises(SettingError, match="a machine with more memory"):
            memory.cpu_dtype(dtype, big(tmp_path, 26.0, "bfloat16"))


def test_what_fits_stays_in_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "machine_memory", lambda: 64 * 2**30)
    assert memory.cpu_dtype("", big(tmp_path, 14.1)) is None and not capsys.readouterr().err
    assert memory.parameter_count(big(tmp_path, 4.0, "float32", "safetensors")) == 10**9


def test_a_single_file_is_counted_by_its_header(tmp_path):
    fileset.write_hf(tmp_path / "model")
    found = memory.parameter_count(str(tmp_path / "model"))
    assert found == sum(p.numel() for p in fileset.hf_model().parameters())
    assert 2**20 < memory.machine_memory() < 2**50
