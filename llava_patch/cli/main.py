"""The console command `llava-patch`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from llava_patch.cli import doctor, measure, report, rprobe
from llava_patch.cli.common import PANEL
from llava_patch.cli.rprobe import compare, correlate, export, preview, run, store  # noqa: F401 - they join `app`
from llava_patch.core.errors import LlavaPatchError, SettingError
from llava_patch.core.extras import needs
from llava_patch.tools.inspect import command as inspection

app = typer.Typer(no_args_is_help=True)
app.add_typer(rprobe.app, name="rprobe", rich_help_panel=PANEL)
app.command("correlate", no_args_is_help=True, rich_help_panel=PANEL)(correlate.correlate)
report.add(app)
measure.register(app)
doctor.add(app)
inspection.add(app)
console = Console()


@app.callback()
def _root() -> None:
    """Multi-layer vision fusions, DPVR routing, R-Probe and diagnostics for LLaVA models.

    Start with doctor (is everything there?), inspect CKPT (what is it?) and
    report CKPT (every diagnostic in one HTML file).
    """


@app.command("gin-files")
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


@app.command()
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
    import torch

    from llava_patch.hosts import sizes
    from llava_patch.tools.bench import measure as timing
    from llava_patch.tools.bench import report as table
    from llava_patch.tools.bench import shapes
    from llava_patch.tools.bench.methods import methods

    if shape not in sizes.SHAPES:
        raise SettingError(f"--shape {shape}: expected one of {', '.join(sizes.SHAPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise SettingError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    if attention not in ("sdpa", "eager", "flash_attention_2"):
        raise SettingError(f"--attention {attention}: expected sdpa, eager or flash_attention_2")
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise SettingError(f"--device {device}: expected cpu, or cuda on a machine that has one")
    size = sizes.SHAPES[shape]
    if split >= size.layers - 1:
        raise SettingError(f"--split {split}: shape {shape} has {size.layers} layers; expected 0..{size.layers - 2}")
    if fusions:
        if split >= 0 or train:
            raise SettingError("--fusions: always times a training step, and knows no --split: leave both out")
        for samples in batch:
            for words in text:
                _bench_fusions(shape, device, dtype, attention, words, samples, repeats, output)
        return
    rows = methods(size.layers, size.split if split < 0 else split, lora)
    model: Any = shapes.build(size, device, getattr(torch, dtype), attention)
    about = {**table.machine(model.device), "shape": shape, "dtype": dtype, "attention": attention, "repeats": repeats}
    tables = {}
    for samples in batch:
        for words in text:
            title = f"{shape}: 576 image + {words} text tokens, batch {samples}, {about['device']}, {dtype}"
            tables[title] = timing.measure(model, rows, words, samples, repeats=repeats, training=train)
            console.print(*table.screen(tables[title], title))
    for path in table.write(output, f"routing_{shape}", tables, about):
        console.print(f"wrote {path}")


def _bench_fusions(
    shape: str, device: str, dtype: str, attention: str, text: int, batch: int, repeats: int, output: Path
) -> None:
    import torch

    from llava_patch.hosts import sizes
    from llava_patch.tools.bench import fusion, report, shapes

    tower = sizes.TOWERS["small" if shape == "small" else "large"]
    model: Any = shapes.build(sizes.SHAPES[shape], device, getattr(torch, dtype), attention, tower)
    about = {**report.machine(model.device), "shape": shape, "dtype": dtype, "attention": attention, "repeats": repeats}
    title = f"{shape}: 24 ViT blocks, one image + {text} text tokens, batch {batch}, {about['device']}, {dtype}"
    rows = fusion.measure(model, fusion.fusions(), text, batch, repeats=repeats)
    console.print(fusion.screen(rows, title))
    name = f"fusion_speed_{shape}" + (f"_text{text}_batch{batch}" if (text, batch) != (64, 1) else "")
    for path in fusion.write(output, name, rows, title, about):
        console.print(f"wrote {path}")


@app.command("sweep", no_args_is_help=True)
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
    from llava_patch.tools.sweep.command import sweep

    words = [word.strip() for word in seeds.split(",") if word.strip()]
    if not all(word.isdigit() for word in words) or len(set(words)) != len(words):
        raise SettingError(f"--seeds {seeds}: expected distinct integers, such as 1,2,3")
    try:
        well = sweep(file, output, command, [int(word) for word in words] or None, evaluate or None, dry_run, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command again goes on from here")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if well else 1)


_TO = typer.Option(..., "--to", help="hf or llava")
_TOWER = typer.Option("", "--vision-tower", help="the tower's folder: to hf, where it is; to llava, what to point at")


@app.command("convert")
def convert_command(
    checkpoint: Path = typer.Argument(..., help="a full checkpoint, stock or patched, or an adapter"),  # noqa: B008
    out: Path = typer.Argument(..., help="folder to write: a new one"),  # noqa: B008
    to: str = _TO,
    vision_tower: str = _TOWER,
) -> None:
    """Write a checkpoint for the other host, with the patch that it carries."""
    from llava_patch.tools.convert.command import convert

    console.print(f"wrote {convert(checkpoint, out, to, vision_tower or None)}")


@app.command("merge")
def merge_command(
    checkpoint: Path = typer.Argument(..., help="an adapter or a full patched checkpoint"),  # noqa: B008
    out: Path = typer.Argument(..., help="folder to write: a new one"),  # noqa: B008
    to: str = typer.Option("", help="hf or llava, to convert in the same go; default: the host that it is of"),
    vision_tower: str = _TOWER,
) -> None:
    """Write a plain checkpoint, which needs no llava_patch, where that is exact."""
    from llava_patch.tools.convert.command import merge

    console.print(f"wrote {merge(checkpoint, out, to or None, vision_tower or None)}")


def main() -> None:
    """Entry point; our own errors are one line, not a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except LlavaPatchError as error:
        raise SystemExit(f"llava-patch: {error}") from error
    except (ImportError, OSError) as error:  # a torch without its libraries raises either
        from llava_patch.tools.doctor.software import check_torch

        broken = check_torch()
        if broken is None:
            raise
        raise SystemExit(f"llava-patch: torch {broken.found}: {broken.advice}") from error


if __name__ == "__main__":
    main()
