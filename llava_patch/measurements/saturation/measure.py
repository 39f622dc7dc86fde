"""Measures visual saturation: one forward pass a sample, means over samples."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from llava_patch.core import files
from llava_patch.core.errors import InputError
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements import trace
from llava_patch.measurements.passes import check_finite, evaluating, has_image
from llava_patch.measurements.saturation.result import DEFAULTS, Curves, PatchOn, Saturation, SaturationResult
from llava_patch.measurements.saturation.state import RunningMean, State
from llava_patch.patching.handle import get_handle

NO_IMAGE, NO_TEXT = "no image", "no text after the image"


def unusable(anatomy: Anatomy, sample: dict[str, Any]) -> str | None:
    """Why a sample cannot be measured; None when it can."""
    if not has_image(anatomy, sample):
        return NO_IMAGE
    return None if len(trace.text_after_image(sample["input_ids"][0] == anatomy.image_token_id)) else NO_TEXT


def patch_on(anatomy: Anatomy) -> PatchOn | None:
    """What a patch does to the image positions of a model; None: nothing."""
    handle = get_handle(anatomy.model)
    program = None if handle is None else handle.program()
    if handle is None or program is None or not program.leaves_out:
        return None
    words = []
    split = program.split if program.split < program.n_layers else None
    if split is not None and handle.routing is not None:
        words.append(f"routed ({handle.routing.variant}, split {split})")
    if (pruning := program.pruning) is not None:
        name = type(pruning).__name__
        words.append(f"pruned ({name}, {pruning.ratio:.0%} of the image tokens at layer {pruning.layer})")
    return PatchOn(split, program.prune_at, " and ".join(words))


def measure_sample(anatomy: Anatomy, sample: dict[str, Any], settings: Saturation = DEFAULTS) -> Curves:
    """Measure one usable sample, a batch of one without padding: one forward pass of the model.

    Raises:
        HostError: numbers that are not finite; names the first layer that has them.
    """
    layers = range(len(anatomy.layers))
    with evaluating(anatomy.model):
        with trace.traced(anatomy, settings.chunk) as seen:
            trace.run(anatomy, seen, sample)
        image_kl, text_kl = trace.lens_kl(anatomy, seen, settings.chunk)

    def together(values: dict[int, torch.Tensor]) -> list:
        """One transfer from the device."""
        return torch.stack([values[i].to(values[0].device) for i in layers]).tolist()

    curves = Curves(
        image_cosine=together(seen.image_cosine),
        text_cosine=together(seen.text_cosine),
        head_mass=together(seen.mass),
        image_kl=image_kl,
        text_kl=text_kl,
        image_states=[float(seen.image_states(i)) for i in layers],
        image_keys=[float(seen.image_keys(i)) for i in layers],
    )
    # NaN stands for absent positions in the curves: what overflowed must not be taken for that. All layers' states come
    # before the logit lens, which holds each layer against the last one.
    there = [bool(states) for states in curves.image_states]
    for layer in layers:
        own = [curves.image_cosine[layer]] * there[layer]
        check_finite([*curves.head_mass[layer], curves.text_cosine[layer], *own], layer, anatomy)
    for layer in layers:
        own = [curves.image_kl[layer]] * (there[layer] and there[-1])
        check_finite([curves.text_kl[layer], *own], layer, anatomy)
    return curves


def measure_saturation(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    settings: Saturation = DEFAULTS,
    progress: bool = True,
    state: State | None = None,
) -> SaturationResult:
    """Measure visual saturation of a stock or patched model.

    Args:
        model: a model of either host, possibly wrapped (DDP, peft).
        samples: keyword arguments of the model's forward, each a batch of one without padding, on the model's device.
            `llava`: input_ids with the placeholder of -200, images; HF: input_ids, pixel_values, attention_mask.
        settings: see `Saturation`.
        progress: show a progress bar on stderr.
        state: where an unfinished run is kept; the same samples again then go on behind those that it has, and the
            result is the same to the last bit. Call its `remove()` once the result is written.

    Returns:
        The mean over samples. In layers that a patched model runs without image positions, attention mass is 0 by
        definition and image values are NaN; in the KV variant's deep layers mass is that on the side branch's keys.
        Pruned image positions count up to the layer that they leave at, and not in the logit lens.

    Raises:
        InputError: no usable sample, a batch, padding.
        HostError: numbers that are not finite.
        CheckpointError: the state belongs to another measurement.
    """
    anatomy = find(model)
    patch = patch_on(anatomy)
    done = (None if state is None else state.load()) or RunningMean(skipped={NO_IMAGE: 0, NO_TEXT: 0})
    kept = done.seen
    rest: Any = samples
    if kept:
        rest = samples[kept:] if isinstance(samples, Sequence) else itertools.islice(samples, kept, None)
    try:
        for sample in files.track(rest, "saturation", progress):
            if settings.max_samples is not None and done.samples >= settings.max_samples:
                break
            why_not = unusable(anatomy, sample)
            done = done.plus(measure_sample(anatomy, sample, settings)) if why_not is None else done.without(why_not)
            if state is not None and done.seen - kept >= settings.save_every:
                state.save(done)
                kept = done.seen
    except KeyboardInterrupt:
        if state is not None and done.seen > kept:
            state.save(done)
        raise
    if not done.samples:
        counts = ", ".join(f"{count} with {why}" for why, count in done.skipped.items())
        raise InputError(f"no usable sample for saturation: {counts}")
    return SaturationResult(done.mean(), done.samples, done.skipped, settings, patch)
