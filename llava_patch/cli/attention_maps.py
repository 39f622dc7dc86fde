"""`llava-patch attention-maps`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llava_patch.cli import common as commands
from llava_patch.cli import output as written
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import needs
from llava_patch.core.paths import named
from llava_patch.data.examples import check_data
from llava_patch.data.model_inputs import ModelInputs, examples_for, with_count
from llava_patch.settings.active import settings_of

if TYPE_CHECKING:
    from llava_patch.measurements.attention_maps import AttentionMaps, AttentionMapsResult

NAME = "attention_maps"
SAMPLES = 4


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("attention-maps", no_args_is_help=True)(attention_maps)


@needs("attention-maps", "figures")
def attention_maps(
    checkpoints: list[str] = typer.Argument(  # noqa: B008
        ..., metavar="CKPT [CKPT ...]", help="checkpoints of llava or HF, patched or not; or adapters"
    ),
    image: list[str] = typer.Option([], help="an image; may be repeated; instead of --data"),  # noqa: B008
    data: str = typer.Option("", help="LLaVA's JSON, R-Probe's kinds of data or a folder of images; default: pages"),
    block: int | None = typer.Option(None, help="ViT block, from 1; default 4"),
    samples: int | None = commands.samples_option(SAMPLES, "AttentionMaps.max_samples"),
    names: str = typer.Option("", help="what to call the checkpoints, with commas; default: by their paths"),
    output: Path | None = typer.Option(  # noqa: B008
        None, help="folder; default: attention-maps/ and the first CKPT's name", show_default=False
    ),
    base: str = commands.BASE,
    device: str = commands.DEVICE,
    dtype: str = commands.DTYPE,
    gin_file: list[str] = commands.GIN_FILE,
    gin_param: list[str] = commands.GIN_PARAM,
) -> None:
    """Which patches does a shallow ViT block look at? Checkpoints side by side.

    CLS-to-patch attention, mean over heads; in a tower without CLS the mean
    over all patches. Checkpoints are loaded one after the other.
    OUTPUT gets attention_maps.json and attention_maps.png.
    """
    from llava_patch.measurements.attention_maps import AttentionMaps
    from llava_patch.measurements.base import names_of

    if image and data:
        raise SettingError("--image and --data: give one of them")
    if image and samples is not None:
        raise SettingError("--samples belongs to --data: every --image is shown")
    missing = [one for one in image if not Path(one).is_file()]
    if missing:
        raise InputError(f"--image {missing[0]}: no such file (a folder of images is given with --data)")
    for checkpoint in checkpoints:
        commands.check_checkpoint(checkpoint)
    labels = names_of(checkpoints, names)
    folder = commands.folder_for("attention-maps", checkpoints[0], output)
    sources = [named(c) for c in checkpoints]
    with commands.configured(gin_file, gin_param):
        written.check_results(folder / f"{NAME}.json", sources)
        settings = settings_of(AttentionMaps, block=block)
        settings = with_count(settings, len(image) or samples, SAMPLES)
        for source in image or [data]:
            check_data(source)
        result: "AttentionMapsResult | None" = None
        for checkpoint, label, source in zip(checkpoints, labels, sources, strict=True):
            one = _measure(checkpoint, label, source, image, data, settings, base, device, dtype)
            result = one if result is None else result.beside(one)
        assert result is not None
        written.show(result.table())
        written.finish_plain(result, folder, NAME, checkpoints[0])


def _measure(
    checkpoint: str,
    label: str,
    source: str,
    image: list[str],
    data: str,
    settings: "AttentionMaps",
    base: str,
    device: str,
    dtype: str,
) -> "AttentionMapsResult":
    """One checkpoint, which is gone from memory when this returns."""
    from llava_patch.measurements.attention_maps import measure_attention_maps

    subject = commands.load(checkpoint, base, device, dtype)
    if image:
        examples = [example for path in image for example in examples_for(subject, path, 1)]
    else:
        examples = examples_for(subject, data, settings.max_samples)
    return measure_attention_maps(
        subject.model,
        ModelInputs(subject, examples),
        settings,
        image_processor=subject.image_processor,
        checkpoint=label,
        images=[example.id for example in examples],
        source=source,
    )
