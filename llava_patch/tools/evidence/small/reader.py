"""The small model that reads strings of digits, and how it is taught to."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.hosts import anatomy
from llava_patch.tools.evidence.small import digits
from llava_patch.tools.evidence.small.model import Text, Vision, build
from llava_patch.tools.evidence.small.training import Recipe, fit, pretrain_tower

VISION = Vision(image=digits.SIDE, patch=digits.CELL, width=64, layers=8, heads=2)
TEXT = Text(digits.VOCABULARY, width=128, layers=4, heads=4, wide=336, positions=64)
DENSE_BATCH, BATCH = 64, 32
DENSE, ANSWERS, TOGETHER = Recipe(700, 3e-3), Recipe(150, 2e-3), Recipe(800, 1e-3)
HELD = 512  # images of held-out strings
PARTS = ("tower", "projector", "language")


@dataclass(frozen=True)
class Lessons:
    """What the reader is taught, in order.

    Attributes:
        images: that the lessons draw from.
        dense: the tower alone learns which digits, and which places of the string, each patch shows.
        answers: projector and decoder learn to answer; the tower waits, or it forgets within fifty steps.
        together: all of them.
    """

    images: int = 32000
    dense: Recipe = DENSE
    answers: Recipe = ANSWERS
    together: Recipe = TOGETHER

    def scaled(self, factor: float) -> "Lessons":
        """The same with more or fewer steps and images."""
        lessons = (self.dense, self.answers, self.together)
        steps = (replace(lesson, steps=max(1, round(factor * lesson.steps))) for lesson in lessons)
        return Lessons(max(DENSE_BATCH, round(factor * self.images)), *steps)


def new(seed: int) -> Any:
    """The untaught model, in eval mode."""
    return build(VISION, TEXT, digits.IMAGE, seed)


@torch.no_grad()
def fresh_projector(model: Any, seed: int) -> None:
    """Make the projector, widened or not, a new one as `build` does."""
    generator = torch.Generator().manual_seed(seed)
    for linear in (module for module in anatomy.find(model).projector.modules() if isinstance(module, nn.Linear)):
        drawn = torch.randn(linear.weight.shape, generator=generator) / math.sqrt(linear.in_features)
        linear.weight.copy_(drawn)
        nn.init.zeros_(linear.bias)


def draws(count: int, seed: int, size: int = BATCH) -> Callable[[], Tensor]:
    """Draws batches of indices, int64 [size], below `count`; the same seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randint(count, (size,), generator=generator)


def teach(model: Any, drawn: digits.Drawn, lessons: Lessons, seed: int) -> tuple[float, dict[str, Tensor]]:
    """Teach a new model to read.

    Returns:
        The share of patches and places that the tower named right at the end of its lesson, and its weights then.
    """
    some, index = draws(len(drawn), seed, DENSE_BATCH), draws(len(drawn), seed + 1)
    labels = drawn.patch_labels()

    def patches() -> tuple[Tensor, Tensor]:
        chosen = some()
        return digits.normalised(drawn.pixels[chosen]), labels[chosen]

    named = pretrain_tower(model, patches, digits.BLANK + 1, lessons.dense, seed)
    tower = {name: value.detach().clone() for name, value in parts(model)["tower"].state_dict().items()}

    def answers(_: int) -> Tensor:
        loss: Tensor = model(**drawn.batch(index(), device=model.device)).loss
        return loss

    model.train()
    model.requires_grad_(True)
    everything = list(model.parameters())
    parts(model)["tower"].requires_grad_(False)
    fit(answers, [parameter for parameter in everything if parameter.requires_grad], lessons.answers)
    model.requires_grad_(True)
    # The last block and the final norm lie behind the hidden state that the projector reads.
    fit(answers, everything, lessons.together)
    model.eval()
    return named, tower


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Tower, projector and language model (its head is apart, see `weights`)."""
    found = anatomy.find(model)
    return {"tower": found.tower, "projector": found.projector, "language": found.decoder}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights as "tower.…", "projector.…", "language.…" and "head.…"."""
    modules = {**parts(model), "head": anatomy.find(model).lm_head}
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


def load(model: nn.Module, kept: Mapping[str, Tensor], only: tuple[str, ...] = (*PARTS, "head")) -> None:
    """Put kept weights into a model; `only` names the parts. A projector of another width cannot take any."""
    modules = {**parts(model), "head": anatomy.find(model).lm_head}
    for part in only:
        own = {name.removeprefix(f"{part}."): value for name, value in kept.items() if name.startswith(f"{part}.")}
        modules[part].load_state_dict(own)
