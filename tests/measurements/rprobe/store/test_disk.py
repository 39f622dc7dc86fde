"""The store on disk: resumed, repaired, bounded, never taken from a living process, and equal to memory bit for bit."""

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from llava_patch.core.errors import InputError, LlavaPatchError, SettingError, StorageError
from llava_patch.data.pages import Pages
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe import keys
from llava_patch.measurements.rprobe.fit import run_rprobe
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store import disk, freeze
from llava_patch.measurements.rprobe.store.disk import delete_unused, in_use, list_stores, stores_folder
from llava_patch.measurements.rprobe.store.freeze import Encoder, freeze_samples
from llava_patch.measurements.rprobe.store.shard import open_shard
from llava_patch.probe.view import make_transform
from tests.support.paths import ROOT
from tests.support.probes import Characters, processor, samples, tiny_model

PAGES = 10


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(freeze, "SHARD_IMAGES", 3)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def seen(model, monkeypatch):
    """Numbers of images that the tower was given, call by call, without the one image that the key is made of."""
    calls = []
    answer_key = keys.answer_key

    def uncounted(*arguments):
        before = len(calls)
        answer = answer_key(*arguments)
        assert calls[before:] == [1]
        del calls[before:]
        return answer

    monkeypatch.setattr(keys, "answer_key", uncounted)
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs.get("pixel_values", args[0] if args else ()))),
        with_kwargs=True,
    )
    yield calls
    hook.remove()


def freeze_pages(model, count=PAGES, seed=0, tokenizer=None, **settings):
    anatomy = find(model)
    transform = make_transform(anatomy, processor(), "resize")
    return freeze_samples(
        Encoder(anatomy, transform, tokenizer or Characters()), Pages(count, 56, seed), RProbe(**settings)
    )


def everything(data):
    batch = data.batch(torch.arange(len(data)))
    sequence = batch.sequence
    return [
        batch.image_tokens, batch.text_tokens, batch.pixels, batch.counts, sequence.order, sequence.positions,
        sequence.valid, sequence.target, data.target_mean, torch.tensor(data.target_variance),
        data.inside(torch.arange(len(data))),
    ]  # fmt: skip


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def shards():
    return sorted(stores_folder().glob("*/shard-*.safetensors"))


def test_a_finished_store_is_read_without_the_tower_and_without_drawing(model, seen, monkeypatch):
    first = everything(freeze_pages(model))
    assert seen == [3, 3, 3, 1]
    drawn = []
    draw = Pages.draw
    monkeypatch.setattr(Pages, "draw", lambda self, index: drawn.append(index) or draw(self, index))
    again = freeze_pages(model)
    assert same(first, everything(again))
    assert (seen, drawn) == ([3, 3, 3, 1], [0])  # page 0 names what draws
    assert again.labels[4] == (again.samples[4].id, again.samples[4].id, again.samples[4].text)


def test_text_settings_share_one_store_but_not_one_key(model, seen):
    plain = freeze_pages(model)
    for other in (dict(text=False), dict(max_text_tokens=3)):
        data = freeze_pages(model, **other)
        assert data.store.folder == plain.store.folder
        assert data.key != plain.key
    assert seen == [3, 3, 3, 1]
    assert freeze_pages(model, masked=True).store.folder != plain.store.folder


def test_memory_and_disk_give_the_same_bits(model):
    kept, free = freeze_pages(model), freeze_pages(model, store=False)
    assert free.store is None
    assert same(everything(kept), everything(free))
    assert kept.key == free.key


def test_a_probe_gives_the_same_numbers_with_and_without_a_store(model):
    settings = RProbe(steps=6, batch_size=4, train_pages=12, heldout_pages=5, examples=1, threshold=1e-6)
    runs = [
        run_rprobe(model, processor(), Characters(), dataclasses.replace(settings, store=store), progress=False)
        for store in (True, True, False)
    ]
    assert runs[0].losses == runs[1].losses == runs[2].losses
    assert runs[0].documents == runs[1].documents == runs[2].documents
    assert (runs[0].mse, runs[0].constant_mse, runs[0].target_variance) == (
        runs[2].mse, runs[2].constant_mse, runs[2].target_variance
    )  # fmt: skip
    assert len(list_stores(stores_folder())) == 2


class Broke(Exception):
    pass


def test_an_interrupted_encoding_goes_on_where_it_stopped(model, seen):
    expected = everything(freeze_pages(model, store=False))
    seen.clear()

    def interrupt(module, args, kwargs):
        if len(seen) == 3:
            raise Broke

    hook = model.model.vision_tower.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(Broke):
        freeze_pages(model)
    hook.remove()
    assert len(shards()) == 2
    assert not in_use(shards()[0].parent)
    seen.clear()
    assert same(everything(freeze_pages(model)), expected)
    assert seen == [3, 1]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-5], lambda raw: raw[:100], lambda raw: b""])
def test_a_damaged_shard_alone_is_encoded_again(model, seen, damage, caplog):
    expected = everything(freeze_pages(model))
    path = shards()[1]
    path.write_bytes(damage(path.read_bytes()))
    seen.clear()
    assert same(everything(freeze_pages(model)), expected)
    assert seen == [3]
    assert f"{path} cannot be used" in caplog.text


def test_half_a_file_of_a_killed_process_is_no_shard_and_is_cleared_away(model, seen):
    expected = everything(freeze_pages(model))
    path = shards()[3]
    half = path.with_name(".shard-00003-abc.safetensors")
    half.write_bytes(path.read_bytes()[:50])
    path.unlink()
    seen.clear()
    assert same(everything(freeze_pages(model)), expected)
    assert seen == [1]
    assert not half.exists()


def test_a_store_is_in_use_as_long_as_its_data_live(model):
    data = freeze_pages(model)
    folder = data.store.folder
    assert in_use(folder)
    assert [len(found) for found in delete_unused(stores_folder())] == [0, 1]
    del data
    gc.collect()
    assert not in_use(folder)
    assert list((folder / "users").iterdir()) == []
    assert [len(found) for found in delete_unused(stores_folder())] == [1, 0]
    assert not folder.exists()


def test_the_mark_of_a_killed_process_does_not_hold_a_store(model):
    folder = freeze_pages(model).store.folder
    program = (
        "import sys\nfrom llava_patch.measurements.rprobe.store.disk import Store\n"
        f"store = Store({folder.name!r}, 4, {{}}, 1.0)\nprint('in', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"in\n"
        gc.collect()
        assert in_use(folder)
    finally:
        other.kill()
        other.wait()
    assert list((folder / "users").iterdir())
    assert not in_use(folder)
    assert not list((folder / "users").iterdir())


def used(folder: Path, at: float) -> None:
    os.utime(folder / "used", (at, at))


def test_the_longest_unused_store_that_nobody_uses_makes_room(model):
    folders = [freeze_pages(model, seed=seed).store.folder for seed in range(3)]
    gc.collect()
    now = time.time()
    for folder, age in zip(folders, (20, 30, 10), strict=True):
        used(folder, now - age)
    size = list_stores(stores_folder())[0].bytes / 1e9
    assert [kept.folder for kept in list_stores(stores_folder())] == [folders[1], folders[0], folders[2]]
    reader = freeze_pages(model, seed=1)  # the oldest is in use, and young again; then made old once more
    used(folders[1], now - 30)
    freeze_pages(model, seed=3, store_gb=3.5 * size)
    assert [folder.exists() for folder in folders] == [False, True, True]
    assert same(everything(reader), everything(freeze_pages(model, seed=1, store=False)))


def test_the_bound_holds_for_what_is_there_already(model):
    """Nothing is written, but the others go, and a store that is too large alone is refused and kept."""
    folders = [freeze_pages(model, seed=seed).store.folder for seed in range(2)]
    gc.collect()
    size = list_stores(stores_folder())[0].bytes / 1e9
    freeze_pages(model, seed=0, store_gb=1.5 * size)
    assert [folder.exists() for folder in folders] == [True, False]
    gc.collect()
    with pytest.raises(SettingError, match=r"frozen tokens take about .* RProbe\.store_gb = "):
        freeze_pages(model, seed=0, store_gb=0.5 * size)
    assert folders[0].exists() and not in_use(folders[0])


def test_data_that_exceed_the_bound_are_refused_before_anything_is_written_or_deleted(model):
    other = freeze_pages(model, seed=1).store.folder
    gc.collect()
    with pytest.raises(SettingError, match=r"RProbe\.store_gb = 1e-05: raise it, .*RProbe\.store = False"):
        freeze_pages(model, store_gb=1e-5)
    assert [kept.folder for kept in list_stores(stores_folder())] == [other]
    assert other.is_dir()
    freeze_pages(model, store_gb=1e-5, store=False)


def test_stores_in_use_count_against_the_bound(model):
    reader = freeze_pages(model, seed=1)
    size = list_stores(stores_folder())[0].bytes / 1e9
    with pytest.raises(SettingError, match=r"belong to stores in use .*RProbe\.store_gb"):
        freeze_pages(model, store_gb=1.5 * size)
    assert reader.store.folder.is_dir()


def test_a_full_disk_is_refused_before_it_is_full(model, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(StorageError, match=r"5e-06 GB are free .*RProbe\.store_gb"):
        freeze_pages(model)
    assert shards() == []


def test_a_folder_that_cannot_be_written_is_named(model, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(LlavaPatchError, match=r"file/rprobe cannot be written .*LLAVA_PATCH_CACHE .*RProbe\.store"):
        freeze_pages(model)


def test_a_failed_encoding_leaves_no_empty_store(model):
    anatomy = find(model)
    bad = [dataclasses.replace(samples(1)[0], boxes=((5.0, 5.0, 5.0, 9.0),))]
    with pytest.raises(InputError):
        freeze_samples(Encoder(anatomy, make_transform(anatomy, processor(), "resize"), Characters()), bad, RProbe())
    assert list_stores(stores_folder()) == []


def test_two_processes_share_the_work_and_fail_together(model, tmp_path):
    """Each encodes other shards, both get all of them, they hold what one process writes; an error ends both."""
    alone = freeze_pages(model)
    files = [path.relative_to(stores_folder()) for path in shards()]
    shutil.rmtree(stores_folder())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tests.measurements.rprobe.store.two_processes", str(tmp_path)]
    both = [subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    calls = [int((tmp_path / f"calls-{rank}").read_text()) for rank in range(2)]
    assert sum(calls) == len(files) == 4
    assert min(calls) > 0
    for number, (file, shard) in enumerate(zip(files, alone.shards, strict=True)):
        found = open_shard(stores_folder() / file, file.parent.name, number)
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in shard.tensors.items())
        assert (found.records, found.skipped) == (shard.records, shard.skipped)
    assert (tmp_path / "error-0").read_text().startswith("Broke")
    assert "PeerError: R-Probe ended because process 0 of 2 failed: Broke" in (tmp_path / "error-1").read_text()
