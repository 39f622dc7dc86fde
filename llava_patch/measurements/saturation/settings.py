"""Settings of the saturation measurement."""

from __future__ import annotations

from dataclasses import dataclass

from llava_patch.core.errors import SettingError


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
