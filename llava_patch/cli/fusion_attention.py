"""`llava-patch fusion-attention`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from llava_patch.cli import common as commands
from llava_patch.cli import output as written
from llava_patch.cli import several
from llava_patch.cli.drift import STOCK
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.core.paths import named
from llava_patch.data.examples import check_data
from llava_patch.data.model_inputs import with_count
from llava_patch.settings.active import settings_of

NAME = "fusion_attention"
SAMPLES = 32


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fusion-attention", no_args_is_help=True)(fusion_attention)


@needs("fusion-attention", "figures")
def fusion_attention(
    checkpoint: str = commands.CHECKPOINT,
    stock: str = STOCK,
    data: str = commands.DATA,
    samples: int | None = commands.samples_option(SAMPLES, "FusionAttention.max_samples"),
    layers: str = typer.Option("", help="decoder layers, as 30,31; default: CKPT's fusion layers, else the last"),
    question: str = commands.QUESTION,
    output: Path | None = typer.Option(  # noqa: B008
        None, help="folder; default: fusion-attention/NAME", show_default=False
    ),
    base: str = commands.BASE,
    device: str = commands.DEVICE,
    dtype: str = commands.DTYPE,
    gin_file: list[str] = commands.GIN_FILE,
    gin_param: list[str] = commands.GIN_PARAM,
) -> None:
    """Has the fusion layer learned to look at the image, and which heads?

    Attention that text behind the image puts on it, head by head, against
    the base's same layer. The models are loaded one after the other.
    OUTPUT gets fusion_attention.json and fusion_attention.png.
    """
    from llava_patch.measurements.fusion_attention import FusionAttention, measure_fusion_attention_apart

    commands.check_checkpoint(checkpoint)
    folder = commands.folder_for("fusion-attention", checkpoint, output)
    with commands.configured(gin_file, gin_param):
        settings = settings_of(FusionAttention, layers=_numbers(layers))
        stock = several.base_for(checkpoint, stock or settings.base or base)
        sources = [named(checkpoint), named(stock)]
        written.check_results(folder / f"{NAME}.json", sources)
        settings = with_count(settings, samples, SAMPLES)
        check_data(data)
        own, other = several.openers(checkpoint, stock, base, data, settings.max_samples, question, device, dtype)
        result = measure_fusion_attention_apart(own, other, settings)
        result = dataclasses.replace(result, checkpoint=sources[0], base=sources[1])
        written.show(result.table())
        written.finish_plain(result, folder, NAME, checkpoint)


def _numbers(layers: str) -> tuple[int, ...] | None:
    if not layers:
        return None
    try:
        return tuple(int(part) for part in layers.split(","))
    except ValueError:
        raise SettingError(f"--layers {layers}: expected layer numbers, as 30,31") from None
