"""Saturation measurements kept on disk, so that `Routing(split="auto")` measures a model and its samples once.

A file is found again by what decides about the measurement: the model's weights (sampled), the settings in its
configuration that change the forward pass, a patch that is already on it, the samples, and the `Saturation` settings.
Floating-point values enter rounded to bfloat16, so that one model loaded in two precisions is one model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_patch.core.files import write_json
from llava_patch.core.paths import VARIABLE, cache_folder
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.saturation.result import Saturation, SaturationResult
from llava_patch.patching.keys import digest_of, model_digest

FORMAT = 2
_NOT_MEASURED = ("labels", "attention_mask")  # samples have no padding, so that neither changes what is measured
logger = logging.getLogger("llava_patch")


def key(anatomy: Anatomy, samples: Sequence[Mapping[str, Any]], settings: Saturation) -> dict[str, Any]:
    """What a measurement depends on, as JSON values.

    Args:
        anatomy: the host model.
        samples: the samples that are measured, and no others.
        settings: of the measurement.
    """
    return {
        "format": FORMAT,
        "model": model_digest(anatomy),
        "samples": digest_of([{k: v for k, v in s.items() if k not in _NOT_MEASURED} for s in samples]),
        "settings": {k: v for k, v in asdict(settings).items() if k != "save_every"},
    }


def path_of(wanted: dict[str, Any]) -> Path:
    """The file that holds, or will hold, the measurement with this key."""
    return cache_folder() / f"saturation-{digest_of(wanted)[:24]}.json"


def read(path: Path, wanted: dict[str, Any], n_layers: int) -> SaturationResult | None:
    """A kept measurement; None when there is none. A damaged file counts as none, with a warning.

    Args:
        path: from `path_of`.
        wanted: the key.
        n_layers: the model's depth L.
    """
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != wanted:
            raise ValueError("it belongs to another model, other samples or other settings")
        result = SaturationResult.from_dict(kept["saturation"])
        if result.n_layers != n_layers:
            raise ValueError(f"it has {result.n_layers} layers, the model {n_layers}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("llava_patch: %s cannot be used (%s): measuring again, the file is replaced", path, reason)
        return None
    return result


def write(path: Path, wanted: dict[str, Any], result: SaturationResult) -> None:
    """Keep a measurement; a folder that cannot be written costs a warning, not the run."""
    try:
        write_json(path, {"key": wanted, "saturation": result.to_dict()})
    except OSError as error:
        logger.warning(
            "llava_patch: the saturation measurement could not be kept (%s): it will be made again next time; set %s "
            "to a folder that can be written",
            error,
            VARIABLE,
        )
