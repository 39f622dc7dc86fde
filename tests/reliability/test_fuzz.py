"""Whatever bytes are in a file of ours: it is read, or there is one error of ours, which names it."""

from __future__ import annotations

import copy
import json
import os
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_patch.core.errors import LlavaPatchError
from tests.reliability.good import KINDS, Kind

EXAMPLES = int(os.environ.get("LLAVA_PATCH_FUZZ", "25"))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([10**400, -(10**25), 2**63, 1e308, 0.5, -1.0]),
    st.sampled_from([float("nan"), float("inf"), "", "x", "\ud800", "\x00", "../../x", "a" * 300]),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.sampled_from("abc"), SCALARS, max_size=2))


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in inside for path in places(item, (*here, key)))]


def replaced(value: Any, data: st.DataObject) -> Any:
    """A JSON value with another one, or nothing, in a place of it."""
    path = data.draw(st.sampled_from(places(value)), label="path")
    if not path:
        return data.draw(VALUES, label="value")
    whole = owner = copy.deepcopy(value)
    for key in path[:-1]:
        owner = owner[key]
    if isinstance(owner, dict) and data.draw(st.booleans(), label="take away"):
        del owner[path[-1]]
    else:
        owner[path[-1]] = data.draw(VALUES, label="value")
    return whole


def damaged(good: bytes, name: str, data: st.DataObject) -> bytes:
    """The bytes of a file, damaged in one way."""
    tensors = name.endswith(".safetensors")
    ways = ["bytes", "cut", "flip", *([] if name.endswith(".gin") else ["value"] * 3)]
    way = data.draw(st.sampled_from(ways), label="way")
    if way == "bytes":
        return data.draw(st.binary(max_size=60), label="bytes")
    if way == "cut":
        return good[: data.draw(st.integers(0, max(0, len(good) - 1)), label="length")]
    if way == "flip":
        end = min(len(good), 4096) - 1 if data.draw(st.booleans(), label="in front") else len(good) - 1
        at = data.draw(st.integers(0, end), label="at")
        return good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255), label="bits")]) + good[at + 1 :]
    if tensors:
        (length,) = struct.unpack("<Q", good[:8])
        header = json.loads(good[8 : 8 + length])
        text = json.dumps(replaced(header, data)).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]
    if name.endswith(".jsonl"):
        lines = good.decode().splitlines()
        number = data.draw(st.integers(0, len(lines) - 1), label="line")
        lines[number] = json.dumps(replaced(json.loads(lines[number]), data))
        return ("\n".join(lines) + "\n").encode()
    return json.dumps(replaced(json.loads(good), data)).encode()


class Good(dict):
    """Files and their bytes by the kind's name; a failure does not print them."""

    def __repr__(self) -> str:
        return "the good files"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """Every kind's good file and its bytes."""
    made = Good()
    for number, kind in enumerate(KINDS):
        path = kind.write(tmp_path_factory.mktemp(f"kind{number}"))
        made[kind.name] = path, path.read_bytes()
    return made


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_we_wrote_is_read(kind: Kind, good: Good) -> None:
    assert kind.read(good[kind.name][0]) is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_any_bytes_are_read_or_refused_in_our_words(kind: Kind, good: Good, data: st.DataObject) -> None:
    path, before = good[kind.name]
    path.write_bytes(damaged(before, path.name, data))
    try:
        kind.read(path)
    except LlavaPatchError as error:
        assert str(error) and "Traceback" not in str(error)
    finally:
        path.write_bytes(before)
