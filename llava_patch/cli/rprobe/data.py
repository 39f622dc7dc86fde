"""`llava-patch rprobe preview`, `export` and `store`: what the data hold, and what is kept of them on disk."""

import time
from pathlib import Path
from typing import Optional

import typer
from rich.console import Console

from llava_patch.cli.common import (
    DATA,
    DATA_NEEDED,
    DATA_OPTION,
    SAMPLES,
    check_checkpoint,
    check_output,
    one_data,
    output_option,
    results_in,
)  # fmt: skip
from llava_patch.cli.rprobe import BOXES_PER_SAMPLE, BROKEN, app
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import needs
from llava_patch.core.outputs import place
from llava_patch.core.terminal import bordered, counted
from llava_patch.measurements.rprobe.settings import IMAGE_MODES, RProbe

PICTURE = "preview.png"
PAGES = 16  # rendered pages that are counted when there is no data


@app.command("preview")
@needs("rprobe preview", "figures")
def preview(
    data: str = DATA,
    data_option: str = DATA_OPTION,
    model: str = typer.Option("", help="checkpoint whose image processor and tokens are used; no weights are loaded"),
    image_mode: str = typer.Option("resize", help=f"{', '.join(IMAGE_MODES)} (anyres: with --model)"),
    text_height: float = typer.Option(RProbe.text_height, help="least height of text in tokens, in mode window"),
    size: int = typer.Option(336, min=1, help="side of the tower's input in pixels, without --model"),
    patch: int = typer.Option(14, min=1, help="side of a token in pixels, without --model"),
    samples: int = typer.Option(6, min=0, help=f"{SAMPLES} 6", show_default=False),
    show: list[str] = typer.Option([], help="this sample instead, by id or number from 0; may be repeated"),  # noqa: B008
    boxes_per_sample: int = BOXES_PER_SAMPLE,
    broken: str = BROKEN,
    output: Optional[Path] = output_option("rprobe-preview", "DATA's name"),
) -> None:
    """Draw samples with their boxes as they are and as the tower sees them, and count what there is.

    Settings may follow DATA: scans?images=jpg, hf:NAME:train?boxes=1000,
    x.json?format=funsd, scans?broken=skip&exif=stored, gt?coordinates=4.
    A look before every run: are the boxes right? OUTPUT gets preview.png.
    """
    from llava_patch.data.configuration import read_transform
    from llava_patch.data.pages import Pages
    from llava_patch.data.readers import Samples, read_samples
    from llava_patch.data.readers.read import skips
    from llava_patch.data.readers.samples import SKIP
    from llava_patch.measurements.rprobe.preview import choose_shown, clip_like, counts, save_preview

    if image_mode not in IMAGE_MODES:
        raise SettingError(f"--image-mode {image_mode}: expected one of {', '.join(IMAGE_MODES)}")
    data = one_data(data, data_option)
    if output is not None and output.suffix.lower() == ".png" and not output.is_dir():
        raise SettingError(f"--output {output}: a folder is named with it, which gets {PICTURE}")
    name = Path(data.partition("?")[0]).name.partition(".")[0] if data else "pages"
    output = check_output(output or place("rprobe-preview", name))
    shown_as = image_mode, RProbe(image_mode=image_mode, text_height=text_height).text_height
    if model:
        check_checkpoint(model, "--model")
    transform = read_transform(model, *shown_as) if model else clip_like(size, patch, *shown_as)
    if data:
        found = read_samples(data, boxes_per_sample, broken)
    elif boxes_per_sample != 1:
        raise SettingError("--boxes-per-sample: rendered pages have one region each")
    else:
        found = Samples(Pages(max(PAGES, samples), transform.height))
    rows, shown, skipped = counts(found, transform), choose_shown(found, samples or len(found), show), found.skipped
    if data:
        rows.insert(0, ("read as", found.format))
        rows.insert(3, ("regions without transcript", f"{found.unread:,}"))
        rows.insert(4, ("skipped", f"{len(skipped):,}"))
    for sample in [*shown] if data else []:
        try:  # a file may break off behind its header, which is all that was read so far
            sample.open_image()
        except InputError as error:
            if not skips(data, broken):
                raise InputError(f"{error}; {SKIP}") from error
            skipped.append(str(error))
            shown.remove(sample)
    title = f"{data or 'rendered pages'}  ·  {model or f'a CLIP tower of {size} / {patch}'}  ·  {image_mode}"
    with results_in(output):
        path = save_preview(shown, transform, output / PICTURE, title)
    console = Console()
    console.print(bordered(["what", "how many"], rows, data or counted(len(found), "rendered page")))
    for message in skipped[:5]:
        console.print(f"skipped: {message}", markup=False, soft_wrap=True)
    if len(skipped) > 5:
        console.print(f"… and {len(skipped) - 5:,} more")
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


@app.command("export")
def export(
    data: str = DATA_NEEDED,
    out: Path = typer.Argument(..., metavar="OUT", help="JSONL file to write"),  # noqa: B008
    boxes_per_sample: int = BOXES_PER_SAMPLE,
    broken: str = BROKEN,
    overwrite: bool = typer.Option(False, "--overwrite", help="replace OUT"),
    force: bool = typer.Option(False, "--force", hidden=True),  # what --overwrite was called
) -> None:
    """Write samples of any DATA as JSONL, a line a region, to look at, to cut and to share.

    Images stay where they are; those that are no files (parquet, arrow) are
    written beside OUT, into a folder called after it with "_images" behind.
    Boxes come out in pixels of the displayed image, whatever DATA says.
    """
    from llava_patch.data.readers import read_samples, write_jsonl

    if out.suffix.lower() != ".jsonl":
        raise SettingError(f"{out}: expected a .jsonl file")
    if out.exists() and not (overwrite or force):
        raise SettingError(f"{out}: is there already: name another file, or replace it with --overwrite")
    samples = read_samples(data, boxes_per_sample, broken)
    write_jsonl(samples, out)
    for message in samples.skipped:
        typer.echo(f"skipped: {message}")
    left = f"; {counted(samples.unread, 'region')} without transcript: boxes only" if samples.unread else ""
    documents = counted(len({sample.document for sample in samples}), "document")
    typer.echo(f"wrote {out}: {counted(len(samples), 'sample')} of {documents} ({samples.format}{left})")


@app.command("store")
def store(clear: bool = typer.Option(False, "--clear", help="delete every store that no process uses")) -> None:
    """List the frozen visual tokens kept on disk; --clear deletes them.

    They lie under $LLAVA_PATCH_CACHE/rprobe (default: llava_patch in the
    user's cache folder), at most RProbe.store_gb together: the longest unused
    ones are deleted first. Without them a probe encodes its images again.
    """
    from llava_patch.measurements.rprobe.store.disk import delete_unused, list_stores, stores_folder

    console = Console()
    if clear:
        deleted, left = delete_unused(stores_folder())
        console.print(f"deleted {counted(len(deleted), 'store')}, {_size(sum(kept.bytes for kept in deleted))}")
        for kept in left:
            console.print(f"left, because a process uses it: {kept.folder}")
        return
    stores = list_stores(stores_folder())
    if not stores:
        console.print(f"no stores under {stores_folder()}")
        return
    # A line a path: a table would break each of them over several.
    total = _size(sum(kept.bytes for kept in stores))
    lines = [f"{stores_folder()}: {counted(len(stores), 'store')}, {total}"]
    for kept in reversed(stores):
        about = kept.about
        there = len(list(kept.folder.glob("shard-*.safetensors")))
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.used))
        lines += [
            f"{kept.folder.name[:8]}  {_size(kept.bytes)}, {there} of {about.get('shards', '?')} shards, used {used}",
            f"  model  {about.get('model', '?')}",
            f"  data   {about.get('data', '?')}{', masked' if about.get('masked') else ''}",
        ]
    text = "\n".join(lines).encode("utf-8", "backslashreplace").decode()
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _size(number: int) -> str:
    """Bytes as text, in the unit that leaves at most three digits before the point."""
    unit, scale = next((one for one in (("GB", 1e9), ("MB", 1e6)) if number >= one[1]), ("kB", 1e3))
    return f"{number / scale:.1f} {unit}"
