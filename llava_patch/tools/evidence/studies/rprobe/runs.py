"""The reader, and what R-Probe says of it on pages and with features that are damaged on purpose."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from llava_patch.fusion.skip_links import SkipLinks
from llava_patch.hosts import anatomy
from llava_patch.measurements.rprobe.ablation import VARIANTS
from llava_patch.patching.patch import patch
from llava_patch.tools.evidence.small import digits, pages, probing, reader
from llava_patch.tools.evidence.small.training import Recipe, fit
from llava_patch.tools.evidence.statistics import pack_bits
from llava_patch.tools.evidence.study import Context, Run

READER = "rprobe/reader"
PAGES = {"small_ink": (1000, 300), "fixed": (800, 800)}  # pages and steps of each ablation
DAMAGE = 1000, 300
STAGE_ONE = Recipe(100, 2e-3)
STRIDE = 2  # of SkipLinks: blocks 2, 4 and 6 of 8, beside block 7


def teach(context: Context) -> dict[str, Any]:
    """Teach the small model to read; keeps its weights, and as "dense.…" those of its tower before it was tuned."""
    lessons = reader.Lessons().scaled(context.size.scale)
    model = reader.new(context.seed).to(context.device)
    named, dense = reader.teach(model, digits.draw(lessons.images, context.seed, held_out=False), lessons, context.seed)
    context.keep({**reader.weights(model), **{f"dense.{name}": value for name, value in dense.items()}})
    held = digits.evaluate(model, digits.draw(reader.HELD, context.seed, held_out=True))
    other = digits.evaluate(model, digits.draw(reader.HELD, context.seed + 1000, held_out=False))
    return {
        "held": pack_bits(held.right),
        "held_loss": held.loss,
        "trained_strings_other_images": other.exact,
        "patches_named": named,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": [lessons.dense.steps, lessons.answers.steps, lessons.together.steps],
    }


def taught(context: Context) -> Any:
    """The reader of the same seed."""
    model = reader.new(context.seed)
    reader.load(model, context.load(READER))
    return model.to(context.device)


def ablate(context: Context, kind: str) -> dict[str, Any]:
    """The modality ablation on pages of a kind: the four settings of table 5, by the names of `ablation.VARIANTS`."""
    model, (count, steps) = taught(context), _sizes(context, PAGES[kind])
    samples = pages.pages(kind, count, context.seed)
    return {name: probing.probe(model, samples, steps, context.seed, **settings) for name, settings in VARIANTS.items()}


def damage(context: Context) -> dict[str, Any]:
    """Features that are damaged on their way to the projector: blurred, or a share of the tokens set to 0."""
    seed = context.seed
    ways: dict[str, Callable[[Tensor], Tensor] | None] = {
        "intact": None,
        "blurred": probing.averaged,
        "dropped_0.25": probing.dropped(0.25, seed),
        "dropped_0.5": probing.dropped(0.5, seed),
    }
    return {name: _on_small_ink(context, taught(context), way) for name, way in ways.items()}


def add_taps(context: Context, arm: str) -> dict[str, Any]:
    """A fresh projector on the frozen reader, trained a little: without taps, with them, or with another image's.

    Args:
        context: of the run.
        arm: "none", "taps" or "other_image".
    """
    model, seed = taught(context), context.seed
    if arm != "none":
        patch(model, fusion=SkipLinks(stride=STRIDE), zero_start=False)
    reader.fresh_projector(model, seed)
    with probing.damaged(model, probing.taps_of_another_image if arm == "other_image" else None):
        drawn = digits.draw(4000, seed, held_out=False)
        losses = stage_one(model, drawn, Recipe(_scaled(context, STAGE_ONE.steps), STAGE_ONE.rate), seed)
        found = _on_small_ink(context, model, None)
    return {**found, "stage_one_loss": sum(losses[-10:]) / len(losses[-10:])}


def stage_one(model: nn.Module, drawn: digits.Drawn, recipe: Recipe, seed: int) -> list[float]:
    """Train the projector alone on answers, as LLaVA's first stage does; the loss of each step."""
    index, projector = reader.draws(len(drawn), seed), list(anatomy.find(model).projector.parameters())
    device = projector[0].device
    model.requires_grad_(False)
    for parameter in projector:
        parameter.requires_grad_(True)

    def answers(_: int) -> Tensor:
        loss: Tensor = model(**drawn.batch(index(), device=device)).loss
        return loss

    return fit(answers, projector, recipe)


def _on_small_ink(context: Context, model: nn.Module, way: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
    # Without text, which would tell what the damage took away.
    count, steps = _sizes(context, DAMAGE)
    samples = pages.pages("small_ink", count, context.seed)
    with probing.damaged(model, way):
        return probing.probe(model, samples, steps, context.seed, text=False)


def _scaled(context: Context, number: int) -> int:
    return max(10, round(context.size.scale * number))


def _sizes(context: Context, sizes: tuple[int, int]) -> tuple[int, int]:
    return _scaled(context, sizes[0]), _scaled(context, sizes[1])


_NEEDS = (READER,)
RUNS = (
    Run("reader", teach, quick=True, seconds=130),
    Run("ablation/small_ink", partial(ablate, kind="small_ink"), _NEEDS, quick=True, seconds=35),
    Run("ablation/fixed", partial(ablate, kind="fixed"), _NEEDS, seconds=75),
    Run("damage", damage, _NEEDS, seconds=35),
    *(Run(f"taps/{arm}", partial(add_taps, arm=arm), _NEEDS, seconds=18) for arm in ("none", "taps", "other_image")),
)
