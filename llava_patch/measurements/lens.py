"""Logit lens: what each decoder layer would predict through the model's own final norm and head."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.trace import Trace

NAN = float("nan")


def lens_kl(anatomy: Anatomy, trace: Trace, chunk: int) -> tuple[list[float], list[float]]:
    """KL(final || layer) of the logit lens.

    Args:
        anatomy: the host model.
        trace: a finished trace.
        chunk: positions whose logits [chunk, vocabulary] are held at a time.

    Returns:
        (image, text): per layer the mean in nats over the positions that both the layer and the last one have (pruned
        ones are in neither); NaN where there are none. The last layer's is 0.
    """
    layers = range(len(anatomy.layers))
    rows = [trace.rows(layer) for layer in layers]
    image, text = trace.mask() & (rows[-1] >= 0), ~trace.mask()
    present = [trace.image_states(layer) > 0 for layer in layers]
    return (
        _means(anatomy, trace, chunk, image.nonzero().flatten(), rows, present),
        _means(anatomy, trace, chunk, text.nonzero().flatten(), rows, [True] * len(layers)),
    )


def _means(
    anatomy: Anatomy, trace: Trace, chunk: int, positions: Tensor, rows: list[Tensor], present: list[bool]
) -> list[float]:
    # Layers only ever lose image positions for good or for all of them, so one that has any has those of the last.
    last = len(rows) - 1
    if not len(positions):
        return [NAN] * (last + 1)
    sums = torch.zeros(last + 1, dtype=torch.float64, device=positions.device)
    for part in positions.split(chunk):
        final = _lens(anatomy, trace, last, rows, part)
        probability = final.exp()
        for layer in range(last + 1):
            if present[layer]:
                log_probs = final if layer == last else _lens(anatomy, trace, layer, rows, part)
                sums[layer] += (probability * (final - log_probs)).sum().to(sums)
    means = (sums / len(positions)).tolist()
    return [mean if there else NAN for mean, there in zip(means, present, strict=True)]


def _lens(anatomy: Anatomy, trace: Trace, layer: int, rows: list[Tensor], positions: Tensor) -> Tensor:
    states = trace.states[layer]
    logits = anatomy.lm_head(anatomy.norm(states[rows[layer][positions].to(states.device)][None]))
    return logits[0].float().log_softmax(-1)
