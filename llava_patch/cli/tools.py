"""The commands of `llava_patch.tools` that need few lines: doctor, sweep, convert, merge and gin-files."""

from __future__ import annotations

from pathlib import Path

import typer

from llava_patch.cli.common import GIN_FILE, GIN_PARAM
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs

_OUTPUT = typer.Option(..., "--output", metavar="OUTPUT", help="folder to write: a new one")
_OLD = typer.Argument("", hidden=True)
_TOWER = typer.Option("", "--vision-tower", help="the tower's folder: to hf, where it is; to llava, what to point at")


def doctor_command(
    checkpoint: str = typer.Argument("", metavar="CKPT", help="a checkpoint folder to look at as well"),
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
    as_json: bool = typer.Option(False, "--json", help="the same for machines"),
) -> None:
    """Show versions, hosts, attention, what is patched and what is ignored, the machine.

    Gin options are read as a launch script's --gin_file and --gin_param would
    be. Exit code 1 when something cannot work.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from llava_patch.core.version import __version__
    from llava_patch.tools.doctor import PROBLEM
    from llava_patch.tools.doctor.examine import examine, summary, to_json

    with Console(stderr=True).status("looking, and trying what training and evaluation import"):
        rows = examine(checkpoint, gin_file, gin_param)
    if as_json:
        typer.echo(to_json(rows))
    else:
        table = Table("", title=f"llava_patch {__version__}")
        for name in ("what", "found", "advice"):
            table.add_column(name, overflow="fold")  # nothing is cut: names of classes and paths are long
        marks = {"ok": "", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
        for row in rows:
            table.add_row(marks[row.state], *map(escape, (row.what, row.found, row.advice)))
        console = Console()
        console.print(table)
        console.print(summary(rows))
    raise typer.Exit(1 if any(row.state == PROBLEM for row in rows) else 0)


@needs("sweep", "figures")
def sweep_command(
    file: str = typer.Argument(..., metavar="SWEEP.gin", help="a gin file that binds Sweep.grid, by path or name"),
    command: list[str] = typer.Argument(  # noqa: B008
        ..., metavar="COMMAND", help="the launch command, after --; each run's flags are appended to it"
    ),
    output: Path = typer.Option(..., help="folder for runs and results; the same one again resumes"),  # noqa: B008
    seeds: str = typer.Option("", help="such as 1,2,3; instead of the file's (single runs: 42)"),
    evaluate: str = typer.Option("", help="lmms-eval command for each finished run, with {checkpoint} in it"),
    dry_run: bool = typer.Option(False, "--dry-run", help="show every run's command and state; write nothing"),
) -> None:
    """Train every point of a grid with several seeds; mean ± std and a plot.

    Each run is COMMAND with --gin_file, --gin_param, --seed and
    --output_dir OUTPUT/POINT/seedS appended; they win over COMMAND's own.
    Everything is checked before the first run starts.

    The same command again goes on where a sweep stopped: finished runs are
    kept, failed and interrupted ones run again. Exit code 1 when one failed.
    OUTPUT gets results.json, table.md (means and the per-seed table) and
    sweep.png; two numbers swept against a baseline also give bubbles.png.

    In full:

    llava-patch sweep sweep_split_7b.gin --output sweeps/split
    --evaluate "lmms-eval --model llava --tasks pope
    --model_args pretrained={checkpoint},model_name=llava"
    -- deepspeed llava/train/train_mem.py ...your stage-2 flags...
    """
    from rich.console import Console

    from llava_patch.tools.sweep.command import sweep

    console = Console()

    words = [word.strip() for word in seeds.split(",") if word.strip()]
    if not all(word.isdigit() for word in words) or len(set(words)) != len(words):
        raise SettingError(f"--seeds {seeds}: expected distinct integers, such as 1,2,3")
    try:
        well = sweep(file, output, command, [int(word) for word in words] or None, evaluate or None, dry_run, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command again goes on from here")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if well else 1)


def convert_command(
    checkpoint: Path = typer.Argument(..., metavar="CKPT", help="a full checkpoint, stock or patched, or an adapter"),  # noqa: B008
    old: str = _OLD,
    output: Path = _OUTPUT,
    to: str = typer.Option(..., help="hf or llava"),
    vision_tower: str = _TOWER,
) -> None:
    """Write a checkpoint for the other host, with the patch that it carries."""
    from llava_patch.tools.convert.command import convert

    _refuse(old)
    typer.echo(f"wrote {convert(checkpoint, output, to, vision_tower or None)}")


def merge_command(
    checkpoint: Path = typer.Argument(..., metavar="CKPT", help="an adapter or a full patched checkpoint"),  # noqa: B008
    old: str = _OLD,
    output: Path = _OUTPUT,
    to: str = typer.Option("", help="hf or llava, to convert in the same go; default: the host that it is of"),
    vision_tower: str = _TOWER,
) -> None:
    """Write a plain checkpoint, which needs no llava_patch, where that is exact."""
    from llava_patch.tools.convert.command import merge

    _refuse(old)
    typer.echo(f"wrote {merge(checkpoint, output, to or None, vision_tower or None)}")


def _refuse(old: str) -> None:
    if old:
        raise SettingError(f"{old}: the folder to write is named with --output {old}")


def gin_files(name: str = typer.Argument("", help="print this file, or list those with this in their name")) -> None:
    """List the shipped gin files, or print one."""
    from llava_patch.core.resources import gin_dir
    from llava_patch.settings.gin_config import find_file

    listed = [path for path in sorted(gin_dir().glob("*.gin")) if name in path.name]
    if name and (name.endswith(".gin") or not listed):
        typer.echo(find_file(name).read_text(encoding="utf-8"))
        return
    for path in listed:
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{path.name:28} {first}")
