"""How much each section of a report measures."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llava_patch.core.errors import SettingError


@dataclass(frozen=True)
class Report:
    """Sample counts of a report: enough for its figures, few enough for minutes. This project's choice.

    A measurement's own settings, where they are bound, win over these.

    Attributes:
        samples: images for saturation, and for what is compared with the base.
        maps: images in the panel of attention maps.
        gradient_steps: batches over which gradients are decomposed.
    """

    samples: int = 24
    maps: int = 3
    gradient_steps: int = 48

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"Report.{field.name} = {value!r}: expected an integer >= 1")
