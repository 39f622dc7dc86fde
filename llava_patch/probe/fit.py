"""Train a probe on frozen tokens and measure it on held-out documents.

Source: "Detached Skip-Links and R-Probe", section 5; ablations in appendix D.2, convergence in D.3.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.errors import LlavaPatchError
from llava_patch.hosts.anatomy import find
from llava_patch.probe.decoder import ProbeDecoder, quarter
from llava_patch.probe.evaluate import evaluate
from llava_patch.probe.pages import Pages
from llava_patch.probe.progress import progress_bar
from llava_patch.probe.result import RProbeResult
from llava_patch.probe.sample import Sample, split_samples
from llava_patch.probe.settings import RProbe
from llava_patch.probe.store import FrozenData, freeze_samples, make_transform

RUNNING = 0.95  # decay of the running MSE
LEARNED = 0.9  # training FVU under which a probe has learned something
OVERFIT = 0.2  # how much higher the held-out FVU may be than the training FVU before we warn


def run_rprobe(
    model: nn.Module,
    image_processor: Any,
    tokenizer: Any,
    settings: RProbe | None = None,
    samples: Sequence[Sample] | None = None,
    heldout: Sequence[Sample] | None = None,
    progress: bool = True,
) -> RProbeResult:
    """Measure how well pixels can be rebuilt from a model's projected visual tokens.

    Works from within `torch.inference_mode()` and `torch.no_grad()`. The model's weights, gradient flags, training
    mode and the caller's random state are left as they were; the same seed gives the same numbers.

    Args:
        model: `LlavaLlamaForCausalLM` or `LlavaForConditionalGeneration`, patched or not.
        image_processor: the model's image processor.
        tokenizer: the model's tokenizer.
        settings: None: the defaults.
        samples: one's own data; None: rendered pages.
        heldout: one's own held-out data; None: a share of the documents of `samples`.
        progress: show progress bars on standard error.

    Raises:
        HostError: a model that is not known, or whose LLM has fewer than 4 layers.
        InputError: a sample that cannot be used; named in the message.
        LlavaPatchError: the training loss is not finite.
    """
    settings = RProbe() if settings is None else settings
    began = time.perf_counter()
    anatomy = find(model)
    quarter(len(anatomy.layers))  # refuse before the long part
    transform = make_transform(anatomy, image_processor, settings.image_mode)
    train_samples, heldout_samples = _data(settings, samples, heldout, transform.height)
    with torch.inference_mode(False):
        train = freeze_samples(anatomy, transform, tokenizer, train_samples, settings, progress, "training samples")
        held = freeze_samples(anatomy, transform, tokenizer, heldout_samples, settings, progress, "held-out samples")
        encoded = time.perf_counter()
        constant = train.pixels.mean(0)
        decoder = ProbeDecoder(anatomy, train.grid, settings.rope, settings.seed)
        decoder.start_at(constant)
        lr = settings.learning_rate(int(anatomy.text_config.hidden_size))
        losses = train_probe(decoder, train, settings, lr, progress)
        trained = time.perf_counter()
        found = evaluate(decoder, held, constant, transform, settings)
    train_variance = float(train.pixels.var(0, correction=0).mean(dtype=torch.float64))
    running = running_mean(losses, start=train_variance)
    vacuous = settings.threshold >= found.constant_mse
    notes = []
    if vacuous:
        notes.append(
            f"RProbe.threshold = {settings.threshold:g} is not under the MSE of a constant patch "
            f"({found.constant_mse:.4f}) on these documents: steps to the threshold say nothing; read FVU instead"
        )
    train_fvu = running[-1] / train_variance
    # A run too short to learn anything is above that too, but for another reason.
    if train_fvu < LEARNED and found.mse / found.variance > train_fvu + OVERFIT:
        notes.append(
            f"R-Probe fits its training samples (FVU {train_fvu:.2f}) much better than the held-out ones "
            f"({found.mse / found.variance:.2f}): {len(train)} samples are few for {settings.steps} steps, and the "
            "steps to a threshold, which are counted on training samples, say little"
        )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return RProbeResult(
        mse=found.mse,
        fvu=found.mse / found.variance,
        psnr=found.psnr,
        constant_mse=found.constant_mse,
        constant_fvu=found.constant_mse / found.variance,
        target_variance=found.variance,
        steps_to_threshold=first_under(running, settings.threshold),
        threshold=settings.threshold,
        threshold_is_vacuous=vacuous,
        steps_to_half_fvu=first_under(running, 0.5 * train_variance),
        documents=found.documents,
        losses=losses,
        running=running,
        settings=dataclasses.asdict(settings),
        facts={
            "host": anatomy.host,
            "decoder_layers": len(decoder.layers),
            "learning_rate": lr,
            "probe_parameters": sum(p.numel() for p in decoder.parameters()),
            "image_tokens": train.grid.tokens,
            "pixels_per_token": train.grid.pixels,
            "train_samples": len(train),
            "heldout_samples": len(held),
            "train_fvu": train_fvu,
            "heldout_target_tokens": int(held.target.sum()),
            "data": "pages" if samples is None else "own",
            "encode_seconds": encoded - began,
            "train_seconds": trained - encoded,
        },
        warnings=notes,
        examples=found.examples,
    )


def _data(
    settings: RProbe, samples: Sequence[Sample] | None, heldout: Sequence[Sample] | None, side: int
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    if samples is None:
        if heldout is not None:
            raise LlavaPatchError("run_rprobe: heldout was given without samples to train on")
        return (
            Pages(settings.train_pages, side, settings.seed, "train"),
            Pages(settings.heldout_pages, side, settings.seed, "heldout"),
        )
    if heldout is not None:
        return samples, heldout
    return split_samples(samples, settings.heldout_share, settings.seed)


def train_probe(
    decoder: ProbeDecoder, data: FrozenData, settings: RProbe, lr: float, progress: bool = False
) -> list[float]:
    """Fit a decoder with AdamW, warm-up, cosine fall and clipped gradients.

    Args:
        decoder: changed in place.
        data: frozen training samples.
        settings: of the run.
        lr: peak learning rate.
        progress: show a bar.

    Returns:
        The training MSE of each step.

    Raises:
        LlavaPatchError: the loss is not finite.
    """
    device = next(decoder.parameters()).device
    parameters = list(decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps, settings.warmup))
    order = batches(len(data), settings.batch_size, settings.seed)
    losses: list[float] = []
    bar = progress_bar(settings.steps, "train", progress)
    with bar, torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for step in range(settings.steps):
            batch = data.batch(next(order), device)
            rebuilt = decoder(batch.image_tokens, batch.text_tokens, batch.sequence, batch.injections)
            loss = token_errors(rebuilt, batch.pixels).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise LlavaPatchError(f"R-Probe's loss is {value} at step {step + 1}: lower RProbe.lr (now {lr:g})")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            schedule.step()
            losses.append(value)
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(mse=f"{value:.4f}", refresh=False)
    return losses


def token_errors(rebuilt: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error inside each token, [targets]; both arguments are [targets, pixels]."""
    return (rebuilt - pixels).square().mean(-1)


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of sample numbers, int64 [size]: every sample once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.randperm(count, generator=generator)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


def running_mean(losses: Sequence[float], start: float) -> list[float]:
    """Exponential running mean of the losses.

    Args:
        losses: of each step.
        start: where it starts: the MSE of the constant patch, so that one lucky first batch counts for little.
    """
    running, mean = [], start
    for loss in losses:
        mean = RUNNING * mean + (1 - RUNNING) * loss
        running.append(mean)
    return running


def first_under(values: Sequence[float], limit: float) -> int | None:
    """First step (from 1) whose value is under the limit; None when there is none."""
    return next((step for step, value in enumerate(values, start=1) if value < limit), None)
