"""Checkpoints of others that are damaged, and places that cannot be written: convert, merge, inspect and doctor."""

from __future__ import annotations

import functools
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from tests.reliability import place as places
from tests.reliability.place import Call, Place, Row

Spoil = Callable[[Place, Path], Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def convert(spoil: Spoil, host: str = "hf", *words: Any) -> Callable[[Place], Call]:
    """`convert` of a stock checkpoint of a host, once it is spoilt."""

    def make(place: Place) -> Call:
        folder = place.llava() if host == "llava" else place.root / "model"
        if host == "hf":
            shutil.copytree(_converted(), folder)
        spoil(place, folder)
        to = "llava" if host == "hf" else "hf"
        return place.command("convert", folder, "--to", to, "--output", "out", *words)

    return make


def merge(spoil: Spoil, form: str = "adapter") -> Callable[[Place], Call]:
    """`merge` of a patched checkpoint, once it is spoilt."""

    def make(place: Place) -> Call:
        folder = place.adapter() if form == "adapter" else place.full()
        spoil(place, folder)
        return place.command("merge", folder, "--output", "out")

    return make


def inspect(spoil: Spoil, *words: Any) -> Callable[[Place], Call]:
    """`inspect` of a stock HF checkpoint, once it is spoilt."""

    def make(place: Place) -> Call:
        folder = place.stock()
        spoil(place, folder)
        return place.command("inspect", folder, *words)

    return make


def writes(name: str, content: Any) -> Spoil:
    """Replace a file of the folder."""
    return lambda place, folder: place.file(f"{folder.name}/{name}", content)


def edits(name: str, **changes: Any) -> Spoil:
    """Change fields of a JSON file of the folder; None takes one away."""
    return lambda place, folder: place.edit(folder / name, **changes)


def cuts(name: str, share: float = 0.5) -> Spoil:
    """Cut a file of the folder off."""
    return lambda place, folder: place.cut(folder / name, share)


def removes(*names: str) -> Spoil:
    """Take files of the folder away."""
    return lambda place, folder: [(folder / name).unlink(missing_ok=True) for name in names]


def nested(name: str, key: str, **changes: Any) -> Spoil:
    """Change fields of an object within a JSON file."""

    def spoil(place: Place, folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        values[key] = {k: v for k, v in (values[key] | changes).items() if v is not None}
        (folder / name).write_text(json.dumps(values))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change the tensors of the folder's one file."""

    def spoil(place: Place, folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        save_file(change(held) or held, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def first(held: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in sorted(held) if name.endswith(ending))


def index(content: Any) -> Spoil:
    """An index instead of the whole file."""

    def spoil(place: Place, folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "one.safetensors")
        place.file(f"{folder.name}/{INDEX}", content)

    return spoil


def torch_file(write: Callable[[Path], Any]) -> Spoil:
    """pytorch_model.bin instead of safetensors."""

    def spoil(place: Place, folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        write(folder / "pytorch_model.bin")

    return spoil


def two_shards_with_one_name(place: Place, folder: Path) -> None:
    held = load_file(folder / WEIGHTS)
    name = first(held, "norm.weight")
    (folder / WEIGHTS).unlink()
    save_file(held, folder / "one.safetensors")
    save_file({name: held[name] + 1}, folder / "two.safetensors")
    places = dict.fromkeys(held, "one.safetensors") | {"other": "two.safetensors"}
    place.file(f"{folder.name}/{INDEX}", {"weight_map": places})


def lora_folder(place: Place) -> Path:
    """LoRA matrices without the file that says what they are."""
    folder = place.stock()
    (folder / WEIGHTS).unlink()
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    return folder


def lora_without_weights(place: Place) -> Call:
    folder = place.stock()
    (folder / WEIGHTS).unlink()
    place.file("model/adapter_config.json", {"peft_type": "LORA"})
    return place.command("inspect", folder)


def into(output: Callable[[Place, Path], Any]) -> Callable[[Place], Call]:
    """`convert` of a sound checkpoint to a place that must not be written."""

    def make(place: Place) -> Call:
        folder = place.stock()
        return place.command("convert", folder, "--to", "llava", "--output", output(place, folder))

    return make


def link_to_input(place: Place, folder: Path) -> Path:
    (place.root / "link").symlink_to(folder, target_is_directory=True)
    return place.root / "link"


def link_below_input(place: Place, folder: Path) -> Path:
    (place.root / "link").symlink_to(folder, target_is_directory=True)
    return place.root / "link" / "out"


def around_input(place: Place, folder: Path) -> Path:
    (place.root / "outer").mkdir()
    folder.rename(place.root / "outer" / folder.name)
    folder.symlink_to(place.root / "outer" / folder.name, target_is_directory=True)
    return place.root / "outer"


def circle(place: Place, folder: Path) -> Path:
    (place.root / "circle").symlink_to(place.root / "circle")
    return place.root / "circle"


class _Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": _Harmful()}))


@functools.cache
def _converted() -> Path:
    """The tiny llava checkpoint as one of HF, whose tokens beyond llava's can be cut off again."""
    from llava_patch.tools.convert.command import convert

    return convert(places._llava(), places._made() / "converted", "hf")


DEEP = "[" * 100_000
DAMAGED = "as a whole"
CONFIGS: tuple[tuple[str, Spoil, tuple[str, ...]], ...] = (
    ("a list", writes("config.json", []), ("config.json", "object")),
    ("a string", writes("config.json", '"llava"'), ("config.json", "object")),
    ("null", writes("config.json", "null"), ("config.json", "object")),
    ("empty", writes("config.json", ""), ("config.json", "not valid JSON")),
    ("not UTF-8", writes("config.json", b"\xff\xfe{}"), ("config.json", "not valid JSON")),
    ("nested without end", writes("config.json", DEEP), ("config.json", "not valid JSON")),
    ("cut off", cuts("config.json"), ("config.json", "not valid JSON")),
    ("of a number with 5,000 digits", writes("config.json", "1" * 5000), ("config.json", "not valid JSON")),
    ("another model's", edits("config.json", model_type="bert"), ("config.json", "model_type", "bert")),
    ("of a model type that is a list", edits("config.json", model_type=["llava"]), ("config.json", "model_type")),
    ("of a text_config that is a string", edits("config.json", text_config="llama"), ("config.json", "text_config")),
    ("of a text_config that is a list", edits("config.json", text_config=[1]), ("config.json", "text_config")),
    ("of a vision_config that is a number", edits("config.json", vision_config=3), ("config.json", "vision_config")),
    (
        "of a depth that is text",
        nested("config.json", "text_config", num_hidden_layers="x"),
        ("config.json", "num_hidden_layers"),
    ),
    (
        "of a negative depth",
        nested("config.json", "text_config", num_hidden_layers=-1),
        ("config.json", "num_hidden_layers"),
    ),
    (
        "of no width",
        nested("config.json", "text_config", hidden_size=0),
        ("config.json", "hidden_size"),
    ),
    (
        "of heads that do not divide the width",
        nested("config.json", "text_config", num_attention_heads=7),
        ("config.json",),
    ),
    (
        "of a vision width that is a list",
        nested("config.json", "vision_config", hidden_size=[16]),
        ("config.json", "hidden_size"),
    ),
    (
        "of a language model that does not exist",
        nested("config.json", "text_config", model_type="nosuch"),
        ("config.json", "nosuch"),
    ),
    (
        "of an activation that does not exist",
        nested("config.json", "text_config", hidden_act="nosuch"),
        ("config.json", "nosuch"),
    ),
    (
        "of a vocabulary too large for any memory",
        nested("config.json", "text_config", vocab_size=10**13),
        ("model",),
    ),
    ("of a patch that is a list", edits("config.json", llava_patch=[1]), ("config.json", "llava_patch")),
)
LLAVA_CONFIGS: tuple[tuple[str, Spoil, tuple[str, ...]], ...] = (
    (
        "a tower that is nowhere",
        edits("config.json", mm_vision_tower="/nosuch/tower"),
        ("/nosuch/tower", "--vision-tower"),
    ),
    (
        "a tower that no hub has",
        edits("config.json", mm_vision_tower="nosuch/tower"),
        ("nosuch/tower", "--vision-tower"),
    ),
    ("a tower that is a number", edits("config.json", mm_vision_tower=7), ("config.json", "mm_vision_tower")),
    ("an empty tower", edits("config.json", mm_vision_tower=""), ("config.json", "mm_vision_tower")),
    ("no width of the tower", edits("config.json", mm_hidden_size=None), ("config.json", "mm_hidden_size")),
    ("a width that is text", edits("config.json", mm_hidden_size="x"), ("config.json", "mm_hidden_size")),
    (
        "a select layer that is text",
        edits("config.json", mm_vision_select_layer="x"),
        ("config.json", "mm_vision_select_layer"),
    ),
    ("a projector that is a list", edits("config.json", mm_projector_type=[1]), ("config.json", "mm_projector_type")),
    ("a depth that is text", edits("config.json", num_hidden_layers="x"), ("config.json", "num_hidden_layers")),
)
FILES: tuple[tuple[str, Spoil, tuple[str, ...]], ...] = (
    ("weights cut off", cuts(WEIGHTS), (WEIGHTS, DAMAGED)),
    ("weights of five bytes", writes(WEIGHTS, b"\x01\x02\x03\x04\x05"), (WEIGHTS, DAMAGED)),
    ("weights of no bytes", writes(WEIGHTS, b""), (WEIGHTS, DAMAGED)),
    ("weights missing", removes(WEIGHTS), ("no weights", WEIGHTS)),
    ("an index without weight_map", index({"metadata": {}}), (INDEX, "weight_map")),
    ("an index that is a list", index([]), (INDEX, "object")),
    ("an index that is cut off", index('{"weight_map": {'), (INDEX, "not valid JSON")),
    ("an index whose weight_map is a list", index({"weight_map": ["a"]}), (INDEX, "weight_map")),
    ("an index whose weight_map is empty", index({"weight_map": {}}), (INDEX, "weight_map")),
    ("an index that names numbers", index({"weight_map": {"a": 3}}), (INDEX, "weight_map", "3")),
    (
        "an index that names a file outside",
        index({"weight_map": {"a": "../x.safetensors"}}),
        (INDEX, "../x.safetensors"),
    ),
    ("an index that names an absolute file", index({"weight_map": {"a": "/etc/passwd"}}), (INDEX, "/etc/passwd")),
    (
        "an index that names a missing file",
        index({"weight_map": {"a": "two.safetensors"}}),
        (INDEX, "two.safetensors is missing"),
    ),
    ("an index that names a file of another kind", index({"weight_map": {"a": "config.json"}}), ("config.json",)),
    ("two shards that hold one name", two_shards_with_one_name, ("two.safetensors", "norm.weight", "twice")),
    ("a torch file that is text", torch_file(lambda path: path.write_text("no")), ("pytorch_model.bin", "download")),
    ("a torch file of no bytes", torch_file(lambda path: path.write_bytes(b"")), ("pytorch_model.bin", "download")),
    ("a pickle that would run a program", torch_file(_pickled), ("pytorch_model.bin", "save it again")),
    (
        "a torch file of an object",
        torch_file(lambda path: torch.save({"a": _Harmful()}, path)),
        ("pytorch_model.bin", "not read"),
    ),
    (
        "a torch file of a list",
        torch_file(lambda path: torch.save([torch.ones(1)], path)),
        ("pytorch_model.bin", "no named tensors"),
    ),
    (
        "a torch file without tensors",
        torch_file(lambda path: torch.save({"a": 1}, path)),
        ("pytorch_model.bin", "no named tensors"),
    ),
)
TENSORS: tuple[tuple[str, Spoil, tuple[str, ...]], ...] = (
    (
        "a tensor too few",
        tensors(lambda held: {k: v for k, v in held.items() if k != first(held, "norm.weight")}),
        ("norm.weight", "is missing"),
    ),
    ("a tensor too many", tensors(lambda held: held | {"more": torch.ones(1)}), ("more",)),
    (
        "a tensor of another shape",
        tensors(lambda held: held | {first(held, "q_proj.weight"): torch.ones(3, 3)}),
        ("q_proj.weight", "shape"),
    ),
    (
        "a tensor of integers",
        tensors(lambda held: held | {(n := first(held, "q_proj.weight")): held[n].to(torch.int8)}),
        ("q_proj.weight", "int8"),
    ),
    (
        "a tensor of complex numbers",
        tensors(lambda held: held | {(n := first(held, "q_proj.weight")): held[n].to(torch.complex64)}),
        ("q_proj.weight", "complex64"),
    ),
    (
        "a tensor of no dimension",
        tensors(lambda held: held | {first(held, "embed_tokens.weight"): torch.tensor(1.0)}),
        ("embed_tokens.weight", "shape"),
    ),
)
TOKENIZERS: tuple[tuple[str, Spoil, tuple[str, ...]], ...] = (
    ("tokenizer.json cut off", cuts("tokenizer.json"), ("tokenizer.json",)),
    ("tokenizer.json a list", writes("tokenizer.json", []), ("tokenizer.json",)),
    ("tokenizer.json without added_tokens", edits("tokenizer.json", added_tokens=None), ("tokenizer.json",)),
    ("tokenizer_config.json a list", writes("tokenizer_config.json", []), ("tokenizer_config.json", "object")),
    (
        "tokenizer_config.json not UTF-8",
        writes("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", "not valid JSON"),
    ),
    ("no tokenizer", removes("tokenizer.json"), ("no tokenizer", "tokenizer.json")),
)
OTHER_FILES: tuple[tuple[str, Spoil, tuple[str, ...]], ...] = (
    ("processor_config.json a list", writes("processor_config.json", []), ("processor_config.json", "object")),
    (
        "processor_config.json of an image processor that is a list",
        edits("processor_config.json", image_processor=[1]),
        ("processor_config.json", "image_processor"),
    ),
    ("generation_config.json a list", writes("generation_config.json", []), ("generation_config.json", "object")),
    ("generation_config.json cut off", cuts("generation_config.json"), ("generation_config.json", "not valid JSON")),
    (
        "processor files missing",
        removes("processor_config.json", "preprocessor_config.json"),
        ("preprocessor_config.json", "--vision-tower"),
    ),
    (
        "what llava's config said is a list",
        edits("config.json", original_llava_config=[1]),
        ("config.json", "original_llava_config"),
    ),
    (
        "what llava's config said has no vocabulary",
        edits("config.json", original_llava_config={"added_tokens": []}),
        ("config.json", "original_llava_config", "vocab_size"),
    ),
)


def rows(command: str, make: Callable[..., Any], cases: Any, kind: str = "") -> list[Row]:
    """Rows of one command over cases."""
    return [Row(command, f"{kind}{what}", make(spoil), says) for what, spoil, says in cases]


def named(command: str, *words: Any) -> Callable[[Place], Call]:
    """A command with these words alone."""
    return lambda place: place.command(command, *words)


def on(command: str, spoil: Spoil, *words: Any) -> Callable[[Place], Call]:
    """A command on a stock HF checkpoint, once it is spoilt."""

    def make(place: Place) -> Call:
        folder = place.stock()
        spoil(place, folder)
        return place.command(command, folder, *words)

    return make


def unpatched(place: Place) -> Call:
    return place.command("merge", place.stock(), "--output", "out")


def base_is_gone(command: str, *words: Any) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        place.edit(place.adapter() / "llava_patch.json", base="/nosuch/base")
        return place.command(command, "adapter", *words)

    return make


def busy(place: Place) -> Call:
    """Another process writes to the same folder; here a lock by another hand."""
    folder = place.stock()
    shutil.rmtree(folder)
    shutil.copytree(_converted(), folder)
    place.file(".out.lock")

    def run() -> None:
        import filelock

        with filelock.FileLock(place.root / ".out.lock"):
            place.command("convert", folder, "--to", "llava", "--output", "out")()

    return run


def full(at_once: bool) -> Callable[[Place], Call]:
    """A disk that has no room: it is known before, or found out on the way (files may not grow there)."""

    def make(place: Place) -> Call:
        shutil.copytree(_converted(), place.root / "model")
        command = place.command("convert", "model", "--to", "llava", "--output", "out")

        def run() -> None:
            if at_once:
                usage = shutil.disk_usage(place.root)._replace(free=1000)
                with mock.patch("shutil.disk_usage", return_value=usage):
                    return command()
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            try:
                return command()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        return run

    return make


def lora(place: Place) -> Call:
    lora_folder(place)
    return place.command("convert", "model", "--to", "llava", "--output", "out")


def other_tower(place: Place) -> Call:
    """A tower that differs from the checkpoint's own."""
    shutil.copytree(_converted(), place.root / "model")
    tower = places._made() / "tower" / "clip"
    shutil.copytree(tower, place.root / "tower")
    held = load_file(place.root / "tower" / WEIGHTS)
    name = first(held, "fc1.weight")
    save_file(held | {name: held[name] + 1}, place.root / "tower" / WEIGHTS, metadata={"format": "pt"})
    return place.command("convert", "model", "--to", "llava", "--output", "out", "--vision-tower", "tower")


def tower_of_another_kind(place: Place) -> Call:
    folder = place.llava()
    place.file("tower/config.json", {"model_type": "siglip"})
    return place.command("convert", folder, "--to", "hf", "--output", "out", "--vision-tower", "tower")


def tower_without_weights(place: Place) -> Call:
    folder = place.llava()
    shutil.copytree(places._made() / "tower" / "clip", place.root / "tower")
    (place.root / "tower" / WEIGHTS).unlink()
    return place.command("convert", folder, "--to", "hf", "--output", "out", "--vision-tower", "tower")


def measured(command: str, spoil: Spoil, *words: Any) -> Callable[[Place], Call]:
    """A measurement of a stock HF checkpoint on one picture, once the checkpoint is spoilt."""

    def make(place: Place) -> Call:
        folder = place.stock()
        spoil(place, folder)
        picture = place.image()
        data = ["--data", picture] if command == "attention-maps" else [picture]  # it takes several checkpoints
        return place.command(command, folder, *data, *words, "--output", "result", "--device", "cpu")

    return make


def not_a_number(held: dict[str, torch.Tensor]) -> None:
    held[first(held, "down_proj.weight")][0, 0] = float("nan")


def output_is_a_file(command: str, below: str = "", *words: Any) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        return place.command(command, *words, "--output", f"{place.file('file', 'x')}{below}")

    return make


def measured_into_a_file(place: Place) -> Call:
    return place.command("saturation", place.stock(), place.image(), "--output", place.file("file", "x") / "y")


def gin_of_bytes(place: Place) -> Call:
    return place.command("gin-files", place.file("bytes.gin", b"\xff\xfe"))


TO = ("--to", "llava", "--output", "out")
NOT_THERE = (
    ("a path that leads nowhere", "/nosuch/model", ("/nosuch/model", "no such folder")),
    ("a relative path that leads nowhere", "./nosuch", ("./nosuch", "no such folder")),
    ("a name that is not on this machine", "nosuch/model", ("nosuch/model", "not on this machine", "hf download")),
    ("a word that is no folder", "nosuch", ("nosuch", "no such folder", "hf download nosuch")),
    ("no name at all", "", ("no such folder",)),
)
OUTPUTS: tuple[tuple[str, Callable[[Place, Path], Any], tuple[str, ...], int], ...] = (
    ("the input itself", lambda place, folder: folder, ("model", "the input itself"), 2),
    ("the input through a link", link_to_input, ("link", "the input itself"), 2),
    ("inside the input", lambda place, folder: folder / "out", ("out", "inside the input"), 2),
    ("inside the input through a link", link_below_input, ("out", "inside the input"), 2),
    ("around the input", around_input, ("outer", "has the input"), 2),
    ("a file", lambda place, folder: place.file("file", "x"), ("file", "name a new one"), 2),
    ("below a file", lambda place, folder: place.file("file", "x") / "out", ("file is a file", "name another"), 2),
    ("a folder that is not empty", lambda place, folder: place.file("full/x", "x").parent, ("full", "not an empty"), 2),
    ("a link to itself", circle, ("circle", "name another"), 2),
    ("a name that is too long", lambda place, folder: "x" * 300, ("xxx", "too long", "name another"), 2),
)
MEASURED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("saturation", ()),
    ("attention-maps", ()),
    ("gradients", ()),
    ("drift", ("--base", "model")),
    ("reach", ()),
)
MEASURED_ON: tuple[tuple[str, Spoil, tuple[str, ...]], ...] = (
    ("with a weight that is no number", tensors(not_a_number), ("down_proj.weight", "NaN", "earlier checkpoint")),
    ("with weights that are cut off", cuts(WEIGHTS), (WEIGHTS, DAMAGED, "download")),
    ("with a tensor too few", TENSORS[0][1], ("norm.weight is missing", "download")),
    ("with a tensor of another shape", TENSORS[2][1], ("model", "cannot be loaded", "inspect")),
    ("whose config.json is a list", writes("config.json", []), ("config.json", "object")),
    ("whose tokenizer is cut off", cuts("tokenizer.json"), ("model", "cannot be loaded", "download")),
)
ROWS = [
    *rows("convert", convert, CONFIGS, "config.json "),
    *rows("convert", lambda spoil: convert(spoil, "llava"), LLAVA_CONFIGS, "llava's config.json with "),
    *rows("convert", convert, FILES),
    *rows("convert", convert, TENSORS),
    *rows("convert", convert, TOKENIZERS),
    *rows("convert", lambda spoil: convert(spoil, "llava"), [TOKENIZERS[0], *TOKENIZERS[3:]], "of llava: "),
    *rows("convert", convert, OTHER_FILES),
    Row("convert", "config.json missing", convert(removes("config.json")), ("model", "no config.json")),
    *(Row("convert", f"CKPT {what}", named("convert", name, *TO), says) for what, name, says in NOT_THERE),
    *(Row("convert", f"--output {what}", into(place), says, code) for what, place, says, code in OUTPUTS),
    Row("convert", "a host that does not exist", named("convert", "x", "--to", "jax", "--output", "o"), ("--to jax",)),
    Row(
        "convert",
        "to the host that it is of",
        on("convert", lambda place, folder: 0, "--to", "hf", "--output", "o"),
        ("model", "hf already"),
    ),
    Row("convert", "LoRA files without adapter_config.json", lora, ("model", "LoRA", "merge it first")),
    Row("convert", "another tower", other_tower, ("--vision-tower tower", "leave it out")),
    Row("convert", "a tower of another kind", tower_of_another_kind, ("tower", "siglip")),
    Row("convert", "a tower without weights", tower_without_weights, ("tower", "no weights")),
    Row("convert", "an adapter whose base is gone", base_is_gone("convert", *TO), ("llava_patch.json", "/nosuch/base")),
    Row("convert", "a folder in which another run writes", busy, ("out", "another run", "--output"), 1),
    Row("convert", "a disk without room", full(True), ("out", "GB left", "name another folder"), 1),
    Row("convert", "a disk that fills on the way", full(False), ("out", "name another folder"), 1),
    *rows("merge", lambda spoil: merge(spoil, "full"), [case for case in FILES if "torch" not in case[0]]),
    Row("merge", "a stock checkpoint", unpatched, ("model", "nothing to merge")),
    Row(
        "merge",
        "an adapter whose base is gone",
        base_is_gone("merge", "--output", "out"),
        ("llava_patch.json", "/nosuch/base"),
    ),
    *(Row("merge", f"CKPT {what}", named("merge", name, "--output", "out"), says) for what, name, says in NOT_THERE),
    Row("merge", "adapter weights missing", merge(removes("llava_patch.safetensors")), ("llava_patch.safetensors",)),
    Row(
        "merge", "adapter weights cut off", merge(cuts("llava_patch.safetensors")), ("llava_patch.safetensors", DAMAGED)
    ),
    *rows("inspect", inspect, CONFIGS[:12], "config.json "),
    Row("inspect", "config.json missing", inspect(removes("config.json")), ("model", "config.json", "name the folder")),
    *rows("inspect", inspect, [case for case in FILES if case[0] != "weights missing"]),
    *(Row("inspect", f"CKPT {what}", named("inspect", name), says) for what, name, says in NOT_THERE),
    *(
        Row("inspect", f"--base {what}", on("inspect", lambda place, folder: 0, "--base", name), ("--base", *says))
        for what, name, says in NOT_THERE[:-1]
    ),
    Row("inspect", "LoRA without its weights", lora_without_weights, ("adapter_config.json", "adapter_model")),
    *(Row("flops", f"CKPT {what}", named("flops", name), says) for what, name, says in NOT_THERE[:-1]),
    *(Row("drift", f"CKPT {what}", named("drift", name), says) for what, name, says in NOT_THERE[:-1]),
    *(
        Row("report", f"CKPT {what}", named("report", name, "--output", "r"), says)
        for what, name, says in NOT_THERE[:-1]
    ),
    *(
        Row(command, f"a checkpoint {what}", measured(command, spoil, *words), says)
        for command, words in MEASURED
        for what, spoil, says in MEASURED_ON
    ),
    Row("bench", "--output is a file", output_is_a_file("bench"), ("file: is a file", "expected a folder")),
    Row("bench", "--output below a file", output_is_a_file("bench", "/x"), ("file is a file", "expected a folder")),
    Row("bench", "a shape that is not known", named("bench", "--shape", "x"), ("--shape x", "small")),
    Row("bench", "a split behind the last layer", named("bench", "--split", 99), ("--split 99", "0..30")),
    Row("bench", "another attention", named("bench", "--attention", "x"), ("--attention x", "sdpa")),
    Row("bench", "another precision", named("bench", "--dtype", "int8"), ("--dtype int8", "float32")),
    Row("saturation", "--output below a file", measured_into_a_file, ("file is a file", "expected a folder")),
    Row("gin-files", "a file that is not there", named("gin-files", "nosuch.gin"), ("nosuch.gin", "lists them")),
    Row("gin-files", "a file that is no text", gin_of_bytes, ("bytes.gin", "UTF-8")),
]
