"""Which checkpoint folders of a Trainer are whole: every file that a run reads when it goes on, missing or cut."""

import shutil

import pytest
import torch

from llava_patch.core.errors import CheckpointError
from llava_patch.integrations.training import trainer_folder
from llava_patch.integrations.training.trainer_folder import look, newest_whole, why_not
from tests.support import run_folders
from tests.support.run_folders import cut

KINDS = {name: getattr(run_folders, name) for name in ("checkpoint", "sharded", "lora", "stage1", "deepspeed", "fsdp")}
NAMED = {
    "mp_rank_00_model_states.pt": "no *model_states.pt",
    "__0_0.distcp": "",  # its list of contents does not say that it is missing, nor how long it was
    "llava_patch_trained.safetensors": "",  # the loader's to say: what trains decides whether it must be there
    "config.json": "",  # not read
    "mm_projector.bin": "model.safetensors: is missing",  # what usually holds the weights
}
"""What is said of a file that is missing; else its name."""


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    root = tmp_path_factory.mktemp("wholes")
    return {name: write(root / name / "checkpoint-10") for name, write in KINDS.items()}


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _copy(folder, to):
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_whole_and_every_file_that_is_missing_empty_or_cut_is_named(kind, wholes, tmp_path):
    assert why_not(wholes[kind], False) == ""
    for number, path in enumerate(_files(wholes[kind])):
        name = path.rpartition("/")[2]
        for share in (None, 0, 0.5, 0.9):
            folder = _copy(wholes[kind], tmp_path / f"{number}-{share}" / "checkpoint-10")
            (folder / path).unlink() if share is None else cut(folder / path, share)
            if share and name.endswith(".distcp"):
                continue
            expected = NAMED.get(name, name) if share is None else name
            if kind == "deepspeed" and share is None and name == "scheduler.pt":
                expected = ""  # its engine may keep the schedule too
            found = why_not(folder, False)
            assert (expected in found) if expected else not found, (path, share, found)


def test_weights_without_any_training_state_are_whole_where_the_run_keeps_none(tmp_path):
    folder = run_folders.checkpoint(tmp_path / "checkpoint-10")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    assert why_not(folder, True) == "" and why_not(folder) == ""
    assert "optimizer.pt: is missing" in why_not(folder, False)
    torch.save({}, folder / "scheduler.pt")
    assert "optimizer.pt: is missing" in why_not(folder)


def test_states_that_are_no_object_or_without_a_step(tmp_path):
    for number, text in enumerate(("[]", "null", '"x"', "{}", '{"global_step": "9"}', '{"global_step": tr')):
        folder = run_folders.checkpoint(tmp_path / f"checkpoint-{number}")
        (folder / "trainer_state.json").write_text(text)
        assert "trainer_state.json" in why_not(folder), text


def test_ranks_of_whose_random_states_one_is_missing(tmp_path):
    folder = run_folders.deepspeed(tmp_path / "checkpoint-10", ranks=3)
    (folder / "rng_state_2.pth").unlink()
    assert "rng_state_2.pth: is missing" in why_not(folder)
    folder = run_folders.checkpoint(tmp_path / "checkpoint-11")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")  # a single process numbers none
    assert "rng_state_1.pth: is missing" in why_not(folder)


def test_an_older_torchs_files_pass(tmp_path):
    folder = run_folders.checkpoint(tmp_path / "checkpoint-10")
    torch.save({}, folder / "optimizer.pt", _use_new_zipfile_serialization=False)
    assert why_not(folder) == ""


def test_the_newest_that_is_whole(tmp_path):
    assert look(tmp_path) is None and newest_whole(tmp_path) is None
    for step in (2, 10, 12, 100):
        run_folders.checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-100"
    cut(tmp_path / "checkpoint-100" / "optimizer.pt")
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    (tmp_path / "unfinished-checkpoint-12").mkdir()
    found = look(tmp_path)
    assert found.whole == tmp_path / "checkpoint-10" and list(found.broken) == [
        tmp_path / "checkpoint-100", tmp_path / "checkpoint-12",
    ]  # fmt: skip
    assert "checkpoint-100/optimizer.pt: cannot be read as a whole file of torch" in found.said()
    assert found.said().endswith(f"Training goes on from {tmp_path / 'checkpoint-10'}")
    found.set_aside()
    assert sorted(path.name for path in tmp_path.glob("unfinished-*")) == [
        "unfinished-checkpoint-100", "unfinished-checkpoint-12", "unfinished-checkpoint-12.1",
    ]  # fmt: skip
    assert look(tmp_path).broken == {}


def test_a_file_that_cannot_be_read_at_all_is_no_half_a_file(tmp_path, monkeypatch):
    folder = run_folders.checkpoint(tmp_path / "checkpoint-10")

    def denied(path):
        raise CheckpointError(f"{path}: cannot be read") from PermissionError(13, "denied")

    monkeypatch.setattr(trainer_folder, "check_torch", denied)
    with pytest.raises(CheckpointError, match="cannot be read"):
        look(folder.parent)
