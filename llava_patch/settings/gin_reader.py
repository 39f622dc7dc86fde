"""Gin files as data: what gin's parser finds in them becomes bindings of our names. Nothing is imported, nothing runs.

Gin's own reader imports what a file asks for and keeps everything in the one configuration of the whole program, which
may be another's, locked, or have names like ours. Its parser alone does none of that, so reading leaves gin as it was.
"""

import difflib
import tokenize
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gin import config_parser as gin
from llava_patch.core.errors import SettingError, short, shown
from llava_patch.core.paths import gin_dir
from llava_patch.settings.checks import is_number, is_text

OWN = "llava_patch."
"""May stand before a name."""
LARGEST_FILE = 1_000_000
"""Bytes of a gin file; the shipped ones have a few thousand."""
_MOST_FILES, _MOST_VALUES, _DEEPEST = 200, 100_000, 20


@dataclass(frozen=True)
class Place:
    """Where a statement is."""

    source: str  # a file's path, or the text of a single binding
    line: int | None = None  # None: a single binding

    def __str__(self) -> str:
        """As messages begin."""
        return short(self.source) if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Reference:
    """A name with @ before it; with () behind it, it stands for the settings of that name."""

    name: str
    called: bool = True

    def __repr__(self) -> str:
        return f"@{self.name}{'()' * self.called}"


@dataclass(frozen=True)
class Macro:
    """A name with % before it, which stands for the value that is set elsewhere."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Binding:
    """A value and where it was bound."""

    value: Any
    place: Place


Bindings = dict[str, dict[str, Binding]]
"""What is bound: {"Routing": {"split": Binding(18, ...)}}."""


def read(files: Sequence[Path], params: Sequence[str], known: Mapping[str, Collection[str] | None]) -> Bindings:
    """Read gin files, then single bindings; the later binding of a setting counts.

    `known` are the names that can be bound, each with its settings (None: any). A file includes others that lie beside
    it, or shipped ones.

    SettingError: anything that is no binding of these names, or cannot be read; names the file and line.
    """
    reader = _Reader(known)
    for path in files:
        reader.read_file(path)
    for text in params:
        reader.read_statements(text, None)
    return reader.resolved()


def hint(word: str, known: Iterable[str], start: str = "; did") -> str:
    """A question after what was probably meant, or nothing."""
    near = difflib.get_close_matches(word[:100], list(known), n=1)
    return f"{start} you mean {near[0]}?" if near else ""


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


class _Reader(gin.ParserDelegate):  # type: ignore[misc]
    """Collects bindings and macros; the parser asks it what stands for a reference and for a macro."""

    def __init__(self, known: Mapping[str, Collection[str] | None]) -> None:
        self.known = known
        self.bindings: Bindings = {}
        self.macros: dict[str, Binding] = {}
        self.used: set[str] = set()  # macros that any binding names, one that a later binding replaced as well
        self.files = self.values = 0

    def configurable_reference(self, name: str, called: bool) -> Reference:
        return Reference(name.removeprefix(OWN), called)

    def macro(self, name: str) -> Macro:
        self.used.add(name)
        return Macro(name)

    def read_file(self, path: Path, inside: tuple[Path, ...] = (), asked: Place | None = None) -> None:
        """Read a file; `inside` are those that include it, and `asked` says where."""
        if path.resolve() in (other.resolve() for other in inside):
            cycle = " > ".join(other.name for other in (*inside, path))
            raise SettingError(f"{asked}: files include one another ({cycle}): take one of these lines out")
        self.files += 1
        if len(inside) > _DEEPEST or self.files > _MOST_FILES:
            raise SettingError(f"{asked}: too many files include others: put the bindings into one file")
        self.read_statements(_text(path), path, (*inside, path))

    def read_statements(self, text: str, path: Path | None, inside: tuple[Path, ...] = ()) -> None:
        """Read a file's text, or a single binding."""
        for statement in self._parse(text, path):
            place = _place(text, path, statement.location.line_num)
            if isinstance(statement, gin.ImportStatement):
                raise SettingError(
                    f"{place}: a gin file cannot import: llava_patch knows its own names only; take the line out"
                )
            if isinstance(statement, gin.IncludeStatement):
                self.read_file(_included(statement.filename, place, path), inside, place)
            elif isinstance(statement, gin.BlockDeclaration):
                self._name(statement.scope, statement.selector, place)
            else:
                self._bind(statement, place)

    def _parse(self, text: str, path: Path | None) -> list[Any]:
        line = text.count("\n", 0, text.index("\0")) + 1 if "\0" in text else 1
        if not is_text(text):
            raise SettingError(f"{_place(text, path, line)}: not text in UTF-8 without NUL, as a gin file is")
        parser, found = None, []
        try:
            parser = gin.ConfigParser(text, self)
            while statement := parser.parse_statement():
                found.append(statement)
        except Exception as error:  # the parser meets any text, and raises whatever comes of it
            _explain(error, text, path, None if parser is None else parser.current_token)
        return found

    def _name(self, scope: str, selector: str, place: Place) -> str:
        name = selector.removeprefix(OWN)
        if scope:
            raise SettingError(f"{place}: a scoped binding has no effect here: bind {short(name)} itself")
        if name not in self.known:
            raise SettingError(f"{place}: {unknown(name, self.known)}")
        return name

    def _bind(self, statement: Any, place: Place) -> None:
        value, setting = statement.value, statement.arg_name
        if not setting:
            self.macros["/".join(filter(None, (statement.scope, statement.selector)))] = Binding(value, place)
            return
        name = self._name(statement.scope, statement.selector, place)
        settings = self.known[name]
        if settings is not None and setting not in settings:
            near = hint(setting, settings)
            raise SettingError(f"{place}: {name} has no setting {short(setting)}, it has {', '.join(settings)}{near}")
        self.bindings.setdefault(name, {})[setting] = Binding(value, place)

    def resolved(self) -> Bindings:
        """The bindings with each macro's value in its place."""
        for name, macro in self.macros.items():
            if name not in self.used:  # `split = 14`
                owner = next((n for n, s in self.known.items() if s and name in (n, *s) and n != "Patch"), "Routing")
                settings = self.known.get(owner) or ("split",)
                example = f"{owner}.{name if name in settings else next(iter(settings))}"
                raise SettingError(
                    f"{macro.place}: {short(name)} = ... sets nothing: write METHOD.setting, as in {example} = ..."
                )
        return {
            name: {
                setting: Binding(self._value(binding.value, f"{name}.{setting}", binding.place), binding.place)
                for setting, binding in bindings.items()
            }
            for name, bindings in self.bindings.items()
        }

    def _value(self, value: Any, setting: str, place: Place, inside: tuple[str, ...] = ()) -> Any:
        self.values += 1
        if self.values > _MOST_VALUES:
            raise SettingError(f"{place}: {setting} has too many values: llava_patch reads {_MOST_VALUES:,} in all")
        if isinstance(value, Macro):
            if value.name in inside:
                raise SettingError(f"{place}: {value} is set to itself: give it a value")
            if value.name not in self.macros:
                near = hint(value.name, self.macros)
                raise SettingError(f"{place}: {value} is not set{near}: add {value.name} = ... to the file")
            macro = self.macros[value.name]
            return self._value(macro.value, setting, place, (*inside, value.name))
        if isinstance(value, (tuple, list)):
            return type(value)(self._value(item, setting, place, inside) for item in value)
        if isinstance(value, dict):
            return {
                self._value(key, setting, place, inside): self._value(item, setting, place, inside)
                for key, item in value.items()
            }
        if isinstance(value, Reference) and not setting.startswith("Patch."):
            raise SettingError(f"{place}: {setting} = {value}: only Patch takes a name with @; write the value itself")
        if value is None or isinstance(value, (bool, Reference)) or is_number(value) or is_text(value):
            return value
        kinds = {float: "a finite number", int: "an integer below 2**63", str: "text without NUL and lone surrogates"}
        expected = kinds.get(type(value), "numbers, texts, True, False, None, or tuples of them")
        raise SettingError(f"{place}: {setting} = {shown(value)}: expected {expected}")


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not known."""
    names = list(known)
    return f"No name of llava_patch is {short(name)}. Known names: {', '.join(names)}.{hint(name, names, ' Did')}"


def _place(text: str, path: Path | None, line: int) -> Place:
    return Place(text) if path is None else Place(str(path), line)


def _text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise SettingError(f"{path}: {size:,} bytes are no gin file (at most {LARGEST_FILE:,}): name another")
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}: mend that, or name another gin file") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingError(
            f"{path}:{line}: not text in UTF-8, as a gin file is: name another, or convert it"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _included(name: str, place: Place, path: Path | None) -> Path:
    if path is None:
        raise SettingError(f"{place}: only a file can include another: name it as a gin file (--gin_file)")
    asked = Path(name)
    if not name.strip() or asked.is_absolute() or ".." in asked.parts:
        raise SettingError(
            f"{place}: include {shown(name)}: a file includes what lies beside it, or a shipped gin file, by name: put "
            "the file there"
        )
    for found in (path.parent / asked, gin_dir() / asked):
        if is_file(found):
            return found
    there = {other.name for folder in (path.parent, gin_dir()) for other in folder.glob("*.gin")}
    near = hint(name, there - {path.name})
    raise SettingError(
        f"{place}: include {shown(name)}: no such file beside {path.name} or among the shipped gin files{near}"
    )


def _explain(error: Exception, text: str, path: Path | None, token: Any) -> NoReturn:
    """Raise what the parser's error means, with its line; `token` is what it had come to, if it had begun."""
    line = 1 if token is None else token.start[0]
    why = " ".join(str(getattr(error, "msg", None) or error).split()) or type(error).__name__
    if isinstance(error, SyntaxError):
        line = error.lineno or line
    open_quote = token is not None and token.type == tokenize.ERRORTOKEN and token.string[:1] in ("'", '"')
    if isinstance(error, RecursionError) or "too many nested" in why:
        why = "brackets are nested too deeply: write a flat value"
    elif open_quote or isinstance(error, tokenize.TokenError):
        why = "a bracket or a quoted text is never closed: close it"
        why += " (; ends a binding in LLAVA_PATCH_GIN_PARAM, in quotes too)" if path is None else ""
    elif isinstance(error, StopIteration):
        why = "ends in the middle of a binding: complete it, as Routing.split = 18"
    elif "malformed node or string" in why:
        why = 'a value is neither a number nor quoted; write text as in Routing.variant = "lf"'
    elif "Exceeds the limit" in why:
        why = "an integer of thousands of digits: no setting takes it"
    elif "Expected newline" in why and path is None:
        why = f'{why} (one binding a --gin_param; ";" separates them in LLAVA_PATCH_GIN_PARAM only)'
    else:
        why = f"{short(why, 200)} (a line is as Routing.split = 18)"
    raise SettingError(f"{_place(text, path, max(line, 1))}: {why}") from error
