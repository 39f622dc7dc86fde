"""The saturation measurement: its settings, and what commands, report and lmms-eval ask of it.

Source: "Late-Layer Fusion is Enough" (DPVR), section 3.1 and figure 2.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import InputError, SettingError
from llava_patch.measurements.base import Measurement, Table

if TYPE_CHECKING:
    from llava_patch.data.target import Target
    from llava_patch.measurements.saturation.result import SaturationResult


@dataclass(frozen=True)
class Saturation:
    """Settings of the saturation measurement; the defaults are this project's choice unless a source is named.

    Attributes:
        transition_share: the transition layer is where the logit-lens KL has fallen to this share of layer 0's.
        mass_tolerance: attention mass has settled when it stays within this share of its deep median.
        fall_share: the deep median must have fallen to this share of the highest mass, or mass has no say.
        max_samples: stop after so many usable samples; None: take all (the command takes 32).
        chunk: attention queries, and positions of the logit lens, held at a time (memory against speed).
        save_every: samples between two writes of the state from which an interrupted run goes on.
    """

    transition_share: float = 0.5
    mass_tolerance: float = 0.2
    fall_share: float = 0.5
    max_samples: int | None = None
    chunk: int = 128
    save_every: int = 8

    def __post_init__(self) -> None:
        for name in ("transition_share", "mass_tolerance", "fall_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise SettingError(f"Saturation.{name} = {value!r}: expected a number between 0 and 1, both excluded")
        for name in ("max_samples", "chunk", "save_every"):
            value = getattr(self, name)
            if name == "max_samples" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"Saturation.{name} = {value!r}: expected an integer >= 1")


DEFAULTS = Saturation()


class SaturationMeasurement(Measurement):
    """Visual saturation: from which layer on the image is no longer needed.

    Measures cosine, attention mass and logit lens of one checkpoint, stock or
    patched, layer by layer, and recommends a split. OUTPUT gets
    saturation.json and saturation.png. Interrupted, the same command goes on,
    and its result is the same to the last bit.
    """

    name = "saturation"
    title = "Visual saturation"
    about = (
        "From which layer on does the decoder no longer need its image tokens? Cosine near 1: a layer hardly turns the "
        "states. Attention mass: how much text looks at the image. KL: how far a layer's prediction is from the last."
    )
    alt = (
        "Three panels over the decoder layers: cosine of a layer's input and output, attention mass of text on the "
        "image, and KL of the logit lens."
    )
    settings = Saturation
    result = "llava_patch.measurements.saturation.result:SaturationResult"
    compare = "llava_patch.measurements.saturation.result:compare"
    resumes = True

    def tables(self, result: Any) -> list[tuple[str, Table]]:
        """None: the curves are for the figure."""
        return []

    def measure(self, target: "Target", settings: Saturation, folder: Path | None = None) -> "SaturationResult":
        """One forward pass a sample; an unfinished run goes on from its state in the folder."""
        import dataclasses

        from llava_patch.data.readers.read import resolve_source
        from llava_patch.measurements.saturation.measure import measure_saturation
        from llava_patch.measurements.saturation.state import STATE_FILE, State

        samples = target.samples(settings.max_samples)
        key = self._key(target, settings)
        state = None if folder is None else State(folder / STATE_FILE, key)
        result = measure_saturation(target.subject.model, samples, settings, state=state)
        facts = {
            "base": target.below,
            "data": resolve_source(target.data) or "rendered pages",
            "question": target.question,
            "examples": len(samples),
            "dtype": key["dtype"],
            "device": key["device"],
            "key": _digest(key),
        }
        return dataclasses.replace(result, facts=facts)

    def kept(self, target: "Target", settings: Saturation, folder: Path) -> "SaturationResult | None":
        """The result of the very same measurement; one of an earlier version, or damaged, counts as none."""
        from llava_patch.measurements.saturation.result import SaturationResult

        try:
            found = SaturationResult.load(folder / "saturation.json")
        except InputError:
            return None
        return found if found.facts.get("key") == _digest(self._key(target, settings)) else None

    def finished(self, folder: Path) -> None:
        """Delete the state."""
        from llava_patch.measurements.saturation.state import STATE_FILE

        (folder / STATE_FILE).unlink(missing_ok=True)

    def _key(self, target: "Target", settings: Saturation) -> dict[str, Any]:
        from llava_patch.hosts.anatomy import find
        from llava_patch.measurements.saturation.state import make_key

        return make_key(find(target.subject.model), target.examples(settings.max_samples), settings)


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
