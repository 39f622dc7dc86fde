"""The commands of `llava_patch.tools`: doctor, inspect, report, bench, sweep, convert, merge; and gin-files."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer

from llava_patch.cli.common import (
    BASE,
    DATA,
    DATA_OPTION,
    DEVICE,
    GIN_FILE,
    GIN_PARAM,
    OVERWRITE,
    QUESTION,
    SAMPLES,
    check_checkpoint,
    check_output,
    configured,
    folder_for,
    listed,
    one_data,
    output_option,
    results_in,
)  # fmt: skip
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.core.extras import needs
from llava_patch.core.outputs import place
from llava_patch.core.paths import default_name
from llava_patch.data.examples import check_data
from llava_patch.settings.active import settings_of

if TYPE_CHECKING:
    from rich.table import Table

    from llava_patch.tools.doctor import Row

ROWS = 24
_OLD = typer.Argument("", hidden=True)
_TOWER = typer.Option("", "--vision-tower", help="the tower's folder: to hf, where it is; to llava, what to point at")


def doctor_command(
    checkpoint: str = typer.Argument("", metavar="CKPT", help="a checkpoint folder to look at as well"),
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
    quick: bool = typer.Option(False, "--quick", help="leave out what only importing torch and the hosts tells"),
    as_json: bool = typer.Option(False, "--json", help="the same for machines"),
) -> None:
    """Show versions, hosts, attention, what is patched and what is ignored, the machine.

    What is installed and configured is shown at once; then torch, the hosts
    and what training and evaluation import are tried, in about a minute. Gin
    options are read as a launch script's --gin_file and --gin_param would be.
    Exit code 1 when something cannot work.
    """
    from rich.console import Console

    from llava_patch.core.terminal import say_cost
    from llava_patch.core.version import __version__
    from llava_patch.tools.doctor import PROBLEM, examine

    if quick and checkpoint:
        raise SettingError("--quick looks at no checkpoint: leave one of them out")
    console = Console()
    rows = examine.at_once(gin_file, gin_param)
    if not as_json:
        console.print(_rows_table(rows, f"llava_patch {__version__}"))
    if not quick:
        what = "importing torch, the hosts, and what training and evaluation import"
        say_cost("doctor", what, shown=not as_json)
        rows += (more := examine.by_importing(checkpoint, gin_file, gin_param))
        if not as_json:
            console.print(_rows_table(more, "By importing"))
    typer.echo(examine.to_json(rows)) if as_json else console.print(examine.summary(rows))
    raise typer.Exit(1 if any(row.state == PROBLEM for row in rows) else 0)


def _rows_table(rows: list["Row"], title: str) -> "Table":
    """The doctor's findings; nothing is cut: names of classes and paths are long."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", title=title)
    for name in ("what", "found", "advice"):
        table.add_column(name, overflow="fold")
    marks = {"ok": "", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
    for row in rows:
        table.add_row(marks[row.state], *map(escape, (row.what, row.found, row.advice)))
    return table


def inspect_command(
    checkpoint: str = typer.Argument(
        ..., metavar="CKPT", help="a checkpoint folder of any form, or a hub model on this machine"
    ),
    base: str = BASE,
    as_json: bool = typer.Option(False, "--json", help="everything as JSON, all tensors included"),
) -> None:
    """Show what a checkpoint is: host, form, settings, added tensors, base, what trains.

    Reads configuration and headers; no weights are loaded. Exit code 1 for a
    folder that is no checkpoint, or whose base is another one.
    """
    from rich.console import Console
    from rich.table import Table

    from llava_patch.core.terminal import bordered
    from llava_patch.tools.inspect import inspect_checkpoint
    from llava_patch.tools.inspect.result import facts_of

    found, console = inspect_checkpoint(checkpoint, base), Console()
    ended = typer.Exit(1 if found.match is not None and found.match.same is False else 0)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, default=str))
        raise ended
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True, style="bold")
    facts.add_column(overflow="fold")
    for name, value in facts_of(found):
        facts.add_row(name, value)
    console.print(facts)
    for kind, values in found.settings.items():
        if values is not None:
            lines = [[name, repr(value)] for name, value in values.items() if name != "method"]
            console.print(bordered(["setting", "value"], lines, f"{kind}: {values['method']}"))
    if found.added:
        table = Table(title=f"{len(found.added)} tensors of the patch", title_justify="left")
        table.add_column("tensor", overflow="fold")  # the ends of names tell them apart
        for name in ("shape", "dtype", "parameters", "part"):
            table.add_column(name, justify="right" if name == "parameters" else "left", no_wrap=True)
        for tensor in found.added[:ROWS]:
            shape = "x".join(map(str, tensor.shape))
            table.add_row(tensor.name, shape, tensor.dtype, f"{tensor.parameters:,}", tensor.role)
        rest = [tensor.parameters for tensor in found.added[ROWS:]]
        if rest:
            table.add_row(f"... and {len(rest)} more (--json)", "", "", f"{sum(rest):,}", "")
        console.print(table)
    raise ended


@needs("report", "figures", "report")
def report_command(
    checkpoint: str = typer.Argument(
        "", metavar="CKPT", help="checkpoint folder or hub name, of llava or HF, patched or not"
    ),
    data: str = DATA,
    data_option: str = DATA_OPTION,
    samples: Optional[int] = typer.Option(None, min=0, help=f"{SAMPLES} Report.samples, 24", show_default=False),
    base: str = BASE,
    output: Optional[Path] = output_option("report"),
    rprobe: str = typer.Option("", help="folder with R-Probe results of this checkpoint"),
    run: str = typer.Option("", help="folder of the training run; default: CKPT, where it has trainer_state.json"),
    only: list[str] = typer.Option([], help="this section only; may be repeated"),  # noqa: B008
    skip: list[str] = typer.Option([], help="leave this section out; may be repeated"),  # noqa: B008
    fresh: bool = typer.Option(False, "--fresh", help="measure finished sections again"),
    overwrite: bool = OVERWRITE,
    source: str = typer.Option("", "--from", help="write the page of this report folder again; needs no model"),
    device: str = DEVICE,
    dtype: str = typer.Option("", help="of the models; default: float32 on cpu, bfloat16 on cuda"),
    question: str = QUESTION,
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
) -> None:
    """Every measurement of a checkpoint in one HTML file that opens offline.

    OUTPUT gets report.html, and beside it each measurement's JSON and figure.
    A section that cannot be made says why; one that fails is shown as failed,
    the others stay, and the exit code is 1. The same OUTPUT again keeps
    finished sections. Counts are settings of Report ("Report.maps = 6").
    """
    from llava_patch.tools.report import build
    from llava_patch.tools.report.sections import FAILED, Context, sections
    from llava_patch.tools.report.settings import Report

    if source:
        if checkpoint:
            raise SettingError("--from writes the page of results that are there: leave CKPT out")
        kept = build.read(Path(source))
        if kept is None:
            raise CheckpointError(f"--from {source}: no {build.KEPT} there: give the folder of a report")
        with results_in(Path(source)):
            typer.echo(f"wrote {build.write_page(kept, Path(source))}")
        return
    if not checkpoint:
        raise SettingError("name a checkpoint, or a report's folder with --from")
    data = one_data(data, data_option)
    with configured(gin_file, gin_param, goes_on=True):
        every = sections()
        chosen = build.choose(every, only, skip)
        for option, name in (("--rprobe", rprobe), ("--run", run)):
            if name and not Path(name).is_dir():
                raise CheckpointError(f"{option} {name}: no such folder")
        folder = folder_for("report", checkpoint, output)
        check_data(data)
        gin = [word for file in gin_file for word in ("--gin-file", file)]
        gin += [word for binding in gin_param for word in ("--gin-param", binding)]
        how = {"device": device, "dtype": dtype, "question": question}
        counts = settings_of(Report)
        if samples is not None:
            counts = replace(counts, samples=samples or None)
        context = Context(checkpoint, data, base=base, **how, rprobe=rprobe, run=run, settings=counts, gin=gin)
        with results_in(folder):
            values = build.build(context, every, chosen, folder, fresh, overwrite, typer.echo)
            typer.echo(f"wrote {build.write_page(values, folder)}")
    failed = [record.name for record in values["sections"] if record.state == FAILED]
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
    raise typer.Exit(1 if failed else 0)


@needs("bench", "figures")
def bench(
    shape: str = typer.Option("small", help="small (7B's depth, reduced width), 7b or 13b; random weights"),
    device: str = DEVICE,
    dtype: str = typer.Option("", help="float32, bfloat16 or float16; default: bfloat16 on cuda, else float32"),
    attention: str = typer.Option("sdpa", help="attention backend: sdpa, eager or flash_attention_2"),
    split: int = typer.Option(-1, show_default=False, help="first routed layer; default: the shape's own"),
    text: list[int] = typer.Option([64], min=1, help="text tokens beside 576 image tokens; may be repeated"),  # noqa: B008
    batch: list[int] = typer.Option([1], min=1, help="samples a batch; may be repeated"),  # noqa: B008
    repeats: int = typer.Option(5, min=1, help="rounds after one warm-up; ratios are of the medians over rounds"),
    train: bool = typer.Option(False, help="time a forward and backward pass too"),
    lora: bool = typer.Option(True, help="compare with LoRA (needs peft)"),
    fusions: bool = typer.Option(False, "--fusions", help="time vision fusions (prefill, full training step) instead"),
    compiled: bool = typer.Option(
        False, "--compiled", help="time decode with a static cache and torch.compile instead"
    ),
    host: bool = typer.Option(False, "--host", help="count operations and processor time at a tiny width instead"),
    output: Optional[Path] = output_option("bench", "SHAPE"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Time prefill and decode of every routing method beside the stock model, and check its identity.

    With --fusions: prefill and a full training step of every vision
    fusion, tower included. With --compiled: a decoded token with a
    static cache, compiled, beside the dynamic cache, stock and routed.
    With --host: what the host does for each method, where arithmetic is
    nothing: what a GPU waits for at batch 1.
    """
    import torch
    from rich.console import Console

    from llava_patch.core.terminal import show
    from llava_patch.data.loaded import pick_device, pick_dtype
    from llava_patch.hosts import sizes
    from llava_patch.measurements.asked import ASKED, check_kept
    from llava_patch.tools.bench import compiled as steps
    from llava_patch.tools.bench import fusion, measure, methods, report
    from llava_patch.tools.bench import host as work

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
    if compiled and (fusions or train or attention == "flash_attention_2"):
        raise SettingError(
            "--compiled: times decode with static caches, whose masks flash attention does not know: leave --fusions "
            "and --train out, and choose --attention sdpa or eager"
        )
    if host and (fusions or compiled or train or split >= 0 or shape != "small" or text != [64] or batch != [1]):
        raise SettingError(
            "--host: has a model and a prompt of its own: give it --repeats, --attention or --output alone"
        )
    tower = sizes.TOWERS["none" if not fusions else "small" if shape == "small" else "large"]
    console, machine = Console(), report.machine(torch.device(device))
    asked: dict[str, Any] = {
        "--shape": shape, "--device": machine["device"], "--dtype": dtype, "--attention": attention,
        "--repeats": repeats,
    }  # fmt: skip
    if not fusions:
        asked |= {"--split": split, "--text": text, "--batch": batch, "--train": train, "--lora": lora}

    def build() -> tuple[Any, dict[str, Any]]:
        more = {"side": work.IMAGE} if host else {}
        model: Any = methods.build(work.SHAPE if host else size, device, number, attention, tower, **more)
        return model, {
            **machine,
            "shape": shape,
            "dtype": dtype,
            "attention": attention,
            "repeats": repeats,
            ASKED: asked,
        }

    def wrote(paths: list[Path]) -> None:
        for path in paths:
            console.print(f"wrote {path}")

    def name_of(samples: int, words: int) -> str:
        return f"fusion_speed_{shape}" + (f"_text{words}_batch{samples}" if (words, samples) != (64, 1) else "")

    settings = [(samples, words) for samples in batch for words in text]
    kind = "compiled_decode" if compiled else "routing"
    names = [name_of(*one) for one in settings] if fusions else ["host" if host else f"{kind}_{shape}"]
    folder = check_output(output or place("bench", shape))
    with results_in(folder):
        for name in names if not overwrite else ():
            check_kept(folder / f"{name}.json", asked, {})
        if fusions:
            for (samples, words), name in zip(settings, names, strict=True):
                model, about = build()
                rest = f"one image + {words} text tokens, batch {samples}, {about['device']}, {dtype}"
                title = f"{shape}: 24 ViT blocks, {rest}"
                rows = fusion.measure(model, fusion.fusions(), words, samples, repeats=repeats)
                show(console, *report.fusion_table(rows), [], title)
                wrote(report.write_fusions(folder, name, rows, title, about))
            return
        model, about = build()
        if host:
            title = f"{work.SHAPE.layers} layers of width {work.SHAPE.hidden}, {about['device']}, one thread, {dtype}"
            compared = methods.methods(work.SHAPE.layers, work.SHAPE.split, lora=False)
            found = work.measure(model, compared, repeats=repeats)
            show(console, *report.host_table(found), [], title)
            wrote(report.write_host(folder, names[0], found, title, about))
            return
        tables: dict[str, Any] = {}
        for samples, words in settings:
            title = f"{shape}: 576 image + {words} text tokens, batch {samples}, {about['device']}, {dtype}"
            compared = methods.methods(size.layers, size.split if split < 0 else split, lora and not compiled)
            if compiled:
                tables[title] = steps.measure(model, compared, words, samples, repeats=repeats)
                show(console, *report.compiled_table(tables[title]), [], title)
                continue
            tables[title] = measure.measure(model, compared, words, samples, repeats=repeats, training=train)
            for table in report.method_tables(tables[title]):
                show(console, *table, [], title)
        wrote((report.write_compiled if compiled else report.write)(folder, names[0], tables, about))


@needs("sweep", "figures")
def sweep_command(
    file: str = typer.Argument(..., metavar="SWEEP.gin", help="a gin file that binds Sweep.grid, by path or name"),
    command: list[str] = typer.Argument(  # noqa: B008
        ..., metavar="COMMAND", help="the launch command, after --; each run's flags are appended to it"
    ),
    output: Optional[Path] = output_option("sweep", "SWEEP"),
    seeds: str = typer.Option("", help="such as 1,2,3; instead of the file's (single runs: 42)"),
    evaluate: str = typer.Option("", help="lmms-eval command for each finished run, with {checkpoint} in it"),
    dry_run: bool = typer.Option(False, "--dry-run", help="show every run's command and state; write nothing"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Train every point of a grid with several seeds; mean ± std and a plot.

    Each run is COMMAND with --gin_file, --gin_param, --seed and
    --output_dir OUTPUT/POINT/seedS appended; they win over COMMAND's own.
    Everything is checked before the first run starts.

    The same command again goes on where a sweep stopped: finished runs are
    kept, failed and interrupted ones run again. Exit code 1 when one failed.
    Runs of other settings are refused, unless --overwrite says otherwise.
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
    folder = check_output(output or place("sweep", Path(file).stem))
    words = [word.strip() for word in seeds.split(",") if word.strip()]
    if not all(word.isdigit() for word in words) or len(set(words)) != len(words):
        raise SettingError(f"--seeds {seeds}: expected distinct integers, such as 1,2,3")
    try:
        with contextlib.nullcontext() if dry_run else results_in(folder):
            numbers = [int(word) for word in words] or None
            well = sweep(file, folder, command, numbers, evaluate or None, dry_run, console, overwrite)
    except KeyboardInterrupt:
        console.print("interrupted: the same command again goes on from here")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if well else 1)


def convert_command(
    checkpoint: str = typer.Argument(..., metavar="CKPT", help="a full checkpoint, stock or patched, or an adapter"),
    old: str = _OLD,
    base: str = BASE,
    output: Optional[Path] = output_option("convert"),
    to: str = typer.Option(..., help="hf or llava"),
    vision_tower: str = _TOWER,
) -> None:
    """Write a checkpoint for the other host, with the patch that it carries.

    OUTPUT is a new folder, which is a checkpoint then.
    """
    from llava_patch.tools.convert.command import convert

    _refuse(old)
    with _new_checkpoint("convert", checkpoint, base, output) as folder:
        typer.echo(f"wrote {convert(checkpoint, folder, to, vision_tower or None)}")


def merge_command(
    checkpoint: str = typer.Argument(..., metavar="CKPT", help="an adapter or a full patched checkpoint"),
    old: str = _OLD,
    base: str = BASE,
    output: Optional[Path] = output_option("merge"),
    to: str = typer.Option("", help="hf or llava, to convert in the same go; default: the host that it is of"),
    vision_tower: str = _TOWER,
) -> None:
    """Write a plain checkpoint, which needs no llava_patch, where that is exact.

    OUTPUT is a new folder, which is a checkpoint then.
    """
    from llava_patch.tools.convert.command import merge

    _refuse(old)
    with _new_checkpoint("merge", checkpoint, base, output) as folder:
        typer.echo(f"wrote {merge(checkpoint, folder, to or None, vision_tower or None)}")


@contextlib.contextmanager
def _new_checkpoint(command: str, checkpoint: str, base: str, output: Path | None) -> Iterator[Path]:
    """The folder to write, with the adapter's base where the user says it is; the page of results is new then."""
    from llava_patch.core import records
    from llava_patch.core.hub import adapter_folder

    below: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if base:
        check_checkpoint(checkpoint)
        check_checkpoint(base, "--base")
        source = adapter_folder(checkpoint)
        record = records.read_settings(source) if Path(source).is_dir() else None
        if (record or {}).get("form") != "adapter":
            raise CheckpointError(
                f"{checkpoint} is no adapter of llava_patch, so nothing is below it: leave out --base"
            )
        below = records.base_is(source, base)
    folder = output or place(command, default_name(checkpoint))
    with below:
        yield folder
    listed(folder)


def _refuse(old: str) -> None:
    if old:
        raise SettingError(f"{old}: the folder to write is named with --output {old}")


def gin_files(name: str = typer.Argument("", help="print this file, or list those with this in their name")) -> None:
    """List the shipped gin files, or print one."""
    from llava_patch.core.paths import gin_dir
    from llava_patch.core.stored import read_text
    from llava_patch.settings.gin_config import find_file

    listed = [path for path in sorted(gin_dir().glob("*.gin")) if name in path.name]
    if name and (name.endswith(".gin") or not listed):
        typer.echo(read_text(find_file(name), SettingError))
        return
    for path in listed:
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{path.name:28} {first}")
