"""Results, caches and logs that are read back, folders that are written, and the words of the measurement commands."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.reliability import good
from tests.reliability.good import KINDS
from tests.reliability.place import Call, Place, Row

READ = {kind.name: kind for kind in KINDS}
Damage = Callable[[bytes], bytes]


def _changed(**changes: Any) -> Damage:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def _header(data: bytes, **changes: Any) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(json.loads(data[8 : 8 + length]) | changes).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


WHOLE: dict[str, Damage] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "of another encoding": lambda data: b"\xff\xfe\x80" + data,
    "nested too deeply": lambda data: b"[" * 100_000,
    "of a newer version": _changed(version=99),
    "with an unknown field": _changed(of_a_later_version=1),
    "with facts that are a list": _changed(facts=[1]),
}
RESULTS = ("saturation.json", "rprobe.json", "drift.json", "flops.json", "reach.json", "attention_maps.json")
TENSORS: dict[str, Damage] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no tensors": lambda data: b"\x80\x04pickle",
    "without its header": lambda data: _header(data, __metadata__={}),
}
STATES = {
    "the gradients' unfinished window": "delete",
    "saturation's unfinished state": "delete",
    "the probe's unfinished training": "delete",
    "the probe's decoder": "delete",
}


def _damaged(name: str, damage: Damage, missing: bool = False) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        path = READ[name].write(place.root)
        path.write_bytes(damage(path.read_bytes()))
        if missing:
            path.unlink()
        return lambda: READ[name].read(path)

    return make


def _result_rows() -> list[Row]:
    rows = []
    for name in RESULTS:
        for what, damage in WHOLE.items():
            rows.append(Row("results", f"{name}, {what}", _damaged(name, damage), (name, "measure again")))
    return rows


def _state_rows() -> list[Row]:
    found = []
    for name, advice in STATES.items():
        for what, damage in TENSORS.items():
            found.append(Row("unfinished", f"{name}, {what}", _damaged(name, damage), (".safetensors", advice)))
    return found


def _lines(change: Callable[[list[str]], list[str]]) -> Damage:
    return lambda data: ("\n".join(change(data.decode().splitlines())) + "\n").encode()


OTHERS = [
    Row("logs", "gradients.jsonl of another encoding", _damaged("gradients.jsonl", lambda d: b"\xff" + d),
        ("gradients.jsonl", "delete the file")),
    Row("logs", "gradients.jsonl, empty", _damaged("gradients.jsonl", lambda d: b""), ("gradients.jsonl", "delete")),
    Row("logs", "gradients.jsonl, settings that are unknown",
        _damaged("gradients.jsonl", lambda d: d.replace(b'"window": 2', b'"windows": 2')),
        ("gradients.jsonl, line 1", "windows", "delete")),
    Row("logs", "gradients.jsonl, a window of no steps",
        _damaged("gradients.jsonl", lambda d: d.replace(b'"count": 2', b'"count": null')),
        ("gradients.jsonl, line", "delete")),
    Row("logs", "gradients.jsonl, a step that is text",
        _damaged("gradients.jsonl", lambda d: d.replace(b'"step": 2,', b'"step": "2",')), ("line 3", "delete")),
    Row("logs", "gradients.jsonl, a line nested too deeply",
        _damaged("gradients.jsonl", _lines(lambda lines: [*lines[:2], "[" * 100_000, *lines[3:]])),
        ("line 3", "delete")),
    Row("reports", "report.json that is a list", _damaged("report.json", lambda d: b"[]"), ("report.json", "delete")),
    Row("reports", "report.json without sections", _damaged("report.json", _changed(sections=None)),
        ("report.json", "delete")),
    Row("reports", "report.json of a newer format", _damaged("report.json", _changed(format=9)),
        ("report.json", "format 9", "delete")),
    Row("reports", "report.json with a file outside its folder",
        _damaged("report.json", lambda d: d.replace(b'"files": []', b'"files": ["../../x"]')),
        ("report.json", "../../x", "delete")),
    Row("reports", "report.json whose checkpoint is null", _damaged("report.json", _changed(checkpoint=None)),
        ("report.json", "expected str", "delete")),
    Row("runs", "trainer_state.json that is a list", _damaged("trainer_state.json", lambda d: b"[]"),
        ("trainer_state.json", "--run")),
    Row("runs", "trainer_state.json without history", _damaged("trainer_state.json", _changed(log_history=None)),
        ("trainer_state.json", "log_history")),
    Row("runs", "trainer_state.json with steps that are text",
        _damaged("trainer_state.json", lambda d: d.replace(b'"step": 1', b'"step": "x"')),
        ("trainer_state.json", "--run")),
    Row("runs", "ablation.json without runs", _damaged("ablation.json", _changed(runs=None)),
        ("ablation.json", "--rprobe")),
    Row("runs", "ablation.json, cut", _damaged("ablation.json", lambda d: d[:50]), ("ablation.json", "--rprobe")),
    Row("lmms-eval", "results that are a list", _damaged("lmms-eval's results", lambda d: b"[]"),
        ("_results.json", "lmms-eval")),
    Row("lmms-eval", "results without tasks", _damaged("lmms-eval's results", _changed(results={"a": 1})),
        ("_results.json", "lmms-eval")),
    Row("lmms-eval", "results, cut", _damaged("lmms-eval's results", lambda d: d[:30]), ("_results.json", "lmms-eval")),
]  # fmt: skip


def _kept(name: str, content: Any, *words: Any, command: str = "flops") -> Callable[[Place], Call]:
    """A command whose folder holds something else under the name of its result."""

    def make(place: Place) -> Call:
        place.file(f"out/{name}", content)
        return place.command(command, *(word(place) if callable(word) else word for word in words), "--output", "out")

    return make


def _asked(**asked: Any) -> dict[str, Any]:
    return {"sources": ["7b"], "facts": {"checkpoint": "7b", "asked": asked}}


def _two_probes(place: Place) -> list[Path]:
    return [good.rprobe(place.root / "a"), good.rprobe(place.root / "b")]


def _probes(*words: Any, content: Any = None) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        if content is not None:
            place.file("out/compare.json", content)
        return place.command("rprobe", "compare", *_two_probes(place), *words)

    return make


def _busy(*words: str) -> Callable[[Place], Call]:
    """The folder `out` is another process's."""

    def make(place: Place) -> Call:
        from unittest import mock

        from filelock import Timeout

        def busy(path: Path) -> Any:
            raise Timeout(str(path))

        (place.root / "out").mkdir()
        paths = [*_two_probes(place), place.stock()] if "reach" in words else _two_probes(place)
        call = place.command(*(str(paths[int(w[1:])]) if w.startswith("@") else w for w in words), "--output", "out")

        def run() -> None:
            with mock.patch("llava_patch.core.locks._acquire", busy):
                call()

        return run

    return make


def _stock(*words: Any) -> Callable[[Place], Call]:
    return lambda place: place.command(words[0], place.stock(), *words[1:])


OVERWRITE = ("--output", "--overwrite")
REPLACED = [
    Row("kept", "another split", _kept("flops.json", _asked(**{"--split": 3})), ("--split = 3 there", *OVERWRITE)),
    Row("kept", "a result that does not say how", _kept("flops.json", {"sources": ["7b"], "facts": {}}),
        ("flops.json does not say", *OVERWRITE)),
    Row("kept", "another checkpoint", _kept("flops.json", {"facts": {"checkpoint": "13b"}}),
        ("the results of 13b, not of", *OVERWRITE)),
    Row("kept", "a damaged result", _kept("flops.json", "{"), ("flops.json: not valid JSON", *OVERWRITE)),
    Row("kept", "a result that is a list", _kept("flops.json", []), ("flops.json", "expected an object", *OVERWRITE)),
    Row("kept", "a result that is a folder", _kept("flops.json/x", "x", "--overwrite"), ("flops.json", "is a folder")),
    Row("kept", "comparison of other seeds",
        _probes("--output", "out", content={"sources": [], "asked": {}}), ("compare.json does not say", *OVERWRITE)),
    Row("kept", "a comparison that is a string", _probes("--output", "out", content='"x"'),
        ("compare.json", *OVERWRITE)),
    Row("kept", "timings of other options",
        _kept("routing_small.json", {"asked": {"--repeats": 99}}, command="bench"),
        ("--shape = None there, 'small' here", *OVERWRITE)),
    Row("busy", "flops", _busy("flops"), ("another run works in out", "--output"), 1),
    Row("busy", "rprobe compare", _busy("rprobe", "compare", "@0", "@1"), ("another run works in out", "--output"), 1),
    Row("busy", "saturation compare", _busy("saturation", "compare", "@0", "@1"), ("another run works in out",), 1),
    Row("busy", "bench", _busy("bench"), ("another run works in out", "--output"), 1),
    Row("busy", "reach", _busy("reach", "@2"), ("another run works in out", "--output"), 1),
]  # fmt: skip

LONG = "n" * 5_000
WORDS = [
    Row("words", "an output that is a file", lambda p: p.file("f") and p.command("flops", "--output", "f"),
        ("--output f", "is a file", "expected a folder")),
    Row("words", "an output below a file", lambda p: p.file("f") and p.command("flops", "--output", "f/a/b"),
        ("--output f/a/b", "f is a file")),
    Row("words", "an output with a NUL", lambda p: p.command("flops", "--output", "a\0b"),
        ("Invalid value", "--output")),
    Row("words", "an output of 5,000 characters", lambda p: p.command("flops", "--output", LONG),
        ("--output", "cannot be a folder", "another")),
    Row("words", "a comparison's output that is a file",
        lambda p: p.file("f") and p.command("rprobe", "compare", *_two_probes(p), "--output", "f"),
        ("--output f", "is a file")),
    Row("words", "bench's output that is a file", lambda p: p.file("f") and p.command("bench", "--output", "f"),
        ("--output f", "is a file")),
    Row("words", "a format that is unknown", lambda p: p.command("flops", "--format", "svg"),
        ("--format svg", "png or pdf")),
    Row("words", "a format that is empty", lambda p: p.command("flops", "--format", ""), ("--format", "png or pdf")),
    Row("words", "cuda without a GPU", _stock("reach", "--device", "cuda:77x"), ("--device cuda:77x", "expected")),
    Row("words", "a device that is unknown", _stock("saturation", "--device", "tpu"), ("--device tpu", "expected cpu")),
    Row("words", "a precision that is unknown", _stock("saturation", "--dtype", "int3"), ("--dtype int3", "float32")),
    Row("words", "fewer than no samples", _stock("saturation", "--samples", "-1"), ("Invalid value", "--samples")),
    Row("words", "samples that are a word", _stock("drift", "--samples", "many"), ("Invalid value", "--samples")),
    Row("words", "a checkpoint that is a file", lambda p: p.file("m.bin") and p.command("saturation", "m.bin"),
        ("m.bin", "is a file", "folder or hub name")),
    Row("words", "a checkpoint with a NUL", lambda p: p.command("saturation", "a\0b"), ("a\\x00b", "name another")),
    Row("words", "a checkpoint of 5,000 characters", lambda p: p.command("drift", LONG), ("nnn", "name another")),
    Row("words", "a checkpoint that no encoding has", lambda p: p.command("reach", "\ud800"),
        ("ud800", "name another")),
    Row("words", "a checkpoint that is empty", lambda p: p.command("saturation", " "), ("is empty",)),
    Row("words", "an empty result", lambda p: p.command("rprobe", "compare", "a\0", "b"), ("Invalid value",)),
    Row("words", "a result of 5,000 characters", lambda p: p.command("saturation", "compare", LONG, "b"),
        ("nnn", "name another")),
    Row("words", "a source of 5,000 characters", lambda p: p.command("correlate", LONG), ("nnn", "name another")),
    Row("words", "a run with a NUL", lambda p: p.command("gradients", "show", "a\0"), ("Invalid value",)),
    Row("words", "runs with a NUL", lambda p: p.command("gradients", "table", "a\0"), ("Invalid value",)),
    Row("words", "a report from nowhere", lambda p: p.command("report", "--from", "nowhere"),
        ("--from nowhere", "report.json")),
    Row("words", "one result to compare", lambda p: p.command("rprobe", "compare", good.rprobe(p.root / "a")),
        ("one result", "at least two")),
    Row("words", "a baseline that is not there", _probes("--baseline", "c"), ("--baseline c", "expected one of a, b")),
    Row("words", "an option that is unknown", lambda p: p.command("flops", "--overwite"), ("--overwite",)),
    Row("words", "a command that is unknown", lambda p: p.command("satturation"), ("satturation",)),
]  # fmt: skip

ROWS = [*_result_rows(), *_state_rows(), *OTHERS, *REPLACED, *WORDS]
