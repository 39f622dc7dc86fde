"""What the commands of `llava-patch` share: words that mean the same everywhere, checks, and how results are shown."""

import contextlib
import dataclasses
import difflib
import errno
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from llava_patch.core.errors import CheckpointError, SettingError, StorageError, brief, shown
from llava_patch.core.outputs import ROOT, place, write_index
from llava_patch.core.paths import default_name, named
from llava_patch.core.stored import strings
from llava_patch.measurements import asked as kept
from llava_patch.measurements.base import FIGURES, Result
from llava_patch.settings import active

R = TypeVar("R", bound=Result)
DEFAULT = "run"
PANEL = "Measure a checkpoint"
CONFIGURED = "configured_patch"

# Options that mean the same in every measurement.
Parameters = dict[str, tuple[Any, Any]]
"""(type, option) of each parameter of a command, by name."""
CHECKPOINT = typer.Argument(
    ..., metavar="CKPT", help="checkpoint folder or hub name, of llava or HF, patched or not; or an adapter"
)
CHECKPOINTS = typer.Argument(
    ..., metavar="CKPT [CKPT ...]", help="checkpoints of llava or HF, patched or not; or adapters"
)
OPTIONAL = typer.Argument("", metavar="CKPT", help="checkpoint folder or hub name; only its JSON files are read")
_DATA = (
    "images: LLaVA's JSON, a picture, a folder of them, or with regions of text, as R-Probe needs them: JSONL, "
    "SROIE/ICDAR, FUNSD, COCO-Text, TextOCR, hf:NAME (DATA?broken=skip: without what cannot be read)"
)
DATA = typer.Argument("", metavar="DATA", help=f"{_DATA}; default: rendered pages", show_default=False)
DATA_NEEDED = typer.Argument(..., metavar="DATA", help=_DATA)
DATA_OPTION = typer.Option("", "--data", metavar="DATA", help="DATA, spelled as an option")
BASE = typer.Option(
    "",
    metavar="BASE",
    help="the model that CKPT was trained from: below an adapter, LoRA or projector, and what CKPT is compared with; "
    "default: what CKPT's record names",
    show_default=False,
)
FORMAT = typer.Option(["png"], "--format", help="of figures: png or pdf; may be repeated")
OVERWRITE = typer.Option(False, "--overwrite", help="replace results of other settings, data or checkpoints in OUTPUT")
NAMES = typer.Option("", help="what to call them, with commas between; default: by their paths")
SAMPLES = "how many, spread evenly over DATA; 0: all of it; default:"
DEVICE = typer.Option("", help="cpu, cuda or cuda:N; default: cuda where there is one")

QUESTION = typer.Option("", help="asked about every image; default: the data's own, or what its text is")


def dtype(on_gpu: str = "float16") -> Any:
    """The option --dtype of a command that runs a model on a GPU in that precision."""
    text = f"of the model; default: float32 on cpu (bfloat16 where that does not fit), {on_gpu} on cuda"
    return typer.Option("", help=text)


DTYPE = dtype()
GIN_FILE = typer.Option(
    [], "--gin-file", "--gin_file", help="gin file with bindings of this measurement or a patch; may be repeated"
)
GIN_PARAM = typer.Option([], "--gin-param", "--gin_param", help="one gin binding; may be repeated")
MODEL: Parameters = {
    "question": (str, QUESTION), "base": (str, BASE), "device": (str, DEVICE), "dtype": (str, DTYPE),
}  # fmt: skip
LAST: Parameters = {
    "overwrite": (bool, OVERWRITE), "formats": (list[str], FORMAT), "gin_file": (list[str], GIN_FILE),
    "gin_param": (list[str], GIN_PARAM),
}  # fmt: skip


@contextlib.contextmanager
def configured(gin_file: list[str], gin_param: list[str], goes_on: bool = False) -> Iterator[None]:
    """A command's own gin bindings count inside; Ctrl-C ends with exit code 130 and one line.

    The line says so where the same command takes up what an interrupted one has done (`goes_on`).
    """
    from llava_patch.tools.sweep.process import signals_interrupt

    try:
        with active.also(gin_file, gin_param), signals_interrupt():
            yield
    except KeyboardInterrupt:
        typer.echo("interrupted" + (": the same command again goes on from here" if goes_on else ""), err=True)
        raise typer.Exit(130) from None


def check_checkpoint(name: str, setting: str = "") -> None:
    """Refuse a path that leads nowhere before it is taken for a name of the hub, which has one slash at most."""
    from llava_patch.core.weights import is_path, lacks_config, nothing_at, read_json

    check_paths([name], setting)
    what = f"{setting} {name}".strip()
    if Path(name).is_file():
        raise CheckpointError(f"{what}: is a file; expected a checkpoint's folder or hub name")
    if Path(name).exists():
        return
    if is_path(name):
        raise nothing_at(name, setting)
    if read_json(name, "config.json") is None:
        raise lacks_config(name, f"{setting} {name}".strip())


def check_paths(given: Sequence[Any], setting: str = "") -> None:
    """Refuse words that can be no path: empty, too long, with a NUL, or text that no encoding has."""
    for one in map(str, given):
        what = f"{setting} {shown(one)}".strip()
        if not one.strip():
            raise CheckpointError(f"{what}: is empty: name a folder or file")
        try:
            os.stat(one)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                raise CheckpointError(f"{what}: can be no folder or file ({brief(error)}): name another") from error


def check_formats(formats: list[str]) -> None:
    """Refuse an unknown figure format before anything is read or written."""
    for suffix in formats:
        if suffix not in FIGURES:
            raise SettingError(f"--format {suffix}: expected {' or '.join(FIGURES)}")


def output_option(command: str, names: str = "CKPT's name") -> Any:
    """The option --output of a command, whose results go to a folder of its own below `ROOT` where it is not given."""
    text = f"folder for results; default: {ROOT}/{command}/ and {names}"
    return typer.Option(None, "--output", metavar="OUTPUT", help=text, show_default=False)


def folder_for(command: str, checkpoint: str, output: Path | None) -> Path:
    """Where results go: `output` (CheckpointError where that can be no folder), or the checkpoint's place in `ROOT`."""
    return check_output(output if output is not None else place(command, default_name(checkpoint)))


@contextlib.contextmanager
def results_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while results are written there; at a good end the page of all of them is new."""
    from llava_patch.core.locks import folder_lock

    with folder_lock(folder):
        yield
    listed(folder)


def listed(folder: Path) -> None:
    """Write the page of all results anew, where a folder is among those that it lists; rank 0 does."""
    from llava_patch.core import parallel

    if parallel.rank() == 0 and (page := write_index(folder)) is not None:
        typer.echo(f"all results: {page}", err=True)


def one_data(data: str, option: str) -> str:
    """DATA, which every command takes as a word and as --data."""
    if data and option:
        raise SettingError(f"--data {option}: DATA is given already: {data}")
    return data or option


def check_output(folder: Path) -> Path:
    """Refuse what cannot be a folder for results, before the work whose results go there."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a link to itself, too long a name, one with a null byte
        reason = brief(error) if len(str(folder)) < 200 else getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(
            f"--output {shown(str(folder))}: cannot be a folder ({reason}): give another --output"
        ) from error
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        what = "is a file; expected a folder" if nearest == folder else f"{nearest} is a file; expected a folder"
        raise CheckpointError(f"--output {folder}: {what}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"--output {folder}: you may not write in {nearest}: give another --output")
    return folder


def configured_patch() -> dict[str, str]:
    """The methods that gin puts on the checkpoint, by kind, with the settings that are not the defaults; {}: none."""
    asked = active.configuration()
    return {} if asked is None else {kind: _worded(method) for kind, method in asked.lasting().items()}


def facts_of(checkpoint: str) -> dict[str, Any]:
    """What `check_results` compares, for a result's file: "checkpoint", and `CONFIGURED` where gin puts a patch on."""
    patch = configured_patch()
    return {"checkpoint": named(checkpoint), **({CONFIGURED: patch} if patch else {})}


def check_results(
    path: Path,
    sources: Sequence[str],
    asked: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse to replace a file of results of other checkpoints, another configured patch, other settings or data.

    `asked` and `defaults` are as `measurements.asked` makes them; None: only the checkpoints and the patch count.
    """
    values = kept.read_kept(path)
    if values is None:
        return
    facts = values.get("facts", values)
    facts = facts if isinstance(facts, dict) else {}
    others, before = values.get("sources", [facts.get("checkpoint")]), facts.get(CONFIGURED) or {}
    told = strings(others) and bool(others) and isinstance(before, dict) and strings([*before.values()])
    wanted, now = [named(source) for source in sources], configured_patch()
    if told and ([named(other) for other in others] != wanted or before != now):
        held, asked_for = ", ".join(others), ", ".join(wanted)
        if before != now:
            held, asked_for = held + _with(before), asked_for + _with(now)
        raise CheckpointError(f"{path} holds the results of {held}, not of {asked_for}: {kept.ADVICE}")
    if asked is not None:
        kept.check_asked(values if told else {}, str(path), asked, defaults)


def _with(patch: dict[str, str]) -> str:
    return f" with {', '.join(patch.values())} of gin" if patch else " without a patch of gin"


def with_facts(result: R, checkpoint: str, asked: Mapping[str, Any] | None = None) -> R:
    """A result with what it was measured on among its facts (`facts_of`), and what it was asked for."""
    return dataclasses.replace(
        result, facts={**facts_of(checkpoint), **({kept.ASKED: asked} if asked else {}), **result.facts}
    )


def show(table: tuple[Sequence[str], Sequence[Sequence[str]]], title: str = "", notes: Sequence[str] = ()) -> None:
    """Print a measurement's table (head and rows) with a title above and notes below it.

    The first column is a name, the others are numbers; where they are too wide for the screen, titles of columns take
    several lines.
    """
    from rich.console import Console

    from llava_patch.core import terminal as screen

    console = Console()
    head, rows = table
    if screen.width_of(head, rows) > console.width:
        cells = [max((len(row[i]) for row in rows), default=1) for i in range(len(head))]
        head = [
            "\n".join(textwrap.wrap(name, max(width, 1), break_long_words=False, break_on_hyphens=False))
            for name, width in zip(head, cells, strict=True)
        ]
    screen.show(console, head, rows, notes, title)


def _worded(method: Any) -> str:
    """A method's settings that are not the defaults, so that a setting added later does not make it another one."""
    given = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            given.append(f"{field.name}={value!r}")
    return f"{type(method).__name__}({', '.join(given)})"


class DefaultGroup(TyperGroup):
    """A group whose default subcommand need not be named (a checkpoint called like a subcommand: ./NAME)."""

    second = ""  # where a second data argument belongs

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the default subcommand in front of arguments that name none."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            meant = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if meant and not os.path.exists(args[0]):
                ctx.fail(f"no command and no checkpoint is called {args[0]!r}: did you mean {meant[0]!r}?")
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Say where a second data argument belongs, which click only calls unexpected."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # click's class: typer carries a copy of it in some versions and depends on it in others.
            inner, message = getattr(error, "ctx", None), getattr(error, "message", "")
            if self.second and getattr(inner, "info_name", None) == DEFAULT and "unexpected extra argument" in message:
                error.message = f"{message}: CKPT takes one DATA; {self.second}"  # type: ignore[attr-defined]
            raise
