"""The measurement protocol: what a measurement is, what it gives back, and how several results are put side by side.

One class derived from `Measurement`, in a file of its own and named once in `core.registry`, has a command, gin
bindings, a section of the report and, with `metrics`, what an lmms-eval task needs. Such a file imports torch inside
its functions only: every `llava-patch --help` reads it.
"""

import contextlib
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin

from llava_patch.core import plotting, registry
from llava_patch.core.errors import InputError, LlavaPatchError, SettingError, brief, shown
from llava_patch.core.extras import optional
from llava_patch.core.files import plain, write_json
from llava_patch.core.stored import is_finite, read_object
from llava_patch.data.target import Target
from llava_patch.settings.active import settings_of

if TYPE_CHECKING:
    from typing_extensions import Self

Table = tuple[list[str], list[list[str]]]
"""Head and rows; the first column is a name."""
FIGURES = ("png", "pdf")
"""Formats that `--format` takes."""
COUNTS = ("max_samples", "samples")
"""Fields of settings that --samples stands for."""
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, LlavaPatchError)
"""What reading values of the wrong kinds raises, once they are read from a file."""
LARGEST = 10**30
"""No count is larger: beyond, floats and formats give up."""
NOT_WRITTEN = {"written": False}
"""Metadata of a result's field that stays in memory, such as pictures for its figure."""


class NothingToMeasure(Exception):
    """A section of a report has nothing to measure; the message says why."""


class Measurement:
    """One thing that can be measured on a checkpoint; the class docstring is the help of its command.

    The command is made from it: the fields of `settings` and the keyword-only parameters of `measure` are its options,
    and the lines about them in the two docstrings are their help.
    """

    # In the registry, of results' files, of the report's section and of the lmms-eval task; the command has dashes.
    name: ClassVar[str]
    title: ClassVar[str]  # heading of the report's section
    about: ClassVar[str]  # the report's paragraph: what is measured, and how to read it
    # What the report explains of it, with equation and source, by the name under which its sentences say it.
    terms: ClassVar[dict[str, str]] = {}
    alt: ClassVar[str] = ""  # what the figure shows, in words, for who cannot see it
    # Frozen dataclass that gin binds under its own name; None: all options are of the command. Its field `samples`, or
    # `max_samples`, is --samples, and its field `base` is what --base says unless it is bound.
    settings: ClassVar[Any] = None
    result: ClassVar[str]  # "MODULE:ATTRIBUTE" of the `Result` class
    # How many samples the command takes unless told otherwise; None: it takes no data, and loads no model.
    samples: ClassVar[int | None] = 32
    compares: ClassVar[bool] = False  # whether a base is measured beside the checkpoint
    optional: ClassVar[bool] = False  # whether CKPT may be left out, see `subject`
    # Whether the command takes several checkpoints (DATA is --data then), whose results are put `beside` each other.
    several: ClassVar[bool] = False
    resumes: ClassVar[bool] = False  # whether the command, interrupted, goes on where it was
    gpu_dtype: ClassVar[str] = "float16"  # of the model on a GPU where --dtype is not given, for the command's help
    extras: ClassVar[tuple[str, ...]] = ("figures",)  # of pyproject.toml, see `core.extras`
    words: ClassVar[dict[str, str]] = {}  # spelling of single options, such as {"everything": "--all"}
    hidden: ClassVar[tuple[str, ...]] = ()  # fields of `settings` that are no options
    # What its numbers do not depend on: fields of `settings`, and options of `measure` ("--show"). See `asked`.
    aside: ClassVar[tuple[str, ...]] = ()
    sources: ClassVar[tuple[str, ...]] = ()  # options of `measure` that name data
    # "MODULE:FUNCTION" that makes a `Comparison` of results by their names; "": they are not compared.
    compare: ClassVar[str] = ""
    readers: ClassVar[tuple[str, ...]] = ()  # who else reads its bindings, for `llava-patch doctor`
    # Field of `Report` that says how many samples its section takes; "": the settings' own number.
    report_count: ClassVar[str] = "samples"
    # Of the lmms-eval task: its value from all documents' `entries`, by the metric's name; the first one's entries are
    # whole items, from which `pooled` makes the result that is written.
    metrics: ClassVar[dict[str, Callable[[Sequence[Any]], float | int | None]]] = {}

    @property
    def command(self) -> str:
        """The word of the console command."""
        return self.name.replace("_", "-")

    @property
    def count_field(self) -> str | None:
        """The field of the settings that --samples stands for."""
        names = [] if self.settings is None else [field.name for field in dataclasses.fields(self.settings)]
        return next((name for name in COUNTS if name in names), None)

    def measure(self, target: Target, settings: Any, folder: Path | None = None) -> "Result":
        """Measure a checkpoint.

        Args:
            target: the checkpoint with data and base; loads models and makes samples when asked.
            settings: an instance of `settings`, with the number of samples filled in.
            folder: where an unfinished run is kept; None: nowhere.
        """
        raise NotImplementedError

    def check(self, data: str, samples: int | None, **options: Any) -> None:
        """Refuse words of a command (`options`: keywords of `measure`) that do not go together, before any is read."""

    def subject(self, checkpoint: str, **options: Any) -> str:
        """What is measured, as files and folders say it: CKPT, or what stands for one that was left out."""
        return checkpoint

    def stem(self, **options: Any) -> str:
        """Stem of the results' files under some keyword-only parameters of `measure`."""
        return self.name

    def report_settings(self, context: Any) -> Any:
        """Settings for a report's section: gin's, with the report's number of samples where they name none."""
        settings, field = self.settings and settings_of(self.settings), self.count_field
        if field is None or not self.report_count:
            return settings
        count = getattr(settings, field) or getattr(context.settings, self.report_count)
        return dataclasses.replace(settings, **{field: count})

    def recorded(self, context: Any, settings: Any) -> dict[str, Any]:
        """What the section's result depends on beside checkpoint, base and data, as JSON values."""
        return {} if settings is None else dataclasses.asdict(settings)

    def report_words(self, context: Any, settings: Any) -> list[str]:
        """Options of the command that repeats the section."""
        return [] if self.count_field is None else ["--samples", str(getattr(settings, self.count_field) or 0)]

    def why_not(self, context: Any) -> str | None:
        """Why the section cannot be made, as far as that is seen before anything is loaded; None: it can."""
        return context.why_no_base() if self.compares else None

    def in_report(self, context: Any, settings: Any) -> "Result":
        """Measure for a report's section; `NothingToMeasure` says why that cannot be."""
        return self.measure(context, settings)

    def report_tables(self, result: Any) -> list[tuple[str, Table]]:
        """What the section shows: (caption, table) each."""
        return [("", result.table())]

    def document(
        self, anatomies: Sequence[Any], samples: Sequence[dict[str, Any]], settings: Any, number: int
    ) -> dict[str, Any]:
        """Measure one document (`number`, from 0) of the lmms-eval task; gives JSON values.

        Args:
            anatomies: of the live model, and of its base where the measurement compares.
            samples: keyword arguments of each one's forward, of the same document.
            settings: of the task.
            number: of the document.
        """
        raise NotImplementedError

    def entries(self, item: dict[str, Any]) -> dict[str, Any]:
        """What the samples log holds of a document for each metric, from its `document` with the task's facts."""
        return dict.fromkeys(self.metrics, item)

    def pooled(self, items: Sequence[dict[str, Any]]) -> "Result":
        """The result over all documents of a run."""
        raise NotImplementedError

    def tables(self, result: Any) -> list[tuple[str, Table]]:
        """What the command prints: (title, table) each."""
        return [("", result.table())]

    def kept(self, target: Target, settings: Any, folder: Path) -> "Result | None":
        """The result of the very same measurement that an earlier run left in a folder; None: there is none."""
        return None

    def finished(self, folder: Path) -> None:
        """The result is written: take away what an unfinished run would go on from."""

    def make_way(self, folder: Path) -> None:
        """A finished result of another kind is to be replaced: take away what `measure` would refuse to replace."""


@dataclass(frozen=True)
class Result:
    """What a measurement found: the base of result dataclasses, and their one codec.

    A file holds the fields as JSON, its format and version, and what `derived` works out of the fields for those who
    read only the file. NaN becomes null and back.
    """

    NAME: ClassVar[str]  # stem of its files
    TITLE: ClassVar[str]  # what it is a result of, in errors and in the file's format
    VERSION: ClassVar[int] = 1  # of the format; a file that says none is of version 1
    FIGURE: ClassVar[str]  # "MODULE:FUNCTION" that draws it: called with the result and a path, which it returns
    # What was measured, such as checkpoint, data and precision; plain JSON values.
    facts: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def finding(self) -> str:
        """One sentence that a reader can act on; it begins with "Undecided" where the data do not say; "": none."""
        return ""

    def summary(self) -> str:
        """What was found, in a sentence or two: the numbers."""
        raise NotImplementedError

    def caution(self) -> str:
        """What the finding does not say, in a sentence or two; "": nothing."""
        return ""

    def table(self) -> Table:
        """Head and rows."""
        raise NotImplementedError

    def derived(self) -> dict[str, Any]:
        """What the file says beside the fields; not read back."""
        return {}

    @classmethod
    def format(cls) -> str:
        """What a file's "format" says."""
        return f"llava_patch {cls.TITLE} result"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = plain({"format": self.format(), "version": self.VERSION, **self.content()})
        return found

    def content(self) -> dict[str, Any]:
        """All but format and version; facts only where there are some."""
        return {**self.derived(), **self.encode(), **({"facts": self.facts} if self.facts else {})}

    def encode(self) -> dict[str, Any]:
        """The fields but the facts as JSON values."""
        return {name: value for name, value in encode_fields(self).items() if name != "facts"}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "these values") -> "Self":
        """Read what `to_dict` made.

        Raises:
            InputError: not such a result, one of a newer version, or one with a missing, unknown or damaged field; it
                names the file (`where`).
        """
        what = cls.format().removeprefix("llava_patch ")
        if not isinstance(values, dict) or values.get("format", cls.format()) != cls.format():
            raise InputError(f"{where}: not a {what}: name another file, or measure again")
        version = values.get("version", 1)
        if version != cls.VERSION:
            raise InputError(
                f"{where}: a {what} of version {shown(version)}, this version of llava_patch reads {cls.VERSION}: "
                "measure again, or use the llava_patch that wrote it"
            )
        try:
            found = cls.decode({k: v for k, v in values.items() if k not in ("format", "version")})
            if not isinstance(found.facts, dict):
                raise TypeError(f"facts: expected an object, got {shown(found.facts)}")
            unknown = sorted(set(values) - {"facts"} - set(found.to_dict()))
            if unknown:
                raise ValueError(f"unknown: {', '.join(unknown)}")
            found.check()
        except DAMAGED as error:
            kind = "missing" if isinstance(error, KeyError) else type(error).__name__
            raise InputError(
                f"{where}: not a {what} of this version ({kind}: {brief(error)}): measure again"
            ) from error
        return found

    def check(self) -> None:
        """Raise one of `DAMAGED` where the fields are of their types and yet no result: here, what is told of them."""
        for told in (self.finding, self.summary, self.caution, self.table):
            with contextlib.suppress(NotImplementedError):
                told()

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "Self":
        """The fields of JSON values; further ones are passed over, see `from_dict`."""
        found: Self = decode_fields(cls, values, others=True)
        return found

    def save(self, folder: str | Path, name: str = "", formats: Sequence[str] = FIGURES[:1]) -> tuple[Path, ...]:
        """Write NAME.json and the figure into a folder, each whole or not at all; gives the paths, the JSON's first."""
        folder, name = Path(folder), name or self.NAME
        paths = [write_json(folder / f"{name}.json", self.to_dict())]
        return (*paths, *(self.draw(folder / f"{name}.{suffix}") for suffix in formats))

    def draw(self, path: Path) -> Path:
        """Write the figure in the format of the path's suffix; returns the path."""
        written: Path = registry.load(self.FIGURE)(self, path)
        return written

    @classmethod
    def load(cls, path: str | Path) -> "Self":
        """Read a file that `save` wrote; InputError as of `from_dict`."""
        return cls.from_dict(read_object(Path(path), InputError, f" (a {cls.TITLE} result): measure again"), str(path))


@dataclass(frozen=True)
class Comparison:
    """Several results of one kind side by side."""

    results: Mapping[str, Result]  # by name, in order
    head: list[str]  # column titles of the table
    rows: list[list[str]]  # its cells, a line a result
    notes: list[str]  # what keeps them from being compared, and what else is to be said; a sentence each
    figure: str  # "MODULE:FUNCTION" that draws them: called with `results` and a path, which it returns
    title: str = ""  # of the table
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what the file says besides of how it was made

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.asked,
            "results": {name: result.to_dict() for name, result in self.results.items()},
            "table": {"head": self.head, "rows": self.rows},
            "notes": self.notes,
        }

    def save(self, folder: str | Path, name: str = "compare", formats: Sequence[str] = FIGURES[:1]) -> tuple[Path, ...]:
        """Write NAME.json and the figure; returns the paths."""
        folder, draw = Path(folder), registry.load(self.figure)
        written = write_json(folder / f"{name}.json", self.to_dict())
        return (written, *(draw(self.results, folder / f"{name}.{suffix}") for suffix in formats))


def drawn(make: Callable[[Any], Any]) -> Callable[[Any, str | Path], Path]:
    """Of a function that makes a figure of a result, the one that `Result.FIGURE` names: it writes that figure."""

    @functools.wraps(make)
    def write(result: Any, path: str | Path) -> Path:
        with optional("matplotlib").rc_context(plotting.STYLE):
            return plotting.write_figure(make(result), path)

    return write


def default_split(depth: int) -> int:
    """The split of the DPVR paper's 7B model (18 of 32 layers) at another depth."""
    return round(depth * 18 / 32)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    """In what two runs' settings and facts differ, beside the model, as a sentence; None: in nothing."""
    unlike = [f"{key} = {one[key]} (there {other[key]})" for key in one if one[key] != other[key]]
    return f"{names[0]} differs from {names[1]} in more than the model: {', '.join(unlike)}" if unlike else None


def find_result(given: str, file: str) -> Path | None:
    """The result file that an argument names, or that a folder holds (`file`, anywhere below it); None: a checkpoint.

    Raises:
        InputError: a folder with several results below it, or a JSON file that is missing.
    """
    path = Path(given)
    if path.suffix == ".json":
        if not path.is_file():
            raise InputError(f"{given}: no such file")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    if (path / file).is_file():
        return path / file
    below = sorted(path.rglob(file))
    if len(below) > 1:
        raise InputError(f"{given}: holds several results ({below[0]}, {below[1]}, ...): name the ones to compare")
    return below[0] if below else None


def names_of(given: Sequence[str], names: str = "", file: str = "") -> list[str]:
    """What to call several models: by `names`, with commas between them, or what tells their paths apart.

    That is the last part of the paths (result files are called `file`, which says nothing), or the part above it.

    Raises:
        SettingError: another number of names than of models, or one name twice.
    """
    own = words(names)
    if own:
        if len(own) != len(given) or len(set(own)) < len(own):
            raise SettingError(f"--names {','.join(own)}: expected {len(given)} distinct names")
        return own
    paths = [path.resolve() if path.exists() else path for path in map(Path, given)]
    parts = [(path.parent if path.name == file else path).parts for path in paths]
    parts = [tuple(part.removesuffix(".json") for part in path if part not in ("/", "")) for path in parts]
    single = [part[-1] for part in parts]
    above = [part[-2] if len(part) > 1 else part[-1] for part in parts]
    for found in (single, above, [f"{a}__{b}" for a, b in zip(above, single, strict=True)]):
        if len(set(found)) == len(found):
            return found
    return [f"{name}-{i}" for i, name in enumerate(single, 1)]


def words(text: str) -> list[str]:
    """The words of an option that takes several, with commas between them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def encode(value: Any, hint: Any = None) -> Any:
    """Dataclasses as dictionaries of their fields, tuples as lists, dictionaries with other keys than text as pairs.

    `hint` is the value's type, where it is known.
    """
    if isinstance(value, Result):
        return value.content()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return encode_fields(value)
    if isinstance(value, dict):
        keyed = get_args(hint)[:1] == (str,) if get_origin(hint) is dict else all(isinstance(k, str) for k in value)
        return {k: encode(v) for k, v in value.items()} if keyed else [[k, encode(v)] for k, v in value.items()]
    return [encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def encode_fields(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary of the fields that are written."""
    kept = [f for f in dataclasses.fields(value) if f.metadata.get("written", True)]
    return {f.name: encode(getattr(value, f.name), hint_of(type(value), f)) for f in kept}


def decode(hint: Any, value: Any) -> Any:
    """The value of a type that `encode` made into JSON.

    KeyError names a missing field without a default; ValueError: an unknown field; TypeError: a value of another kind.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (hint,) = (one for one in inner if one is not type(None))
        return decode(hint, value)
    if isinstance(hint, type) and issubclass(hint, Result):
        return hint.from_dict(value)
    if dataclasses.is_dataclass(hint):
        return decode_fields(hint, value)
    if hint is float:
        if value is not None and not is_finite(value) and value == value:
            raise TypeError(f"expected a number, got {shown(value)}")
        return float("nan") if value is None else value
    if hint is int:
        if not is_finite(value) or not isinstance(value, int) or abs(value) > LARGEST:
            raise TypeError(f"expected an integer, got {shown(value)}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise TypeError(f"expected a list, got {shown(value)}")
        if origin is tuple and inner[-1] is not Ellipsis:
            return tuple(decode(one, item) for one, item in zip(inner, value, strict=True))
        return origin(decode(inner[0], item) for item in value)
    if origin is dict:
        if inner[0] is str and not isinstance(value, dict):
            raise TypeError(f"expected an object, got {shown(value)}")
        pairs = value.items() if isinstance(value, dict) else value
        return {decode(inner[0], key): decode(inner[1], item) for key, item in pairs}
    if hint is not Any and isinstance(hint, type) and not isinstance(value, hint):
        raise TypeError(f"expected {hint.__name__}, got {shown(value)}")
    return value


def decode_fields(cls: Any, values: Any, others: bool = False) -> Any:
    """A dataclass of its fields' JSON values, which may stand among `others`; see `decode`."""
    if not isinstance(values, dict):
        raise TypeError(f"expected the fields of {cls.__name__}, got {shown(values)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("written", True)}
    unknown = sorted(set(values) - set(fields))
    if unknown and not others:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}")
    found = {}
    for name, one in fields.items():
        if name in values:
            found[name] = decode(hint_of(cls, one), values[name])
        elif one.default is one.default_factory is dataclasses.MISSING:
            raise KeyError(name)
    return cls(**found)


def hint_of(cls: type, one: "dataclasses.Field[Any]") -> Any:
    """The type of a dataclass's field, whose annotation is text where its module defers them."""
    if not isinstance(one.type, str):
        return one.type
    owner = next(base for base in cls.__mro__ if one.name in vars(base).get("__annotations__", {}))
    return eval(one.type, vars(sys.modules[owner.__module__]))
