"""The files of one run: its result and its pictures, side by side in a folder."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from llava_patch.core import parallel
from llava_patch.measurements.base import FIGURES
from llava_patch.measurements.rprobe.figures import colour_limit, save_map
from llava_patch.measurements.rprobe.result import RProbeResult

RESULT, FIGURE, MAP = "rprobe.json", "rprobe.png", "map-{}.png"


def write_run(result: RProbeResult, folder: str | Path, formats: Sequence[str] = ("png",)) -> None:
    """Write `rprobe.json`, `rprobe.png` and, for each page rebuilt whole, `map-N.png`; rank 0 does.

    Args:
        result: what `run_rprobe` returned.
        folder: made when it is missing; pictures of an earlier run that this one has not are deleted.
        formats: of the pictures, "png" and "pdf".
    """
    if parallel.rank() != 0:
        return
    folder = Path(folder)
    result.save(folder, formats=formats)
    limit = colour_limit(result.maps) if result.maps else None
    for suffix in FIGURES:
        if suffix not in formats:
            (folder / FIGURE).with_suffix(f".{suffix}").unlink(missing_ok=True)
        pages = result.maps if suffix in formats else []
        maps = ((folder / MAP.format(number)).with_suffix(f".{suffix}") for number in itertools.count(1))
        for page, path in zip(pages, maps):  # noqa: B905 - the second goes on
            save_map(page, path, bool(result.settings["masked"]), limit)
        for old in itertools.takewhile(Path.is_file, maps):
            old.unlink()
