"""A save that is killed anywhere leaves the old one, the new one, or what no loader takes for either."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_patch
from llava_patch import Routing, patch
from llava_patch.core import records
from llava_patch.core.errors import CheckpointError, StorageError
from llava_patch.core.files import check_space
from llava_patch.data.loaded import load_subject
from llava_patch.tools.convert.source import read
from llava_patch.tools.inspect.read import inspect_checkpoint
from tests.support import fileset
from tests.support.models import needs_hf


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    needs_hf()
    return fileset.write_hf(tmp_path_factory.mktemp("stock") / "model")


def opened(folder: Path):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder).eval()


def mark(handle, number: float) -> None:
    """Make the trained weights say which save they are of."""
    with torch.no_grad():
        for parameter in handle.added_parameters():
            parameter.fill_(number)


def saved_number(folder: Path) -> tuple[int, set[float]]:
    """(settings' split, values of the trained weights) of a folder that loads."""
    handle = llava_patch.get_handle(opened(folder))
    return handle.routing.split, {value for p in handle.added_parameters() for value in p.flatten().tolist()}


def sound(folder: Path) -> str:
    """ "1" or "2": the folder is that save, whole; "refused": it is neither."""
    try:
        _, values = saved_number(folder)
    except (CheckpointError, OSError) as error:
        assert str(folder) in str(error)
        return "refused"
    assert values in ({1.0}, {2.0}), f"weights of {values}"
    (value,) = values
    return str(int(value))


def begin(target, *args) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def take_checksums_away(folder: Path) -> None:
    path = folder / records.SETTINGS_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if "checksum" not in k and k != "version"}))


class Killed(BaseException):
    """What stands for the end of the process: nothing catches it."""


def dying(monkeypatch, step: int) -> None:
    """From the step on that changes names in a folder, all such steps fail."""
    count = 0

    def counted(stock):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= step:
                raise Killed
            return stock(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "rename", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize("checksums", [True, False], ids=["", "over a save of before checksums"])
def test_a_save_that_dies_at_any_of_its_steps_is_no_mixture(form, checksums, stock, tmp_path, monkeypatch):
    model, seen = opened(stock), []
    while not seen or seen[-1] != "2":
        folder = tmp_path / str(len(seen))
        for number in (1, 2):
            with patch(model, routing=Routing(split=2)) as handle, monkeypatch.context() as until_then:
                mark(handle, float(number))
                if number == 2:
                    if not checksums:
                        take_checksums_away(folder)
                    dying(until_then, len(seen) + 1)
                with contextlib.suppress(Killed):
                    handle.save(folder, form=form)
        seen.append(sound(folder))
        assert len(seen) < 60, seen
    assert seen == sorted(seen, key=["1", "refused", "2"].index) and {"1", "refused"} <= set(seen), seen
    with patch(model, routing=Routing(split=2)) as handle:  # a later save takes the place of what was left
        mark(handle, 2.0)
        handle.save(tmp_path / str(seen.index("refused")), form=form)
    assert sound(tmp_path / str(seen.index("refused"))) == "2"


def save_for_ever(folder: Path, stock: Path) -> None:
    torch.set_num_threads(1)
    model = opened(stock)
    while True:
        for split in (1, 2):
            with patch(model, routing=Routing(split=split)) as handle:
                mark(handle, float(split))
                handle.save(folder)


def test_kills_in_a_loop_of_saves(stock, tmp_path):
    moments, folder = random.Random(7), tmp_path / "adapter"
    outcomes = []
    for _ in range(3):
        process = begin(save_for_ever, folder, stock)
        deadline = time.monotonic() + 60
        while not (folder / records.SETTINGS_FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.05, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        outcomes.append(sound(folder))
    assert len(outcomes) == 3 and {"1", "2"} & set(outcomes), outcomes


@pytest.mark.parametrize("which", ["weights", "settings", "config"])
@pytest.mark.parametrize("form", ["adapter", "full"])
def test_files_of_two_saves_of_the_same_shapes_do_not_load(form, which, stock, tmp_path):
    for number in (1, 2):
        save_once(tmp_path / str(number), stock, number, form)
    weights = "llava_patch.safetensors" if form == "adapter" else "model.safetensors"
    names = {"weights": weights, "settings": "llava_patch.json", "config": "config.json"}
    shutil.copyfile(tmp_path / "1" / names[which], tmp_path / "2" / names[which])
    for look in (opened, inspect_checkpoint, read):
        with pytest.raises(CheckpointError, match=r"another save|two saves"):
            look(tmp_path / "2")


def save_once(folder: Path, stock: Path, split: int, form: str = "adapter") -> None:
    with patch(opened(stock), routing=Routing(split=split)) as handle:
        mark(handle, float(split))
        handle.save(folder, form=form)


def test_weights_of_another_save_with_the_same_settings_do_not_load(stock, tmp_path):
    for number in (1, 2):
        with patch(opened(stock), routing=Routing(split=2)) as handle:
            mark(handle, float(number))
            handle.save(tmp_path / str(number), form="full")
    shutil.copyfile(tmp_path / "1" / "model.safetensors", tmp_path / "2" / "model.safetensors")
    with pytest.raises(CheckpointError, match="another save"):
        opened(tmp_path / "2")


@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize("filled", [False, True], ids=["an empty", "an earlier save's"])
def test_a_folder_behind_a_link_to_another_disk_takes_a_save(filled, form, stock, tmp_path, monkeypatch):
    disk = Path("/dev/shm")
    if not os.access(disk, os.W_OK) or disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second disk to write to")
    with tempfile.TemporaryDirectory(dir=disk) as there, patch(opened(stock), routing=Routing(split=2)) as handle:
        (tmp_path / "link").symlink_to(there)
        if filled:
            mark(handle, 1.0)
            handle.save(tmp_path / "link", form=form)
        mark(handle, 2.0)
        handle.save(tmp_path / "link", form=form)
        assert saved_number(tmp_path / "link") == (2, {2.0}) and (tmp_path / "link").is_symlink()
        monkeypatch.chdir(there)
        mark(handle, 3.0)
        handle.save(".", form=form)
        assert saved_number(Path(there)) == (2, {3.0})


def test_a_folder_that_cannot_be_replaced_is_filled(stock, tmp_path, monkeypatch):
    """As where a disk is mounted, or whose parent takes no files."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mount")
    (tmp_path / "mount").mkdir()
    with patch(opened(stock), routing=Routing(split=2)) as handle:
        for number in (1.0, 2.0):
            mark(handle, number)
            handle.save(tmp_path / "mount")
            assert saved_number(tmp_path / "mount") == (2, {number})
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "mount").glob(".*"))


def test_a_record_names_the_version_that_wrote_it(stock, tmp_path):
    with patch(opened(stock), routing=Routing(split=2)) as handle:
        for form in ("adapter", "full"):
            folder = handle.save(tmp_path / form, form=form)
            record = json.loads((folder / records.SETTINGS_FILE).read_text())
            assert record["version"] == llava_patch.__version__ and record["checksum"] == records.seal(record)
    assert records.read_settings(tmp_path / "adapter")["weights_checksum"] == records.checksum(
        tmp_path / "adapter" / "llava_patch.safetensors"
    )


def test_an_adapter_and_its_base_may_be_moved_together_or_the_base_be_named(stock, tmp_path):
    shutil.copytree(stock, tmp_path / "here" / "model")
    with patch(opened(tmp_path / "here" / "model"), routing=Routing(split=2)) as handle:
        mark(handle, 3.0)
        handle.save(tmp_path / "here" / "adapter")
    (tmp_path / "here").rename(tmp_path / "there")
    assert saved_number(tmp_path / "there" / "adapter") == (2, {3.0})
    (tmp_path / "there" / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is not there any more: say where it is with --base"):
        opened(tmp_path / "there" / "adapter")
    loaded = load_subject(str(tmp_path / "there" / "adapter"), base=str(tmp_path / "elsewhere"))
    handle = llava_patch.get_handle(loaded.model)
    assert handle.routing.split == 2 and all((p == 3).all() for p in handle.added_parameters())
    with records.base_is(tmp_path / "there" / "adapter", str(tmp_path / "elsewhere")):
        assert saved_number(tmp_path / "there" / "adapter") == (2, {3.0})


def test_files_that_are_not_the_saves_own_stay(stock, tmp_path):
    with patch(opened(stock), routing=Routing(split=2)) as handle:
        folder = handle.save(tmp_path / "full", form="full")
        (folder / "notes.txt").write_text("mine")
        (folder / "model-00001-of-00002.safetensors").write_text("of an earlier save in shards")
        handle.save(folder, form="full")
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_leaves_the_earlier_save(stock, tmp_path):
    import resource

    def fill(folder: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with patch(opened(stock), routing=Routing(split=2)) as handle:
            mark(handle, 2.0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            try:
                handle.save(folder)
            except StorageError as error:
                os._exit(7 if "too large" in str(error) and "name another folder" in str(error) else 8)
        os._exit(0)

    folder = tmp_path / "adapter"
    save_once(folder, stock, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    process = begin(fill, folder)
    process.join()
    assert process.exitcode == 7
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and not list(tmp_path.glob(".*"))


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(StorageError, match=r"takes 1000000000.00 GB, and the disk has .* left: free some"):
        check_space(tmp_path / "new" / "file", 1e18, "the model")


def test_weights_that_changed_on_the_disk_are_refused(stock, tmp_path):
    save_once(tmp_path / "adapter", stock, 1)
    path = tmp_path / "adapter" / "llava_patch.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="another save"):
        opened(tmp_path / "adapter")


def test_a_base_that_is_changed_by_hand_is_the_one_that_counts(stock, tmp_path):
    save_once(tmp_path / "adapter", stock, 2)
    path = tmp_path / "adapter" / records.SETTINGS_FILE
    record = json.loads(path.read_text())
    for base, found in (("a/hub-name", "a/hub-name"), ("/nowhere", None), (str(tmp_path), str(tmp_path))):
        path.write_text(json.dumps({**record, "base": base}))
        assert records.find_base(tmp_path / "adapter", records.read_settings(tmp_path / "adapter")) == found


def test_the_hosts_own_save_ends_an_earlier_save_of_ours(stock, tmp_path):
    for form in ("adapter", "full"):
        with patch(opened(stock), routing=Routing(split=2)) as handle:
            mark(handle, 1.0)
            handle.save(tmp_path / form, form=form)
            mark(handle, 2.0)
            handle.model.save_pretrained(tmp_path / form)
        assert saved_number(tmp_path / form) == (2, {2.0})
        handle.model.save_pretrained(tmp_path / form)  # stock again
        assert llava_patch.get_handle(opened(tmp_path / form)) is None


def test_what_lies_on_another_base_keeps_nothing_of_the_earlier_one(stock, tmp_path):
    shutil.copytree(stock, tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"max_length": 77}')
    save_once(tmp_path / "adapter", stock, 2)
    with patch(opened(tmp_path / "other"), routing=Routing(split=2)) as handle:
        handle.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "generation_config.json").read_text())["max_length"] == 77


def test_a_save_that_fails_while_files_are_replaced_keeps_the_only_whole_copy(stock, tmp_path, monkeypatch):
    save_once(tmp_path / "adapter", stock, 1)
    replace = Path.replace

    def fails(self, target):
        if Path(target).name == "llava_patch.safetensors":
            raise PermissionError(13, "no", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(StorageError, match=r"the rest of the save is in .*adapter-") as said:
        save_once(tmp_path / "adapter", stock, 2)
    monkeypatch.undo()
    rest = Path(str(said.value).split("is in ")[1].split(":")[0])
    for file in rest.iterdir():
        file.replace(tmp_path / "adapter" / file.name)
    assert saved_number(tmp_path / "adapter") == (2, {2.0})


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_while_weights_are_replaced_the_folder_says_so(form, stock, tmp_path, monkeypatch):
    """To loaders that know nothing of checksums too."""
    seen, replace = [], Path.replace

    def noted(self, target):
        if str(target).startswith(str(tmp_path / "x")) and Path(target).suffix == ".safetensors":
            config = json.loads((tmp_path / "x" / "config.json").read_text())
            seen.append((config, (tmp_path / "x" / records.SETTINGS_FILE).exists()))
        return replace(self, target)

    save_once(tmp_path / "x", stock, 1, form)
    monkeypatch.setattr(Path, "replace", noted)
    save_once(tmp_path / "x", stock, 2, form)
    assert seen == [({"llava_patch": records.UNFINISHED}, False)]


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_ranks_that_all_save_the_same_model_do_not_disturb_one_another(form, stock, tmp_path):
    def save(folder: Path) -> None:
        torch.set_num_threads(1)
        for _ in range(8):
            save_once(folder, stock, 2, form)
        os._exit(0)

    ranks = [begin(save, tmp_path / "x") for _ in range(3)]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert saved_number(tmp_path / "x") == (2, {2.0}) and not list(tmp_path.glob(".*"))
