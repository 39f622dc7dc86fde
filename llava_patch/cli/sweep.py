"""`llava-patch sweep SWEEP.gin --output OUTPUT -- COMMAND`."""

from __future__ import annotations

from pathlib import Path

import typer

from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs


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
