"""Reading back: one reader for every file of ours, and one error, which names the file, for whatever is wrong with it.

Imports neither torch nor safetensors before a file of tensors is opened: the start-up hook reads settings files.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import CheckpointError, LlavaPatchError, brief, shown

if TYPE_CHECKING:
    from torch import Tensor

UNREADABLE = (OSError, ValueError, RecursionError)
"""What reading text, JSON or tensors of a damaged file raises in Python's own code."""
_BLOCK = 1 << 22
_HEADER = 100_000_000  # bytes that safetensors allows
_PLACES, _PLACE = 16, 64  # places of a tensor that are sampled, and bytes of each
Error = type[LlavaPatchError]


def read_json(path: Path, error: Error = CheckpointError, advice: str = "") -> Any:
    """The value in a JSON file; `error` names the file and says what to do (`advice`, which begins with ": ")."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or brief(reason)}){advice}") from reason
    except UNREADABLE as reason:
        raise error(f"{path}: not valid JSON ({brief(reason)}){advice}") from reason


def read_text(path: Path, error: Error = CheckpointError, advice: str = "") -> str:
    """The text of a file in UTF-8; `error` names the file."""
    try:
        return path.read_text(encoding="utf-8")
    except UNREADABLE as reason:
        what = getattr(reason, "strerror", None) or f"not text in UTF-8: {brief(reason)}"
        raise error(f"{path}: cannot be read ({what}){advice}") from reason


def read_object(path: Path, error: Error = CheckpointError, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file; as `read_json`."""
    value = read_json(path, error, advice)
    if not isinstance(value, dict):
        raise error(f"{path}: not valid JSON of this kind (it holds {shown(value)}, expected an object){advice}")
    return value


def field(
    values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: Any, error: Error = CheckpointError
) -> Any:
    """A field of an object that was read; `error` names file and field where it is missing or of another kind."""
    if name not in values:
        raise error(f"{where}: {name} is missing")
    value = values[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(_WORDS.get(one, one.__name__) for one in kinds)
        raise error(f"{where}: {name} = {shown(value)}: expected {expected}")
    return value


_WORDS = {
    str: "text", int: "an integer", float: "a number", dict: "an object", list: "a list", bool: "true or false",
    type(None): "null",
}  # fmt: skip


# --- tensors ----------------------------------------------------------------------------------------------------------


def read_tensors(path: Path, error: Error = CheckpointError, advice: str = "") -> "dict[str, Tensor]":
    """The tensors of a safetensors file by name, on the CPU; `error` names the file that is missing or not whole."""
    return read_tensors_and_metadata(path, error, advice)[0]


def read_tensors_and_metadata(
    path: Path, error: Error = CheckpointError, advice: str = ""
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The same with what the file says beside them."""
    with _opened(path, error, advice) as stream:
        return {name: stream.get_tensor(name) for name in list(stream.keys())}, stream.metadata() or {}


def read_shapes(
    path: Path, error: Error = CheckpointError, advice: str = ""
) -> "tuple[dict[str, tuple[int, ...]], dict[str, str]]":
    """The shapes of a safetensors file's tensors by name, and what it says beside them; no value is read."""
    with _opened(path, error, advice) as stream:
        names = list(stream.keys())
        return {name: tuple(stream.get_slice(name).get_shape()) for name in names}, stream.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path, error: Error, advice: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            yield stream
    except FileNotFoundError as reason:
        raise error(f"{path}: is missing{advice}") from reason
    except (*UNREADABLE, SafetensorError, RuntimeError, KeyError, AttributeError) as reason:
        raise error(f"{path}: cannot be read as a whole safetensors file ({brief(reason)}){advice}") from reason


def check_values(tensors: "Mapping[str, Tensor]", where: Any, error: Error = CheckpointError) -> None:
    """Refuse weights that are no floating-point numbers, or not finite; the error names file and tensor."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise error(
                f"{where}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected floating-point weights: the "
                "file was changed after it was written; save again"
            )
        values = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats do not know
        if not bool(values.isfinite().all()):
            raise error(
                f"{where}: {name} holds values that are not finite (NaN or infinity): the training diverged; go back "
                "to an earlier checkpoint"
            )


def checksum(path: Path) -> str:
    """Hexadecimal digest of a file's bytes; CheckpointError: it cannot be read."""
    found = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                found.update(block)
    except OSError as reason:
        raise CheckpointError(f"{path}: cannot be read ({reason.strerror or brief(reason)})") from reason
    return found.hexdigest()


def sampled_checksum(path: Path) -> str:
    """Hexadecimal digest of a safetensors file's header and of a few places in each tensor; CheckpointError as above.

    Training changes nearly all values of a tensor, so that files of two saves differ; 13 B parameters take a second.
    """
    found = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(size, _HEADER))
            found.update(header)
            entries = [entry for name, entry in sorted(json.loads(header).items()) if name != "__metadata__"]
            for begin, end in (entry["data_offsets"] for entry in entries):
                last = max(end - begin - _PLACE, 0)
                for place in sorted({last * number // (_PLACES - 1) for number in range(_PLACES)}):
                    stream.seek(8 + size + begin + place)
                    found.update(stream.read(min(_PLACE, end - begin)))
    except (*UNREADABLE, LookupError, TypeError, AttributeError) as reason:
        raise CheckpointError(f"{path}: cannot be read as a whole safetensors file ({brief(reason)})") from reason
    return found.hexdigest()


def strings(values: Any) -> bool:
    """Whether a value that was read is a list of text."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def numbers(values: Any) -> bool:
    """Whether a value that was read is a list of finite numbers."""
    return isinstance(values, list) and all(is_finite(value) for value in values)


def is_a_number(value: Any) -> bool:
    """Whether a value is a number, infinite or not a number as it may be; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; True and False are none."""
    if not is_a_number(value):
        return False
    try:
        return abs(float(value)) < float("inf")
    except OverflowError:
        return False


def first_unknown(values: Iterable[str], known: Iterable[str]) -> str | None:
    """The first name, in order of the alphabet, that is not among the known ones."""
    return next(iter(sorted(set(values) - set(known))), None)
