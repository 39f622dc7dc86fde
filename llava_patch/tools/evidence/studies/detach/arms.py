"""Runs of joint training that differ in what the shallow taps pass back, and in how long their steps are."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch import AttentionMaps, Drift, SkipLinks, measure_attention_maps, measure_drift
from llava_patch.measurements.gradients.decompose import block_parameters, decompose
from llava_patch.tools.evidence.small import digits, pages, probing, reader
from llava_patch.tools.evidence.statistics import pack_bits, short
from llava_patch.tools.evidence.studies.detach.starts import IMAGES, TAPS, Start, begin
from llava_patch.tools.evidence.study import Context

ARMS = ("none", "fused", "detached", "short")
"""No taps; all attached; all detached; attached, each step of the tower as long as the detached one would be."""
STEPS, EARLY = 120, 40
HELD = 160  # images, none of them trained on: of trained strings, and as many of strings that never are
SEEN = (0, 5, 10, 20, 40, 60, 90, 120)  # steps after which the loss of the former is taken
RATE = 1e-3
TOWER_RATES = {"sgd": 0.05, "adamw": 1e-3}
PROBE = 600, 300  # images and steps of the R-Probe on what an arm has trained
LOOKED_AT = 32  # images whose attention maps are compared


@dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        start: where it begins; its batch and noise.
        arm: one of `ARMS`.
        optimizer: of the tower, "sgd" or "adamw"; projector and decoder always have AdamW.
        layers: the taps; for the bubbles also their number that is detached.
        detach: how many of them are detached; None: as the arm says.
    """

    start: Start
    arm: str
    optimizer: str
    layers: tuple[int, ...] = TAPS
    detach: int | None = None

    @property
    def fusion(self) -> SkipLinks:
        """What the model is patched with."""
        layers = () if self.arm == "none" else self.layers
        detach = self.detach if self.detach is not None else len(layers) if self.arm == "detached" else 0
        return SkipLinks(layers=layers, detach=detach, train_tower="all")


def train(context: Context, training: Training, drift: bool = True) -> dict[str, Any]:
    """Train an arm; its loss on images that it is not trained on, on the way and at the end."""
    start, steps = training.start, max(2, round(STEPS * context.size.scale))
    model, handle = begin(context, start, training.fusion)
    before = copy.deepcopy(reader.parts(model)["tower"].state_dict())
    held, other = (digits.draw(HELD, 90 + context.seed, held_out=held_out) for held_out in (False, True))
    drawn = digits.draw(IMAGES, 60 + context.seed, held_out=False)
    generator = torch.Generator().manual_seed(1000 + context.seed)
    model.requires_grad_(True)
    tower = list(block_parameters(model, 0).values())
    inside = {id(p) for p in tower}
    rest = [p for p in model.parameters() if id(p) not in inside]
    kind: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[training.optimizer]
    optimizers = [
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
        kind(tower, lr=TOWER_RATES[training.optimizer], weight_decay=0.0),
    ]
    seen = {round(step * context.size.scale) for step in SEEN}
    curve, losses, early = [], [], []
    for step in range(steps + 1):
        if step in seen:
            found = _losses(model, held)
            curve.append([step, short(float(found.mean()))])
            early += [found] if 0 < step <= EARLY * context.size.scale else []
        if step == steps:
            break
        index = torch.randint(len(drawn), (start.batch,), generator=generator)
        batch = drawn.batch(index, wrong=start.wrong, generator=generator, device=context.device)
        shorter = _shorter(model, batch) if training.arm == "short" else 1.0
        share = min(1.0, (step + 1) / 10) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer, rate in zip(optimizers, (RATE, TOWER_RATES[training.optimizer] * shorter), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    model.eval()
    score, strings = digits.evaluate(model, held), digits.evaluate(model, other)
    result = {
        "seed": context.seed, "training": {**vars(training), "start": vars(start)}, "steps": steps, "curve": curve,
        "rows": pack_bits(score.right), "held_rows": pack_bits(strings.right), "held_loss": short(strings.loss),
        "end": _packed(found), "early": _packed(torch.stack(early or [found]).mean(0)),
        "trained_first": short(sum(losses[:EARLY]) / len(losses[:EARLY])),
        "moved": short(_distance(reader.parts(model)["tower"], before)),
    }  # fmt: skip
    if drift:
        result["drift"] = _drift(context, training, model, held)
        result["probe"] = _probe(context, model)
    handle.remove()
    return result


def _shorter(model: Any, batch: dict[str, Any]) -> float:
    """How much shorter the tower's step is when every tap is detached."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)  # the tower's stand-ins alone take a gradient
    main, full = decompose(model, lambda: model(**batch).loss, 0)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return float(main.norm() / full.norm())


@torch.no_grad()
def _losses(model: Any, held: digits.Drawn) -> Tensor:
    """The mean loss over each image's answer, float32 [images] on the CPU."""
    batch = held.batch(torch.arange(len(held)), device=next(model.parameters()).device)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    asked = labels != digits.IGNORED
    return ((losses * asked).sum(1) / asked.sum(1)).cpu()


def _packed(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def _distance(tower: nn.Module, before: dict[str, Tensor]) -> float:
    squares = [(value.double() - before[name].double()).square().sum() for name, value in tower.state_dict().items()]
    return float(torch.stack(squares).sum().sqrt())


def _drift(context: Context, training: Training, model: Any, held: digits.Drawn) -> dict[str, Any]:
    """How far the model has gone from its start.

    Returns:
        Median cosine of hidden states with those at the start, before the decoder ("input") and behind its second layer
        ("image", "text"); of the first tapped block's attention maps, the total variation distance of each image's map
        from the one at the start, 0..1 ("attention").
    """
    base, handle = begin(context, training.start, training.fusion)
    samples = [held.batch(torch.tensor([i]), device=context.device) for i in range(LOOKED_AT)]
    for sample in samples:
        sample.pop("labels")
    found = measure_drift(model, base, samples[:8], Drift(split=2, together=True), progress=False)
    maps = (measure_attention_maps(one, samples, AttentionMaps(TAPS[0]), progress=False) for one in (base, model))
    there, now = (torch.tensor(found.checkpoints[0].maps) for found in maps)
    handle.remove()
    return {
        "input": short(found.image.input),
        "image": short(found.image.median[-1]),
        "text": short(found.text.median[-1]),
        "attention": _packed((now - there).abs().sum((1, 2)) / 2),
    }


def _probe(context: Context, model: Any) -> dict[str, Any]:
    """R-Probe on the tower and projector as they are; without text, which would tell what the features lost."""
    count, steps = (max(10, round(context.size.scale * number)) for number in PROBE)
    samples = pages.strings(digits.draw(count, context.seed + 700, held_out=False))
    return probing.probe(model, samples, steps, context.seed, text=False)
