"""Train a probe on frozen tokens and measure it on held-out documents.

Source: "Detached Skip-Links and R-Probe", section 5; ablations in appendix D.2, convergence in D.3.
"""

import dataclasses
import itertools
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_patch.core import parallel
from llava_patch.core.errors import InputError, LlavaPatchError
from llava_patch.core.locks import folder_lock
from llava_patch.core.memory import float32_default
from llava_patch.core.terminal import counted, say_cost
from llava_patch.data.pages import Pages
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.bootstrap import FEW
from llava_patch.measurements.rprobe.error_map import error_maps
from llava_patch.measurements.rprobe.evaluate import check_shown, evaluate
from llava_patch.measurements.rprobe.keys import difference, make_key, trained_on
from llava_patch.measurements.rprobe.output import written
from llava_patch.measurements.rprobe.result import RProbeResult
from llava_patch.measurements.rprobe.resume import TrainingFolder
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.freeze import Encoder, FrozenData, freeze_samples
from llava_patch.measurements.rprobe.train import check_memory, choose_trained, train_probe
from llava_patch.probe.decoder import ProbeDecoder, quarter, trained_parameters
from llava_patch.probe.sample import Sample, split_samples
from llava_patch.probe.view import make_transform

RUNNING = 0.95  # decay of the running MSE
LEARNED = 0.9  # training FVU under which a probe has learned something
FEW_DOCUMENTS = 10  # under which percentile intervals are clearly too narrow
OVERFIT = 0.2  # how much higher the held-out FVU may be than the training FVU before we warn


def run_rprobe(
    model: nn.Module,
    image_processor: Any,
    tokenizer: Any,
    settings: RProbe | None = None,
    samples: Sequence[Sample] | None = None,
    heldout: Sequence[Sample] | None = None,
    progress: bool = True,
    work: str | Path | None = None,
    show: Sequence[str] = (),
    again: bool = False,
) -> RProbeResult:
    """Measure how well pixels can be rebuilt from a model's projected visual tokens.

    Works from within `torch.inference_mode()` and `torch.no_grad()`. The model's weights, gradient flags, training
    mode and the caller's random state are left as they were; the same seed gives the same numbers.

    Under `torch.distributed` every process calls it with its own copy of the model; they share the work, and each gets
    the one result. It agrees with that of one process but for the order of float32 sums.

    Args:
        model: `LlavaLlamaForCausalLM` or `LlavaForConditionalGeneration`, patched or not.
        image_processor: the model's image processor.
        tokenizer: the model's tokenizer.
        settings: None: the defaults.
        samples: one's own data; None: rendered pages.
        heldout: one's own held-out data; None: a share of the documents of `samples`.
        progress: show progress bars on standard error.
        work: folder for the state of training every `settings.save_every` steps. Called again after an interruption,
            the run goes on from there and ends with the same numbers; when training has ended, the state gives way to
            `decoder.safetensors`, with which the same run is evaluated again without training, until `write_run` takes
            it away (not with `settings.keep_decoder`). Then the same run gives what `write_run` wrote. None: nothing is
            kept.
        show: ids of held-out samples that become examples for figures; empty: `settings.examples` of them.
        again: train although `work` holds the same run's result.

    Raises:
        HostError: a model that is not known, or whose LLM has fewer than 4 layers.
        InputError: a sample that cannot be used (named in the message), or all held-out documents are trained on.
        SettingError: the decoder does not fit into the device's memory, or `trained = "lora"` without peft.
        CheckpointError: `work` holds an unfinished training of another model, data set or settings, another run works
            in it, or it holds the same run's result and what is asked for needs the decoder, which was not kept.
        LlavaPatchError: the training loss is not finite.
        PeerError: another process of the run failed.
    """
    settings, folder = settings or RProbe(), None if work is None else Path(work)
    with parallel.guard(), folder_lock(folder), float32_default(), torch.inference_mode(False):
        began = time.perf_counter()
        progress = progress and parallel.rank() == 0
        anatomy = find(model)
        quarter(len(anatomy.layers))  # refuse before the long part
        check_memory(anatomy, settings)
        transform = make_transform(anatomy, image_processor, settings.image_mode, settings.text_height)
        encoder = Encoder(anatomy, transform, tokenizer)
        chosen = _data(settings, samples, heldout, transform.height)
        given = samples, heldout
        skipped = [message for data in given for message in getattr(data, "skipped", ())]
        early = []  # notes that are said before the long part
        shared: list[str] = []  # held-out documents that are trained on
        if skipped:
            early.append(
                f"reading the data, {len(skipped)} things could not be used and were skipped; the first: {skipped[0]}"
            )
        if samples is not None:
            shared, n_documents = trained_on(*chosen)
            if shared:
                early.append(f"{len(shared)} of {n_documents} held-out documents are trained on, such as {shared[0]}")
        _warn(early)
        count, steps = sum(len(part) for part in chosen), counted(settings.steps, "step")
        say_cost(
            "R-Probe", f"{counted(count, 'sample')}, whose images pass the vision tower once unless they are kept",
            f"then {steps} of {settings.batch_size} on a decoder of {quarter(len(anatomy.layers))} layers",
            shown=progress,
        )  # fmt: skip
        train, held = (
            freeze_samples(encoder, part, settings, progress, label)
            for part, label in zip(chosen, ("training samples", "held-out samples"), strict=True)
        )
        check_shown(held, show)  # before training
        _check_targets(train, "training", "train on more")
        _check_targets(held, "held-out", "hold out more")
        encoded = time.perf_counter()
        decoder = ProbeDecoder(anatomy, train.grid, settings.rope, settings.seed)
        choose_trained(decoder, settings)
        lr = settings.learning_rate(int(anatomy.text_config.hidden_size))
        key = make_key(decoder, train.key, train.text.table, settings, lr)
        first, *others = parallel.exchange(key)
        for number, other in enumerate(others, 1):
            if found := difference(other, first):
                raise LlavaPatchError(f"R-Probe: process {number} and process 0 do not run the same: {found}")
        decoder.start_at(train.target_mean)
        state = None if folder is None else TrainingFolder(folder, key)
        before = None
        if folder is not None and not again and parallel.rank() == 0:
            before = written(folder, key, held.key, settings, show)
        if (before := parallel.exchange(before)[0]) is not None:
            return before
        losses = _trained(decoder, train, settings, lr, progress, state)
        trained = time.perf_counter()
        figures = evaluate(decoder, held, train.target_mean, transform, settings, show)
        maps, without = error_maps(decoder, encoder, held, figures["documents"], settings)
        train_variance = train.target_variance
        running = running_mean(losses, start=train_variance)
        result = RProbeResult(
            **figures,
            steps_to_threshold=first_under(running, settings.threshold),
            threshold=settings.threshold,
            # The steps to it are counted on a training curve that starts at the training targets' variance.
            threshold_is_vacuous=settings.threshold >= min(figures["constant_mse"], train_variance),
            steps_to_half_fvu=first_under(running, 0.5 * train_variance),
            losses=losses,
            running=running,
            settings=dataclasses.asdict(settings),
            facts={
                "host": anatomy.host,
                "decoder_layers": len(decoder.layers),
                "learning_rate": lr,
                "probe_parameters": sum(p.numel() for p in decoder.parameters()),
                "trained_parameters": sum(p.numel() for p in trained_parameters(decoder).values()),
                "comparable": settings.trained == "all",
                "steps_done": len(losses),
                "cut": len(losses) < settings.steps,
                "processes": parallel.world(),
                "key": key,
                "heldout_key": held.key,
                "image_tokens": train.grid.tokens,
                "pixels_per_token": train.grid.pixels,
                "train_samples": len(train),
                "heldout_samples": len(held),
                "heldout_documents_trained_on": len(shared),
                "skipped_by_reader": len(skipped),
                "unread": sum(getattr(data, "unread", 0) for data in given),
                "skipped_train": len(train.skipped),
                "skipped_heldout": len(held.skipped),
                "texts_cut": train.texts_cut + held.texts_cut,
                "regions_cut": train.regions_cut + held.regions_cut,
                "train_fvu": running[-1] / train_variance,
                "heldout_target_tokens": int(held.counts.sum()),
                "data": "pages" if samples is None else "own",
                "encode_seconds": encoded - began,
                "train_seconds": trained - encoded,
            },
            warnings=[*early, *train.notes, *held.notes],
            maps=maps,
        )
        notes = [*parallel.exchange(without)[0], *_notes(result, train, settings)]
        _warn(notes)
        result.warnings.extend(notes)
        return result


def _data(
    settings: RProbe, samples: Sequence[Sample] | None, heldout: Sequence[Sample] | None, side: int
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    seed = settings.seed
    if samples is not None:
        return split_samples(samples, settings.heldout_share, seed) if heldout is None else (samples, heldout)
    if heldout is not None:
        raise LlavaPatchError("run_rprobe: heldout was given without samples to train on")
    return Pages(settings.train_pages, side, seed, "train"), Pages(settings.heldout_pages, side, seed, "heldout")


def _check_targets(data: FrozenData, what: str, more: str) -> None:
    if int(data.counts.sum()) == 1:
        raise InputError(f"R-Probe's {what} samples: there is one target token: {more}")
    if not data.target_variance:
        raise InputError(
            f"R-Probe's {what} samples all show the same patch of one colour each: there is nothing to rebuild"
        )


def _trained(
    decoder: ProbeDecoder, data: FrozenData, settings: RProbe, lr: float, progress: bool, work: TrainingFolder | None
) -> list[float]:
    """Train the decoder, or fill it with the weights that the same run left behind; the losses."""
    found = work.load_finished(decoder) if work is not None and parallel.rank() == 0 else None
    found = parallel.exchange(found)[0]
    if found is None:
        return train_probe(decoder, data, settings, lr, progress, work)
    with torch.no_grad():
        parallel.from_rank_0(trained_parameters(decoder).values())
    if progress and work is not None:
        print(f"R-Probe: training is finished, its decoder is {work.decoder}", file=sys.stderr)
    return found.losses


def _notes(result: RProbeResult, train: FrozenData, settings: RProbe) -> list[str]:
    """What a reader of the figures must know, a sentence each."""
    documents = len({sample["document"] for sample in result.documents})
    train_fvu = result.facts["train_fvu"]
    reasons = [
        (result.mse_interval is None, FEW),
        (
            result.facts["cut"],
            f"RProbe.minutes = {settings.minutes or 0:g} ended training after step {len(result.losses)} of "
            f"{settings.steps}, before the learning rate had fallen: its figures do not compare with those of finished "
            "runs",
        ),
        (
            result.threshold_is_vacuous,
            f"RProbe.threshold = {settings.threshold:g} is not under the MSE of a constant patch "
            f"({result.constant_mse:.4f} on held-out, {train.target_variance:.4f} on training samples): steps to the "
            "threshold say nothing; read FVU instead",
        ),
        (
            result.mse >= result.constant_mse,
            f"R-Probe learned nothing: its held-out MSE {result.mse:.4f} is not under that of a constant patch "
            f"({result.constant_mse:.4f}): train longer or on more samples, or see with `llava-patch rprobe preview "
            '--model` whether text is large enough for this tower (RProbe.image_mode = "window" enlarges it)',
        ),
        (
            2 <= documents < FEW_DOCUMENTS,
            f"R-Probe's 95 % intervals are drawn over {documents} held-out documents only: with so few they are too "
            "narrow",
        ),
        (
            # A run too short to learn anything is above that too, but for another reason.
            train_fvu < LEARNED and result.fvu > train_fvu + OVERFIT,
            f"R-Probe fits its training samples (FVU {train_fvu:.2f}) much better than the held-out ones "
            f"({result.fvu:.2f}): {len(train)} samples are few for {settings.steps} steps, and the steps to a "
            "threshold, which are counted on training samples, say little",
        ),
    ]
    return [note for holds, note in reasons if holds]


def _warn(notes: Sequence[str]) -> None:
    """Warn the user on the first process."""
    for note in notes if parallel.rank() == 0 else ():
        warnings.warn(note, stacklevel=3)


def running_mean(losses: Sequence[float], start: float) -> list[float]:
    """Exponential running mean of the losses; starts at the constant patch's MSE: one lucky batch counts for little."""
    means = itertools.accumulate(losses, lambda mean, loss: RUNNING * mean + (1 - RUNNING) * loss, initial=start)
    return list(means)[1:]


def first_under(values: Sequence[float], limit: float) -> int | None:
    """First step (from 1) whose value is under the limit; None when there is none."""
    return next((step for step, value in enumerate(values, start=1) if value < limit), None)
