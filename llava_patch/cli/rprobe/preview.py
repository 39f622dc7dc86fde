"""`llava-patch rprobe preview`: samples with their boxes, before and after the image transform."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from llava_patch.cli.rprobe import BOXES_PER_SAMPLE, BROKEN, app
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import needs
from llava_patch.core.terminal import bordered, counted
from llava_patch.measurements.base import words
from llava_patch.measurements.rprobe.settings import IMAGE_MODES

if TYPE_CHECKING:
    from llava_patch.probe.sample import Sample

PAGES = 16  # rendered pages that are counted when there is no data


@app.command("preview")
@needs("rprobe preview", "figures")
def preview(
    data: str = typer.Argument("", help="JSONL file, SROIE/ICDAR, FUNSD, COCO-Text, TextOCR, hf:NAME; default: pages"),
    model: str = typer.Option("", help="checkpoint whose image processor and tokens are used; no weights are loaded"),
    image_mode: str = typer.Option("resize", help=f"{', '.join(IMAGE_MODES)} (anyres: with --model)"),
    size: int = typer.Option(336, min=1, help="side of the tower's input in pixels, without --model"),
    patch: int = typer.Option(14, min=1, help="side of a token in pixels, without --model"),
    count: int = typer.Option(6, min=1, help="samples to show, spread over the data"),
    samples: str = typer.Option("", help="these instead: ids or numbers from 0, joined by commas"),
    boxes_per_sample: int = BOXES_PER_SAMPLE,
    broken: str = BROKEN,
    output: Path = typer.Option(Path("preview.png"), help="picture to write"),  # noqa: B008
) -> None:
    """Draw samples with their boxes as they are and as the tower sees them, and count what there is.

    Settings may follow DATA: scans?images=jpg, hf:NAME:train?boxes=1000,
    x.json?format=funsd. A look before every run: are the boxes right?
    """
    from llava_patch.data.pages import Pages
    from llava_patch.data.readers import Samples, read_samples
    from llava_patch.measurements.rprobe.preview import choose_shown, clip_like, counts, save_preview

    if image_mode not in IMAGE_MODES:
        raise SettingError(f"--image-mode {image_mode}: expected one of {', '.join(IMAGE_MODES)}")
    if output.suffix.lower() != ".png":
        raise SettingError(f"--output {output}: expected a .png file")
    if model:
        from llava_patch.data.configuration import read_transform

        transform = read_transform(model, image_mode)
    else:
        transform = clip_like(size, patch, image_mode)
    if not data and boxes_per_sample != 1:
        raise SettingError("--boxes-per-sample: rendered pages have one region each")
    found = (
        read_samples(data, boxes_per_sample, broken) if data else Samples(Pages(max(PAGES, count), transform.height))
    )
    rows, shown, skipped = counts(found, transform), choose_shown(found, count, words(samples)), found.skipped
    if data:
        rows.insert(0, ("read as", found.format))
        rows.insert(3, ("regions without transcript", f"{found.unread:,}"))
        rows.insert(4, ("skipped", f"{len(skipped):,}"))
    if broken == "skip":
        shown = _sound(shown, skipped)
    title = f"{data or 'rendered pages'}  ·  {model or f'a CLIP tower of {size} / {patch}'}  ·  {image_mode}"
    path = save_preview(shown, transform, output, title)
    console = Console()
    console.print(bordered(["what", "how many"], rows, data or counted(len(found), "rendered page")))
    for message in skipped[:5]:
        console.print(f"skipped: {message}", markup=False, soft_wrap=True)
    if len(skipped) > 5:
        console.print(f"… and {len(skipped) - 5:,} more")
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def _sound(shown: list[Sample], skipped: list[str]) -> list[Sample]:
    """Those whose pixels can be read: a file may break off behind its header, which is all that was read so far."""
    kept = []
    for sample in shown:
        try:
            sample.open_image()
        except InputError as error:
            skipped.append(str(error))
        else:
            kept.append(sample)
    return kept
