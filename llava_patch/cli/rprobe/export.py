"""`llava-patch rprobe export`: any source as our own JSONL."""

from __future__ import annotations

from pathlib import Path

import typer

from llava_patch.cli.rprobe import BOXES_PER_SAMPLE, BROKEN, app
from llava_patch.core.errors import SettingError
from llava_patch.core.terminal import counted


@app.command("export")
def export(
    source: str = typer.Argument(..., help="SROIE/ICDAR, FUNSD, COCO-Text, TextOCR, hf:NAME, or a JSONL file"),
    out: Path = typer.Argument(..., help="JSONL file to write"),  # noqa: B008
    boxes_per_sample: int = BOXES_PER_SAMPLE,
    broken: str = BROKEN,
    force: bool = typer.Option(False, "--force", help="overwrite OUT"),
) -> None:
    """Write samples of any source as JSONL, a line a region, to look at, to cut and to share.

    Images stay where they are; those that are no files (parquet, arrow) are
    written beside OUT, into a folder called after it with "_images" behind.
    """
    from llava_patch.data.readers import read_samples, write_jsonl

    if out.suffix.lower() != ".jsonl":
        raise SettingError(f"{out}: expected a .jsonl file")
    if out.exists() and not force:
        raise SettingError(f"{out}: is there already: name another file, or overwrite it with --force")
    samples = read_samples(source, boxes_per_sample, broken)
    write_jsonl(samples, out)
    documents = len({sample.document for sample in samples})
    for message in samples.skipped:
        typer.echo(f"skipped: {message}")
    left = ""
    if samples.unread:
        left = f"; {counted(samples.unread, 'region')} without transcript: boxes only"
    told = f"{counted(len(samples), 'sample')} of {counted(documents, 'document')}"
    typer.echo(f"wrote {out}: {told} ({samples.format}{left})")
