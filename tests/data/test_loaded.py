import json
import os
import signal

import pytest
import torch

from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.data import loaded as subject
from llava_patch.data.loaded import load_subject, pick_device, pick_dtype
from tests.support import fileset


def test_a_hugging_face_checkpoint(tmp_path):
    fileset.write_hf(tmp_path / "model")
    found = load_subject(str(tmp_path / "model"), device="cpu")
    weights = list(found.model.parameters())
    assert {p.dtype for p in weights} == {torch.float32} and not found.model.training
    assert found.tokenizer("words", add_special_tokens=False)["input_ids"]
    assert found.image_processor.image_mean
    with pytest.raises(CheckpointError, match="leave out --base"):
        load_subject(str(tmp_path / "model"), base=str(tmp_path / "model"), device="cpu")


@pytest.mark.parametrize(
    "files, base, message",
    [
        (["adapter_config.json"], False, "holds LoRA weights only: name the model below it with --base"),
        (["mm_projector.bin"], False, "holds a projector only: name the model below it with --base"),
        (["pytorch_model.bin"], True, "is whole, or knows its own base: leave out --base"),
        ([], False, "it holds no weights"),
    ],
)
def test_what_a_llava_folder_holds_decides_about_its_base(tmp_path, files, base, message):
    pytest.importorskip("llava")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": "clip"}))
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        load_subject(str(tmp_path), base=str(tmp_path) if base else "", device="cpu")
    assert torch.get_default_dtype() == torch.float32


def test_device_and_dtype(monkeypatch):
    assert pick_device("cpu") == "cpu"
    assert pick_dtype("", "cpu") == torch.float32 and pick_dtype("", "cuda:0") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("") == pick_device("cuda") == "cuda:1" and pick_device("cuda:3") == "cuda:3"
    with pytest.raises(SettingError, match="--device mps"):
        pick_device("mps")


def test_ctrl_c_outlives_a_block_that_swallows_it():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with subject._interrupted_afterwards():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                finished = True
            except BaseException:
                finished = False
    assert finished and signal.getsignal(signal.SIGINT) is before
    with subject._interrupted_afterwards():
        pass
