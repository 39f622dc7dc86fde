"""The files of one run: its result and its pictures, side by side in a folder."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_patch.core import parallel
from llava_patch.core.errors import CheckpointError
from llava_patch.core.files import plain
from llava_patch.measurements.base import FIGURES
from llava_patch.measurements.rprobe.figures import colour_limit, save_map
from llava_patch.measurements.rprobe.keys import difference
from llava_patch.measurements.rprobe.result import RProbeResult
from llava_patch.measurements.rprobe.resume import DECODER_FILE, STATE_FILE
from llava_patch.measurements.rprobe.settings import RProbe

_SAME_FIGURES = ("store", "store_gb", "save_every", "minutes")
"""Settings that neither the numbers nor the pictures of a finished run depend on."""
RESULT, FIGURE, MAP = "rprobe.json", "rprobe.png", "map-{}.png"


def write_run(result: RProbeResult, folder: str | Path, formats: Sequence[str] = ("png",)) -> None:
    """Write `rprobe.json`, `rprobe.png` and, for each page rebuilt whole, `map-N.png`; rank 0 does.

    Then the decoder that the run left in the folder is taken away, unless it was to be kept (`RProbe.keep_decoder`).

    Args:
        result: what `run_rprobe` returned; of one that was `kept` nothing is written.
        folder: made when it is missing; pictures of an earlier run that this one has not are deleted.
        formats: of the pictures, "png" and "pdf".

    Raises:
        CheckpointError: the result was kept, and the folder has no pictures in one of the formats.
    """
    if parallel.rank() != 0:
        return
    folder = Path(folder)
    if result.kept:
        for suffix in formats:
            if not (folder / FIGURE).with_suffix(f".{suffix}").is_file():
                raise _needs_decoder(folder, f"a figure in {suffix}")
        return
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
    if not result.settings.get("keep_decoder", False):
        (folder / DECODER_FILE).unlink(missing_ok=True)  # last: until then the same run goes on from it


def written(
    folder: Path, key: dict[str, Any], heldout: str, settings: RProbe, show: Sequence[str]
) -> RProbeResult | None:
    """What `write_run` wrote of the same run, whose decoder is gone; None: it is another run's, or not all there.

    Args:
        folder: of the run.
        key: what the run depends on, see `make_key`.
        heldout: key of the held-out data.
        settings: of the run.
        show: ids of held-out samples that are asked for.

    Raises:
        CheckpointError: the same training, but what is asked for takes its decoder; or a damaged result.
    """
    path = folder / RESULT
    if not path.is_file() or (folder / DECODER_FILE).is_file() or (folder / STATE_FILE).is_file():
        return None
    found = RProbeResult.load(path)
    there = found.facts.get("key")
    if not isinstance(there, dict) or difference(there, key) or found.facts.get("heldout_key") != heldout:
        return None
    now = plain(dataclasses.asdict(settings))
    aside = _SAME_FIGURES if settings.keep_decoder else (*_SAME_FIGURES, "keep_decoder")
    other = [n for n, value in now.items() if n not in aside and found.settings.get(n, getattr(RProbe, n)) != value]
    if other or show:
        raise _needs_decoder(folder, f"RProbe.{other[0]} = {now[other[0]]}" if other else f"--show {show[0]}")
    return dataclasses.replace(found, kept=True)


def _needs_decoder(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / RESULT} is finished, and {what} needs its decoder, which was not kept: train it again with "
        "--overwrite (and --keep-decoder, which leaves it there)"
    )
