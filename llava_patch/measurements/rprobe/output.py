"""The files of one run: its result and its pictures, side by side in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_patch.core import parallel
from llava_patch.measurements.rprobe.error_map import colour_limit, save_map
from llava_patch.measurements.rprobe.figures import FORMATS, save_figure
from llava_patch.measurements.rprobe.result import RProbeResult, write_json

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
    write_json(result, folder / RESULT)
    limit = colour_limit(result.maps) if result.maps else None
    for suffix in formats:
        save_figure(result, (folder / FIGURE).with_suffix(f".{suffix}"))
        for number, page in enumerate(result.maps, 1):
            path = (folder / MAP.format(number)).with_suffix(f".{suffix}")
            save_map(page, path, bool(result.settings["masked"]), limit)
    for suffix in FORMATS:
        if suffix not in formats:
            (folder / FIGURE).with_suffix(f".{suffix}").unlink(missing_ok=True)
        number = len(result.maps) + 1 if suffix in formats else 1
        while (old := (folder / MAP.format(number)).with_suffix(f".{suffix}")).is_file():
            old.unlink()
            number += 1
