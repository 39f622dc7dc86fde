"""Where a joint training may begin: which tower, which projector, how loud its taps are, which batches."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import llava_patch
from llava_patch import Handle, SkipLinks
from llava_patch.tools.evidence.small import digits, reader
from llava_patch.tools.evidence.small.training import Recipe, fit
from llava_patch.tools.evidence.statistics import short
from llava_patch.tools.evidence.study import Context

READER = "rprobe/reader"
"""The run that keeps a small model that reads, and as "dense.…" its tower before it was tuned with the decoder."""
TAPS = (2, 4, 6)
STAGE_ONE = 100  # steps of the projector alone, of 32 images
IMAGES = 2000


@dataclass(frozen=True)
class Start:
    """A joint training's beginning.

    Attributes:
        name: of the run.
        tower: "dense" (which digit each patch shows), "tuned" (with the decoder, afterwards) or "random".
        projector: "fresh" (random, with its taps), "trained" (alone, with its taps, as LLaVA's stage 1) or "held" (the
            same, but the columns of the taps stayed as random as they were).
        loud: the columns of the taps are multiplied by this.
        batch: images of a step.
        wrong: share of the answers that are random.
    """

    name: str
    tower: str
    projector: str
    loud: float
    batch: int
    wrong: float

    @property
    def stage(self) -> str:
        """The run that trains this projector, if any."""
        return f"stage-{self.tower}-{self.projector}"


STARTS = (
    Start("fresh", "dense", "fresh", 1.0, 16, 0.0),
    Start("fresh-small-batch", "dense", "fresh", 1.0, 4, 0.0),
    Start("fresh-noise", "dense", "fresh", 1.0, 4, 0.3),
    Start("fresh-loud", "dense", "fresh", 4.0, 16, 0.0),
    Start("fresh-loud-noise", "dense", "fresh", 4.0, 4, 0.3),
    Start("fresh-random-tower-loud", "random", "fresh", 4.0, 4, 0.3),
    Start("fresh-tuned-tower", "tuned", "fresh", 1.0, 8, 0.0),
    Start("trained", "dense", "trained", 1.0, 16, 0.0),
    Start("trained-noise", "dense", "trained", 1.0, 4, 0.3),
    Start("trained-loud", "dense", "trained", 2.0, 8, 0.15),
    Start("trained-soft", "dense", "trained", 0.5, 4, 0.0),
    Start("held-noise", "dense", "held", 2.0, 4, 0.3),
)


def begin(context: Context, start: Start, fusion: SkipLinks) -> tuple[Any, Handle]:
    """The model at its start, patched; the same weights for fusions with the same taps.

    The decoder is that of the reader, which has learnt to read through a projector of its own.
    """
    kept = context.load(READER)
    model = reader.new(context.seed).to(context.device)
    reader.load(model, kept, ("language", "head"))
    if start.tower != "random":
        prefix = {"dense": "dense.", "tuned": "tower."}[start.tower]
        own = {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
        reader.parts(model)["tower"].load_state_dict(own)
    handle = llava_patch.patch(model, fusion=fusion, zero_start=False)
    projector = reader.parts(model)["projector"]
    _renew(projector, 300 + context.seed)
    if start.projector != "fresh" and fusion.layers:
        projector.load_state_dict(context.load(f"detach/{start.stage}"))
    elif start.projector != "fresh":
        projector.load_state_dict(context.load(f"detach/{start.stage}-none"))
    first = handle.anatomy.first_linear()[2]
    with torch.no_grad():
        first.weight[:, reader.VISION.width :] *= start.loud
    return model.eval(), handle


def stage_one(context: Context, start: Start, taps: bool = True) -> dict[str, Any]:
    """Train the projector alone; it is kept. Without `taps` for the arm that has none."""
    layers = TAPS if taps else ()
    fresh = Start(start.name, start.tower, "fresh", 1.0, 32, 0.0)  # `begin` makes the taps as loud as they are to be
    model, handle = begin(context, fresh, SkipLinks(layers=layers, detach=0, train_tower="all"))
    drawn = digits.draw(IMAGES, 40 + context.seed, held_out=False)
    index = reader.draws(len(drawn), 500 + context.seed, fresh.batch)
    model.requires_grad_(False)
    projector = reader.parts(model)["projector"].requires_grad_(True)
    weight = handle.anatomy.first_linear()[2].weight

    def hold(_: int) -> None:
        if start.projector == "held":
            weight.grad[:, reader.VISION.width :] = 0

    def loss(_: int) -> Tensor:
        value: Tensor = model(**drawn.batch(index(), device=context.device)).loss
        return value

    recipe = Recipe(max(2, round(STAGE_ONE * context.size.scale)), 2e-3, warmup=10, decay=0.0)
    losses = fit(loss, projector.parameters(), recipe, hold)
    context.keep(projector.state_dict())
    handle.remove()
    return {"seed": context.seed, "first": short(losses[0]), "last": short(sum(losses[-10:]) / len(losses[-10:]))}


@torch.no_grad()
def _renew(projector: nn.Module, seed: int) -> None:
    """Random weights with std 1/√fan-in, whatever the width, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    for linear in (module for module in projector.modules() if isinstance(module, nn.Linear)):
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / math.sqrt(linear.in_features))
        linear.bias.zero_()


def tower_of(model: nn.Module) -> list[nn.Parameter]:
    """What a step moves in the tower."""
    return [p for p in reader.parts(model)["tower"].parameters() if p.is_floating_point()]
