"""What is compared: the four cells of the modality ablation, and the same model with blurred features."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_patch.hosts.anatomy import find


@dataclass(frozen=True)
class Arm:
    """One probe.

    Attributes:
        name: of its files.
        title: in the table.
        settings: fields of `RProbe` that differ from the defaults.
        blurred: whether the tower's features are blurred before the projector.
    """

    name: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    blurred: bool = False


ARMS = (
    Arm("full", "region seen, with text"),
    Arm("full_nolang", "region seen, without text", {"text": False}),
    Arm("masked", "region masked, with text", {"masked": True}),
    Arm("masked_nolang", "region masked, without text", {"masked": True, "text": False}),
    Arm("blurred", "region seen, with text, features blurred", blurred=True),
)
DIFFERENCES = (
    ("masking, with text", "masked", "full"),
    ("masking, without text", "masked_nolang", "full_nolang"),
    ("taking the text away, region seen", "full_nolang", "full"),
    ("taking the text away, region masked", "masked_nolang", "masked"),
    ("blurring the features", "blurred", "full"),
)


@contextlib.contextmanager
def blur(model: nn.Module) -> Iterator[None]:
    """Average each token of the tower with its neighbours (3 x 3 of the grid) for the time of the block.

    What a token says of its own patch is then a ninth of it, while the mean over the image stays about the same.
    """
    anatomy = find(model)
    rows, columns = anatomy.grid

    def average(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grid = arguments[0].transpose(1, 2).unflatten(2, (rows, columns))
        smooth = functional.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)
        return (smooth.flatten(2).transpose(1, 2), *arguments[1:])

    hook = anatomy.projector.register_forward_pre_hook(average)
    try:
        yield
    finally:
        hook.remove()


def measure(arm: Arm, loaded: tuple[Any, Any, Any], seed: int) -> Any:
    """Run one probe; `loaded` is (model, tokenizer, image processor)."""
    from llava_patch import RProbe
    from llava_patch.measurements.rprobe.fit import run_rprobe

    model, tokenizer, image_processor = loaded
    torch.manual_seed(0)
    with blur(model) if arm.blurred else contextlib.nullcontext():
        return run_rprobe(model, image_processor, tokenizer, RProbe(seed=seed, **arm.settings))
