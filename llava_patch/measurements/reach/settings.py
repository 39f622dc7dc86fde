"""Settings of the gradient reach."""

from __future__ import annotations

from dataclasses import dataclass

from llava_patch.core.errors import SettingError


@dataclass(frozen=True)
class Reach:
    """Settings of the gradient reach; the defaults are this project's choice.

    Attributes:
        samples: how many samples at most; each is one forward and one backward pass.
        everything: ask for a gradient of every parameter, as if all of the model trained, the vision tower included;
            False: as the flags stand.
    """

    samples: int = 4
    everything: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise SettingError(f"Reach.samples = {self.samples!r}: expected an integer from 1 on")
        if not isinstance(self.everything, bool):
            raise SettingError(f"Reach.everything = {self.everything!r}: expected True or False")
