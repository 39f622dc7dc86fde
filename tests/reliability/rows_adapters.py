"""Adapters and patched checkpoints that are damaged, mixed, changed by hand, moved, or of another version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.reliability.place import Call, Place, Row, open_stock

SETTINGS, WEIGHTS, CONFIG = "llava_patch.json", "llava_patch.safetensors", "config.json"


def loads(folder: Path) -> Call:
    """The adapter is put on the stock model."""

    def run() -> None:
        import llava_patch

        llava_patch.load(open_stock(), folder).remove()

    return run


def opens(folder: Path) -> Call:
    """The host's own loader opens the folder."""

    def run() -> None:
        from transformers import LlavaForConditionalGeneration

        LlavaForConditionalGeneration.from_pretrained(folder)

    return run


def settings_become(value: Any) -> Callable[[Place], Call]:
    """The settings file holds another value, or other text."""

    def make(place: Place) -> Call:
        folder = place.adapter()
        place.file("adapter/llava_patch.json", value)
        return loads(folder)

    return make


def settings_with(how: Callable[[Path], Call] = loads, **changes: Any) -> Callable[[Place], Call]:
    """Some fields of the settings file are other ones; None takes one away."""

    def make(place: Place) -> Call:
        folder = place.adapter()
        place.edit(folder / SETTINGS, **changes)
        return how(folder)

    return make


def old_settings_with(**changes: Any) -> Callable[[Place], Call]:
    """The same in a file of before there were checksums."""
    return settings_with(version=None, checksum=None, weights_checksum=None, **changes)


def weights_become(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Place], Call]:
    """The adapter's tensors are changed."""

    def make(place: Place) -> Call:
        folder = place.adapter()
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        return loads(folder)

    return make


def first(tensors: dict[str, torch.Tensor], value: torch.Tensor | None = None, name: str = "") -> str:
    """Name of a side-branch weight; with a value it gets that."""
    found = next(name for name in sorted(tensors) if "side_branch" in name and tensors[name].dim() == 2)
    if value is not None:
        tensors[name or found] = value
    return found


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)][0, 0] = float("nan")


def bytes_of(name: str, change: Callable[[Path], Any], how: Callable[[Path], Call] = loads) -> Callable[[Place], Call]:
    """One of the adapter's files is damaged, or gone."""

    def make(place: Place) -> Call:
        folder = place.adapter()
        change(folder / name)
        return how(folder)

    return make


def gone(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_saves_weights(place: Place) -> Call:
    """The weights of another save of the same settings."""
    folder = place.adapter()
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return loads(folder)


def another_saves_config(place: Place) -> Call:
    folder = place.adapter()
    values = json.loads((folder / CONFIG).read_text())
    values["llava_patch"]["routing"]["split"] = 1
    (folder / CONFIG).write_text(json.dumps(values))
    return loads(folder)


def moved_without_its_base(place: Place) -> Call:
    folder = place.adapter()
    return opens(place.edit(folder / SETTINGS, base="/nowhere/model").parent)


def command_on_moved(place: Place) -> Call:
    folder = place.adapter()
    place.edit(folder / SETTINGS, base="/nowhere/model")
    return place.command("saturation", folder, place.image())


def wrong_base(place: Place) -> Call:
    from tests.support import fileset

    fileset.hf_model(layers=4).save_pretrained(place.root / "other")
    fileset.processor().save_pretrained(place.root / "other")
    path = place.root / "other" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(path).items()}, path, {"format": "pt"})
    return place.command("saturation", place.adapter(), place.image(), "--base", place.root / "other")


def full_with(change: Callable[[Path], Any]) -> Callable[[Place], Call]:
    """A patched checkpoint saved whole is changed."""

    def make(place: Place) -> Call:
        folder = place.full()
        change(folder)
        return opens(folder)

    return make


def config_of_full(**changes: Any) -> Callable[[Place], Call]:
    def change(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))

    return full_with(change)


def without_record(folder: Path) -> None:
    (folder / SETTINGS).unlink()


def saves(where: Callable[[Place], Path], form: str = "adapter", spoil: bool = False) -> Callable[[Place], Call]:
    """A patched model is saved to a folder that must not take it."""

    def make(place: Place) -> Call:
        folder = where(place)

        def run() -> None:
            from llava_patch import Routing, patch

            with patch(open_stock(), routing=Routing(split=2)) as handle:
                if spoil:
                    with torch.no_grad():
                        handle.added_parameters()[0][0] = float("nan")
                handle.save(folder, form=form)

        return run

    return make


def removed(place: Place) -> Call:
    def run() -> None:
        from llava_patch import Routing, patch

        handle = patch(open_stock(), routing=Routing(split=2))
        handle.remove()
        handle.save(place.root / "out")

    return run


def below_a_file(place: Place) -> Path:
    return place.file("file", "x") / "out"


def own_base(place: Place) -> Path:
    return Path(open_stock().config._name_or_path)


def adapter_among_shards(place: Place) -> Path:
    folder = place.full()
    (folder / SETTINGS).unlink()
    return folder


def links_in_a_circle(place: Place) -> Path:
    (place.root / "circle").symlink_to("circle")
    return place.root / "circle" / "out"


def stock_config_in_full(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    del values["llava_patch"]
    (folder / CONFIG).write_text(json.dumps(values))


def beside_a_whole_model(place: Place) -> Call:
    folder = place.adapter()
    shutil.copyfile(place.stock() / "model.safetensors", folder / "model.safetensors")
    return opens(folder)


def on_a_base_that_is_cut_off(place: Place) -> Call:
    from tests.support import fileset

    folder = place.adapter()
    fileset.hf_model(layers=2).save_pretrained(place.root / "other")
    Place.cut(place.root / "other" / "model.safetensors")
    return opens(place.edit(folder / SETTINGS, base=str(place.root / "other")).parent)


def over_pefts(place: Place) -> Path:
    return place.file("peft/adapter_config.json", "{}").parent


SAVE = "save again"
ROWS = [
    *(
        Row("adapter settings", f"they are {what}", settings_become(value), (SETTINGS, said))
        for what, value, said in (
            ("a list", [], "expected an object"), ("text", '"x"', "expected an object"),
            ("null", "null", "expected an object"), ("a number", "3", "expected an object"),
            ("an empty file", "", "not valid JSON"), ("half a file", '{"format": 1, "ro', "line 1 column"),
            ("no UTF-8", b"\xff\xfe\x00{", "not valid JSON"), ("nested without end", "[" * 100_000, "not valid JSON"),
            ("an empty object", {}, "format None"), ("an integer of 5,000 digits", "1" * 5000, "not valid JSON"),
        )
    ),
    *(
        Row("adapter settings", what, settings_with(**change), (SETTINGS, *said))
        for what, change, said in (
            ("of a newer format", {"format": 2}, ("format 2", "version '0.", "update llava_patch")),
            ("a format that is true", {"format": True}, ("format True",)),
            ("an unknown key of a newer version", {"window": 3, "version": "9.1"}, ("'window'", "'9.1'", "update")),
            ("routing that is a list", {"routing": []}, ("routing = []", "expected an object")),
            ("routing that is text", {"routing": "lf"}, ("routing = 'lf'", "expected an object")),
            ("fusion that is a number", {"fusion": 3}, ("fusion = 3", "expected an object")),
            ("a form that is unknown", {"form": "half"}, ("form = 'half'", "expected adapter")),
            ("a form that is a number", {"form": 1}, ("form = 1", "expected text")),
            ("no base", {"base": None}, ("base is missing",)),
            ("a base that is a list", {"base": ["a"]}, ("base = ['a']", "expected text")),
            ("a version that is a number", {"version": 1}, ("version = 1", "expected text")),
            ("no fingerprint", {"fingerprint": None}, ("fingerprint = None", SAVE)),
            ("an empty fingerprint", {"fingerprint": {}}, ("changed after they were written", SAVE)),
            ("a fingerprint that is a list", {"fingerprint": []}, ("fingerprint = []", SAVE)),
            ("a fingerprint of texts", {"fingerprint": {"a": "b"}}, ("fingerprint =", SAVE)),
            ("a fingerprint of huge numbers", {"fingerprint": {"a": [10**400]}}, ("fingerprint =", SAVE)),
            ("a tower that is trained maybe", {"trained_tower": "maybe"}, ("trained_tower = 'maybe'", "true or false")),
            ("another checksum", {"checksum": "0"}, ("changed after they were written", SAVE)),
            ("no checksum", {"checksum": None}, ("changed after they were written", SAVE)),
            ("no checksum of the weights", {"weights_checksum": None}, ("changed after they were written", SAVE)),
        )
    ),
    *(
        Row("adapter settings before checksums", what, old_settings_with(**change), (SETTINGS, *said))
        for what, change, said in (
            ("no fingerprint", {"fingerprint": None}, ("fingerprint = None", SAVE)),
            ("no method's name", {"routing": {"split": 2}}, ("disagree about routing",)),
            ("a null fingerprint", {"fingerprint": {"x": None}}, ("fingerprint =", SAVE)),
            ("an unknown key", {"later": 1}, ("'later'", "update")),
        )
    ),
    Row("adapter settings", "missing", bytes_of(SETTINGS, gone), (SETTINGS, "is missing", "again")),
    Row("adapter weights", "missing", bytes_of(WEIGHTS, gone), (WEIGHTS, "is missing", "copy the folder again")),
    Row("adapter weights", "empty", bytes_of(WEIGHTS, empty), (WEIGHTS, "cannot be read", "copy the folder again")),
    Row("adapter weights", "cut off", bytes_of(WEIGHTS, Place.cut), (WEIGHTS, "whole safetensors", "copy the folder")),
    Row("adapter weights", "cut in the header", bytes_of(WEIGHTS, lambda p: Place.cut(p, 0.001)), (WEIGHTS, "copy")),
    Row("adapter weights", "a header of 2^63 bytes",
        bytes_of(WEIGHTS, lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:])), (WEIGHTS, "cannot be read")),
    Row("adapter weights", "text", bytes_of(WEIGHTS, lambda p: p.write_text("hello")), (WEIGHTS, "cannot be read")),
    Row("adapter weights", "missing, by the host's loader", bytes_of(WEIGHTS, gone, opens), (WEIGHTS, "is missing")),
    Row("adapter weights", "cut off, by the host's loader", bytes_of(WEIGHTS, Place.cut, opens), (WEIGHTS, "copy")),
    Row("adapter weights", "of another save", another_saves_weights, (WEIGHTS, "another save", SAVE)),
    Row("adapter weights", "NaN", weights_become(nan), (WEIGHTS, "not finite", "earlier checkpoint")),
    Row("adapter weights", "infinite", weights_become(lambda t: first(t, t[first(t)] / 0)), (WEIGHTS, "not finite")),
    Row("adapter weights", "int8", weights_become(lambda t: first(t, t[first(t)].to(torch.int8))), ("int8", SAVE)),
    Row("adapter weights", "complex", weights_become(lambda t: first(t, t[first(t)].to(torch.complex64))),
        ("complex64", "expected floating-point")),
    Row("adapter weights", "one that is missing", weights_become(lambda t: t.pop(first(t))), ("missing (1 in all)",)),
    Row("adapter weights", "one of another shape", weights_become(lambda t: first(t, torch.zeros(3, 3))),
        (WEIGHTS, "has shape (3, 3)")),
    Row("adapter weights", "one that is unknown", weights_become(lambda t: first(t, torch.zeros(2), "more")),
        (WEIGHTS, "no tensor more")),
    Row("adapter folder", "config.json of another save", another_saves_config, (SETTINGS, "disagree about routing")),
    Row("adapter folder", "config.json that is a list", bytes_of(CONFIG, lambda p: p.write_text("[]")),
        (CONFIG, "expected an object")),
    Row("adapter folder", "its base is gone, by the host's loader", moved_without_its_base,
        ("base model /nowhere/model is not there", "--base", 'change "base"')),
    Row("adapter folder", "its base is gone, by a command", command_on_moved, ("model is not there", "--base")),
    Row("adapter folder", "--base is another model", wrong_base, ("made on another base model", "differs")),
    Row("adapter folder", "config.json missing", bytes_of(CONFIG, gone, opens), (CONFIG, "is missing", SAVE)),
    Row("adapter folder", "a whole model in it", beside_a_whole_model, ("an adapter's", "a whole model's", "move one")),
    Row("adapter folder", "a base that is cut off", on_a_base_that_is_cut_off, ("its base", "damaged", "--base")),
    Row("full checkpoint", "config.json of the stock model", full_with(stock_config_in_full), ("disagree", "routing")),
    Row("full checkpoint", "config.json missing", full_with(lambda f: (f / CONFIG).unlink()), (CONFIG, SAVE)),
    Row("saving", "over peft's adapter", saves(over_pefts), ("adapter of peft", "another folder")),
    Row("saving", "the whole model over peft's adapter", saves(over_pefts, "full"), ("adapter of peft", "another")),
    *(
        Row("full checkpoint", what, make, says)
        for what, make, says in (
            ("settings in config.json that are a list", config_of_full(llava_patch=[]), (CONFIG, "expected an object")),
            ("settings in config.json that are text", config_of_full(llava_patch="x"), (CONFIG, "expected an object")),
            ("a newer format in config.json", config_of_full(llava_patch={"format": 9}), (CONFIG, "format 9")),
            ("an unknown key in config.json", config_of_full(llava_patch={"format": 1, "new": 1}), ("'new'", "update")),
            ("settings file cut off", full_with(lambda f: Place.cut(f / SETTINGS)), (SETTINGS, "not valid JSON")),
            ("settings file and config.json disagree",
             config_of_full(llava_patch={"format": 1, "fusion": None, "routing": None, "pruning": None}),
             (SETTINGS, "disagree about routing")),
        )
    ),
    Row("saving", "an adapter over a whole stock model", saves(Place.stock), ("would be lost", "another folder")),
    Row("saving", "the whole model over a stock one", saves(Place.stock, "full"), ("would be lost", "another folder")),
    Row("saving", "an adapter over a whole patched model", saves(Place.full), ("a whole checkpoint", "another folder")),
    Row("saving", "an adapter into its own base", saves(own_base), ("base model's own folder", "elsewhere")),
    Row("saving", "the whole model into its own base", saves(own_base, "full"), ("would be lost", "another folder")),
    Row("saving", "a form that is none", saves(lambda place: place.root / "out", "half"), ('"adapter" or "full"',)),
    Row("saving", "a patch that was removed", removed, ("removed", "nothing to save")),
    Row("saving", "weights that are not finite", saves(lambda place: place.root / "out", spoil=True), ("not finite",)),
    Row("saving", "into a file", saves(lambda place: place.file("file", "x")), ("a file is in the way",), 1),
    Row("saving", "below a file", saves(below_a_file), ("a part of the path is a file", "another folder"), 1),
    Row("saving", "into links that go round", saves(links_in_a_circle), ("circle", "another folder"), 1),
    Row("saving", "under a name of 5,000 characters", saves(lambda place: place.root / ("x" * 5000)),
        ("the name is too long", "another folder"), 1),
]  # fmt: skip
