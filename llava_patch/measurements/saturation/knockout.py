"""Knock-out: what the answers lose when text stops reading the image at a layer, for every layer at once.

Curves such as attention mass say what a layer does with the image, not whether anybody needs it. Here the image is
taken away: for every split the text positions go on alone, from the states that the stock pass had there. All splits
run in one batch, so that each layer is called on them once, and no split runs the layers below it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_patch.core.undo import UndoStack
from llava_patch.hosts import compat
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.trace import Trace
from llava_patch.routing.layers import Stream
from llava_patch.routing.plan import KeyPositions, PositionSet

POSITIONS = 4096
"""Positions of all splits together that a layer is called on at a time."""


@dataclass(frozen=True)
class Knockout:
    """Per split 0 ... L-1, at the positions that are read (`Trace.reads`).

    `withdrawn`: the image leaves for good, as in VTW. `fused`: the last layer sees it again, as in LF with one fusion
    layer whose side branch makes of the image what the layers did.
    """

    withdrawn_kl: list[float]  # KL(stock || withdrawn) of the next token in nats, mean
    withdrawn_kept: list[float]  # share whose most probable token stays
    fused_kl: list[float]
    fused_kept: list[float]
    vtw_kl: list[float]  # KL(withdrawn || stock) of the token behind the prompt in nats, as VTW's own search has it


@torch.no_grad()
def knock_out(anatomy: Anatomy, seen: Trace, chunk: int) -> Knockout:
    """Take the image away at every split.

    Args:
        anatomy: an unrouted, unpruned model of either host.
        seen: a finished trace of one sample on it, with a text position behind the image.
        chunk: positions whose logits [chunk, vocabulary] are held at a time.
    """
    layers = list(anatomy.layers)
    last = len(layers) - 1
    place = torch.arange(len(seen.mask), device=seen.mask.device)
    text = place[~seen.mask]
    hidden = seen.entered[0]
    alone, whole = _stream(anatomy, seen, text), _stream(anatomy, seen, place)
    rows = hidden.new_empty(0, len(text), hidden.shape[1])
    with UndoStack() as undo:
        compat.prepare_layers(None, layers, undo)  # the routing does the same for what it calls
        for number, layer in enumerate(layers):
            entered = seen.entered[number]
            rows = torch.cat([rows.to(entered.device), entered[text.to(entered.device)][None]])
            if number == last:
                fused = _run(layer, _filled(entered, rows, text), whole)[:, text.to(entered.device)]
            rows = _run(layer, rows, alone)
    reads = torch.searchsorted(text, seen.reads().to(text.device))
    return Knockout(*_against(anatomy, seen, rows[:, reads.to(rows.device)], chunk),
                    *_against(anatomy, seen, fused[:, reads.to(fused.device)], chunk),
                    _behind_prompt(anatomy, seen, rows[:, int(reads[0])]))  # fmt: skip


def _stream(anatomy: Anatomy, seen: Trace, places: Tensor) -> Stream:
    """What a layer needs to run on some positions (int64 [n]) of the sample and on no others."""
    config, window = anatomy.decoder.config, compat.sliding_window(anatomy.decoder.config)
    held = PositionSet(places[None], None)
    windowed = window is not None and len(seen.mask) > window
    states = seen.entered[0][None, : len(places)]
    assert seen.rotary is not None
    return Stream(config, held.take_rotary(seen.rotary), len(places), KeyPositions(held), states, windowed)


def _filled(entered: Tensor, rows: Tensor, text: Tensor) -> Tensor:
    """The stock input of a layer, [tokens, hidden], with each split's text states: [splits, tokens, hidden]."""
    filled = entered.expand(len(rows), -1, -1).clone()
    filled[:, text.to(entered.device)] = rows
    return filled


def _run(layer: torch.nn.Module, rows: Tensor, stream: Stream) -> Tensor:
    """A layer on [splits, positions, hidden], some splits at a time."""
    cos, sin = (part.to(rows.device) for part in stream.rotary)
    mask = stream.mask(layer)
    if isinstance(mask, Tensor):
        mask = mask.to(rows.device)
    parts = [
        compat.call_layer(layer, part, attention_mask=mask, position_embeddings=(cos, sin), use_cache=False,
                          checkpoint=False)
        for part in rows.split(max(1, POSITIONS // rows.shape[1]))
    ]  # fmt: skip
    return torch.cat(parts)


def _against(anatomy: Anatomy, seen: Trace, rows: Tensor, chunk: int) -> tuple[list[float], list[float]]:
    """(KL, share kept) of each split's final states at the read positions, [splits, reads, hidden], against stock's."""
    stock = seen.states[len(anatomy.layers) - 1]
    stock = stock[seen.reads().to(stock.device)]
    kl = torch.zeros(len(rows), dtype=torch.float64)
    kept = torch.zeros(len(rows), dtype=torch.float64)
    for part in torch.arange(len(stock)).split(chunk):
        expected = _predicted(anatomy, stock[part.to(stock.device)])
        probability, choice = expected.exp(), expected.argmax(-1)
        for number, states in enumerate(rows):
            found = _predicted(anatomy, states[part.to(states.device)])
            kl[number] += float((probability * (expected - found)).sum())
            kept[number] += float((found.argmax(-1) == choice).sum())
    # Two passes that say the same differ in their last bits, which would make the divergence a little negative.
    return (kl / len(stock)).clamp_(min=0).tolist(), (kept / len(stock)).tolist()


def _behind_prompt(anatomy: Anatomy, seen: Trace, rows: Tensor) -> list[float]:
    """KL(split || stock) at the first position that is read, of each split's final state there, [splits, hidden]."""
    stock = seen.states[len(anatomy.layers) - 1]
    expected = _predicted(anatomy, stock[seen.reads()[:1].to(stock.device)])
    found = _predicted(anatomy, rows)
    kl = (found.exp() * (found - expected.to(found.device))).sum(-1)
    return kl.double().clamp_(min=0).tolist()  # type: ignore[no-any-return]


def _predicted(anatomy: Anatomy, states: Tensor) -> Tensor:
    """What final states [n, hidden] say of the next token: log-probabilities, float32 [n, vocabulary]."""
    return anatomy.lm_head(anatomy.norm(states[None]))[0].float().log_softmax(-1)  # type: ignore[no-any-return]
