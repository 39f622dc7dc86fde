"""The commands of `llava_patch.tools`: doctor, inspect, bench, sweep, convert, merge; and gin-files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llava_patch.cli.common import GIN_FILE, GIN_PARAM
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs

if TYPE_CHECKING:
    from rich.table import Table

    from llava_patch.tools.inspect.result import Added, Inspection

ROWS = 24
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


def inspect_command(
    checkpoint: str = typer.Argument(
        ..., metavar="CKPT", help="a checkpoint folder of any form, or a hub model on this machine"
    ),
    base: str = typer.Option("", help="folder of the model below, to compare with; default: what an adapter names"),
    as_json: bool = typer.Option(False, "--json", help="everything as JSON, all tensors included"),
) -> None:
    """Show what a checkpoint is: host, form, settings, added tensors, base, what trains.

    Reads configuration and headers; no weights are loaded. Exit code 1 for a
    folder that is no checkpoint, or whose base is another one.
    """
    from llava_patch.tools.inspect import inspect_checkpoint
    from llava_patch.tools.inspect.result import to_json

    found = inspect_checkpoint(checkpoint, base)
    if as_json:
        typer.echo(to_json(found))
    else:
        _show(found)
    raise typer.Exit(1 if found.match is not None and found.match.same is False else 0)


def _show(found: "Inspection") -> None:
    from rich.console import Console
    from rich.table import Table

    from llava_patch.tools.inspect.result import facts_of

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True, style="bold")
    facts.add_column(overflow="fold")
    for name, value in facts_of(found):
        facts.add_row(name, value)
    console.print(facts)
    for kind, values in found.settings.items():
        if values is None:
            continue
        table = Table("setting", "value", title=f"{kind}: {values['method']}", title_justify="left")
        for name, value in values.items():
            if name != "method":
                table.add_row(name, repr(value))
        console.print(table)
    if found.added:
        console.print(_tensors(found.added))


def _tensors(added: "list[Added]") -> "Table":
    from rich.table import Table

    table = Table(title=f"{len(added)} tensors of the patch", title_justify="left")
    table.add_column("tensor", overflow="fold")  # the ends of names tell them apart
    for name in ("shape", "dtype", "parameters", "part"):
        table.add_column(name, justify="right" if name == "parameters" else "left", no_wrap=True)
    for tensor in added[:ROWS]:
        shape = "x".join(map(str, tensor.shape))
        table.add_row(tensor.name, shape, tensor.dtype, f"{tensor.parameters:,}", tensor.role)
    rest = added[ROWS:]
    if rest:
        count = sum(tensor.parameters for tensor in rest)
        table.add_row(f"... and {len(rest)} more (--json)", "", "", f"{count:,}", "")
    return table


@needs("bench", "figures")
def bench(
    shape: str = typer.Option("small", help="small (7B's depth, reduced width), 7b or 13b; random weights"),
    device: str = typer.Option("", help="cpu or cuda; default: cuda where there is one"),
    dtype: str = typer.Option("", help="float32, bfloat16 or float16; default: bfloat16 on cuda, else float32"),
    attention: str = typer.Option("sdpa", help="attention backend: sdpa, eager or flash_attention_2"),
    split: int = typer.Option(-1, show_default=False, help="first routed layer; default: the shape's own"),
    text: list[int] = typer.Option([64], min=1, help="text tokens beside 576 image tokens; may be repeated"),  # noqa: B008
    batch: list[int] = typer.Option([1], min=1, help="samples a batch; may be repeated"),  # noqa: B008
    repeats: int = typer.Option(5, min=1, help="rounds after one warm-up; ratios are of the medians over rounds"),
    train: bool = typer.Option(False, help="time a forward and backward pass too"),
    lora: bool = typer.Option(True, help="compare with LoRA (needs peft)"),
    fusions: bool = typer.Option(False, "--fusions", help="time vision fusions (prefill, full training step) instead"),
    output: Path = typer.Option(Path("bench"), help="folder for the .json, .md and (routing) .png"),  # noqa: B008
) -> None:
    """Time prefill and decode of every routing method beside the stock model, and check its identity.

    With --fusions: prefill and a full training step of every vision
    fusion, tower included.
    """
    from rich.console import Console

    from llava_patch.core.terminal import show
    from llava_patch.data.loaded import pick_device, pick_dtype
    from llava_patch.hosts import sizes
    from llava_patch.tools.bench import fusion, measure, report, shapes
    from llava_patch.tools.bench.methods import methods

    if shape not in sizes.SHAPES:
        raise SettingError(f"--shape {shape}: expected one of {', '.join(sizes.SHAPES)}")
    if attention not in ("sdpa", "eager", "flash_attention_2"):
        raise SettingError(f"--attention {attention}: expected sdpa, eager or flash_attention_2")
    device = pick_device(device)
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    number = pick_dtype(dtype, device)
    size = sizes.SHAPES[shape]
    if split >= size.layers - 1:
        raise SettingError(f"--split {split}: shape {shape} has {size.layers} layers; expected 0..{size.layers - 2}")
    if fusions and (split >= 0 or train):
        raise SettingError("--fusions: always times a training step, and knows no --split: leave both out")
    tower = sizes.TOWERS["none" if not fusions else "small" if shape == "small" else "large"]
    console = Console()

    def build() -> tuple[Any, dict[str, Any]]:
        model: Any = shapes.build(size, device, number, attention, tower)
        about = report.machine(model.device)
        return model, {**about, "shape": shape, "dtype": dtype, "attention": attention, "repeats": repeats}

    def wrote(paths: Sequence[Path]) -> None:
        for path in paths:
            console.print(f"wrote {path}")

    settings = [(samples, words) for samples in batch for words in text]
    if fusions:
        for samples, words in settings:
            model, about = build()
            rest = f"one image + {words} text tokens, batch {samples}, {about['device']}, {dtype}"
            title = f"{shape}: 24 ViT blocks, {rest}"
            rows = fusion.measure(model, fusion.fusions(), words, samples, repeats=repeats)
            show(console, *report.fusion_table(rows), [], title)
            name = f"fusion_speed_{shape}" + (f"_text{words}_batch{samples}" if (words, samples) != (64, 1) else "")
            wrote(report.write_fusions(output, name, rows, title, about))
        return
    model, about = build()
    tables = {}
    for samples, words in settings:
        title = f"{shape}: 576 image + {words} text tokens, batch {samples}, {about['device']}, {dtype}"
        compared = methods(size.layers, size.split if split < 0 else split, lora)
        tables[title] = measure.measure(model, compared, words, samples, repeats=repeats, training=train)
        for table in report.method_tables(tables[title]):
            show(console, *table, [], title)
    wrote(report.write(output, f"routing_{shape}", tables, about))


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
    from llava_patch.core.paths import gin_dir
    from llava_patch.settings.gin_config import find_file

    listed = [path for path in sorted(gin_dir().glob("*.gin")) if name in path.name]
    if name and (name.endswith(".gin") or not listed):
        typer.echo(find_file(name).read_text(encoding="utf-8"))
        return
    for path in listed:
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{path.name:28} {first}")
