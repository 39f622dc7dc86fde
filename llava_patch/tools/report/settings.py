"""How much each section of a report measures."""

from dataclasses import dataclass, fields

from llava_patch.settings.checks import integer


@dataclass(frozen=True)
class Report:
    """Sample counts of a report: enough for its figures, few enough for minutes. This project's choice.

    A measurement's own settings, where they are bound, win over these.

    Attributes:
        samples: images for saturation, and for what is compared with the base; None: all.
        maps: images in the panel of attention maps.
        gradient_steps: batches over which gradients are decomposed.
    """

    samples: int | None = 24
    maps: int = 3
    gradient_steps: int = 48

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "samples" and self.samples is None:
                continue
            integer("Report", field.name, getattr(self, field.name), 1)
