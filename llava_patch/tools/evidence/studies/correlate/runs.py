"""One training, its checkpoints, the same with the auxiliary loss, and damage that is kept in the weights."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.hosts import anatomy
from llava_patch.patching.patch import patch
from llava_patch.probe.auxiliary.regions import KEY
from llava_patch.probe.decoder import quarter
from llava_patch.settings.auxiliary import AuxiliaryProbe
from llava_patch.tools.evidence.small import digits, pages, probing, reader
from llava_patch.tools.evidence.small.training import Recipe, fit
from llava_patch.tools.evidence.statistics import pack_bits
from llava_patch.tools.evidence.study import Context, Run

START, READER = "correlate/start", "rprobe/reader"
# Half taught, so that features and reading both have a way to go.
HALF = reader.Lessons(6000, replace(reader.DENSE, steps=400), replace(reader.ANSWERS, steps=120), Recipe(1, 1e-3))
TRAINING = Recipe(360, 1e-3)
OTHER_EVERY = 4  # steps: of these one asks for the largest digit
SNAPSHOTS = 9
PROBE = 600, 200  # images and steps
LAMBDAS = (0.1, 1.0)
REPEATS = 9  # of a timed pair of steps
DAMAGE: dict[str, tuple[float, ...]] = {
    "rank": (64, 32, 16, 12, 8, 6, 4, 3, 2),
    "tower": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    "decoder": (0.0, 1.0, 1.5, 2.0),
}
"""Rank that is left of the projector's first matrix; noise, as a share of a weight matrix's own spread.

Less noise in the decoder's layers behind the first changes no answer."""


def start(context: Context) -> dict[str, Any]:
    """A model that is half taught; keeps its weights."""
    lessons = HALF.scaled(context.size.scale)
    model = reader.new(context.seed).to(context.device)
    named, _ = reader.teach(model, digits.draw(lessons.images, context.seed, held_out=False), lessons, context.seed)
    context.keep(reader.weights(model))
    return {"patches_named": named, **scores(context, model)}


def scores(context: Context, model: Any) -> dict[str, Any]:
    """What a model gets right of held-out strings, and its loss, for both questions that it is taught."""
    held = digits.draw(reader.HELD, context.seed, held_out=True)
    found: dict[str, Any] = {}
    for question in ("read", "largest"):
        score = digits.evaluate(model, held, question)
        found |= {question: pack_bits(score.right), f"{question}_loss": score.loss}
    return found


def probe(context: Context, model: Any) -> dict[str, Any]:
    """R-Probe's figures on the images that the model reads; without text, which would tell what the features lost."""
    count, steps = (max(10, round(context.size.scale * number)) for number in PROBE)
    samples = pages.strings(digits.draw(count, context.seed + 500, held_out=False))
    found = probing.probe(model, samples, steps, context.seed, text=False)
    return {name: found[name] for name in ("mse", "fvu")}


def train(context: Context, weight: float, snapshots: int) -> dict[str, Any]:
    """Train the whole model on both questions, equal batches whatever `weight`, R-Probe's share in the loss.

    Args:
        context: of the run.
        weight: lambda of the auxiliary loss; 0: without.
        snapshots: checkpoints on the way that are scored and probed, the first and the last step among them.
    """
    model, seed = _loaded(context, START), context.seed
    recipe = replace(TRAINING, steps=max(snapshots, round(context.size.scale * TRAINING.steps)))
    drawn, index = digits.draw(HALF.images, seed, held_out=False), reader.draws(HALF.images, seed + 7)
    handle = patch(model, probe=AuxiliaryProbe(weight=weight, seed=seed)) if weight else None
    collate = _collator(drawn, handle, context.device)
    at = {round(place * recipe.steps / max(1, snapshots - 1)) for place in range(snapshots)}
    found: list[dict[str, Any]] = []

    def look(step: int) -> None:
        if step in at:
            model.eval()
            found.append({"step": step, **scores(context, model), **probe(context, model)})
            model.train()

    def loss(step: int) -> Tensor:
        look(step)
        question = "largest" if step % OTHER_EVERY == OTHER_EVERY - 1 else "read"
        value: Tensor = model(**collate(index(), question)).loss
        return value

    model.train()
    model.requires_grad_(True)
    fit(loss, list(model.parameters()), recipe)
    slower = None if handle is None else step_ratio(model, collate, index, context.device)
    if handle is not None:
        handle.remove()
    model.eval()
    look(recipe.steps)
    end = found[-1] if found else {**scores(context, model), **probe(context, model)}
    return {"end": end, "snapshots": found, "steps": recipe.steps, "step_time_ratio": slower}


def step_ratio(
    model: Any, with_it: Callable[[Tensor, str], dict[str, Any]], index: Callable[[], Tensor], device: torch.device
) -> float:
    """How much longer forward and backward take with the auxiliary loss: median of pairs of equal batches, in turn."""
    ratios = []
    for _ in range(REPEATS):
        chosen, taken = index(), []
        for batch in (with_it(chosen, "read"), {**with_it(chosen, "read"), KEY: None}):
            began = time.perf_counter()
            model(**batch).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
        ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)


def _collator(drawn: digits.Drawn, handle: Any, device: torch.device) -> Callable[[Tensor, str], dict[str, Any]]:
    """Makes batches, with the strings' regions where the model has the auxiliary loss."""

    def plain(index: Tensor, question: str) -> dict[str, Any]:
        return drawn.batch(index, question, device=device)

    if handle is None:
        return plain
    from llava_patch.integrations.training.auxiliary import RegionCollator  # which brings transformers' Trainer

    samples = pages.strings(drawn)
    asked = "read"
    regions = RegionCollator(
        lambda records: plain(torch.tensor([record["index"] for record in records]), asked),
        handle, pages.image_processor(), pages.tokenizer(),
    )  # fmt: skip

    def with_regions(index: Tensor, question: str) -> dict[str, Any]:
        nonlocal asked
        asked = question
        chosen = [(number, samples[number]) for number in index.tolist()]
        return regions([
            {"image": one.image, "index": number, "rprobe": {"box": list(one.boxes[0]), "text": one.text}}
            for number, one in chosen
        ])  # fmt: skip

    return with_regions


def damage(context: Context, part: str) -> dict[str, Any]:
    """The reader with more and more damage in its weights.

    Args:
        context: of the run.
        part: "rank": the projector's first matrix keeps its largest singular values alone, which takes information
            away; "tower": noise in the tower, which makes its features others; "decoder": noise in its layers behind
            the first quarter, which R-Probe has no copy of.
    """
    found = []
    for amount in DAMAGE[part]:
        model = _loaded(context, READER)
        parts = anatomy.find(model)
        if part == "rank":
            _truncate(
                next(module for module in parts.projector.modules() if isinstance(module, nn.Linear)), int(amount)
            )
        else:
            behind = parts.layers[quarter(len(parts.layers)) :]
            _disturb([parts.tower] if part == "tower" else behind, amount, context.seed)
        found.append({"amount": amount, **scores(context, model), **probe(context, model)})
    return {"snapshots": found}


@torch.no_grad()
def _truncate(linear: nn.Linear, rank: int) -> None:
    left, values, right = torch.linalg.svd(linear.weight, full_matrices=False)
    linear.weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])


@torch.no_grad()
def _disturb(modules: Iterable[nn.Module], amount: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(amount * parameter.std() * noise)


def _loaded(context: Context, run: str) -> Any:
    model = reader.new(context.seed)
    reader.load(model, context.load(run))
    return model.to(context.device)


RUNS = (
    Run("start", start, seconds=30),
    Run("training", partial(train, weight=0.0, snapshots=SNAPSHOTS), (START,), seconds=90),
    *(
        Run(f"auxiliary/{weight:g}", partial(train, weight=weight, snapshots=0), (START,), seconds=70)
        for weight in LAMBDAS
    ),
    *(Run(f"damage/{part}", partial(damage, part=part), (READER,), seconds=5 * len(DAMAGE[part])) for part in DAMAGE),
)
