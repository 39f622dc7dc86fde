"""Settings that every general test of routing runs over, and small tools around a batch."""

from __future__ import annotations

import contextlib

import torch

from llava_patch import FastV, PyramidDrop, Routing, SparseVLM
from tests.support.models import IMAGE, LAYERS

RAGGED = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,), (1, IMAGE, 9)]

VARIANTS = {
    "lf": {"routing": Routing(split=2)},
    "lf-split0": {"routing": Routing(split=0, side_layers=2)},
    "lf-k2": {"routing": Routing(split=2, fusion_layers=2, side_layers=2)},
    "lf-sparse": {"routing": Routing(split=1, fusion_layers=(2, 4))},
    "lf-sparse-last": {"routing": Routing(split=1, fusion_layers=(3, 5))},
    "pc": {"routing": Routing(variant="pc", split=2)},
    "kv": {"routing": Routing(variant="kv", split=2)},
    "ideal": {"routing": Routing(variant="ideal", split=2)},
    "vtw": {"routing": Routing(variant="vtw", split=2)},
}
PRUNED = {
    "fastv": {"pruning": FastV(layer=2, ratio=0.5)},
    "fastv-last": {"pruning": FastV(layer=LAYERS - 1, ratio=0.7)},
    "lf+fastv": {"routing": Routing(split=3), "pruning": FastV(layer=1, ratio=0.75)},
    "lf+fastv-at-split": {"routing": Routing(split=2, fusion_layers=2), "pruning": FastV(layer=2, ratio=0.5)},
    "pc+fastv": {"routing": Routing(variant="pc", split=3), "pruning": FastV(layer=2, ratio=0.5)},
    "pc+fastv-deep": {"routing": Routing(variant="pc", split=1), "pruning": FastV(layer=3, ratio=0.5)},
    "kv+fastv": {"routing": Routing(variant="kv", split=2), "pruning": FastV(layer=1, ratio=0.9)},
    "kv+fastv-deep": {"routing": Routing(variant="kv", split=1), "pruning": FastV(layer=4, ratio=0.5)},
    "ideal+fastv": {"routing": Routing(variant="ideal", split=2), "pruning": FastV(layer=1, ratio=0.5)},
    "vtw+fastv": {"routing": Routing(variant="vtw", split=3), "pruning": FastV(layer=2, ratio=0.5)},
    "fastv-all": {"pruning": FastV(layer=2, ratio=1.0)},
    "lf+fastv-all": {"routing": Routing(split=3), "pruning": FastV(layer=2, ratio=1.0)},
    "pyramid": {"pruning": PyramidDrop((1, 3, 4), (0.75, 0.5, 0.125))},
    "lf+pyramid": {"routing": Routing(split=3), "pruning": PyramidDrop((2, 3), (0.5, 0.25))},
    "kv+pyramid-deep": {"routing": Routing(variant="kv", split=2), "pruning": PyramidDrop((1, 4), (0.8, 0.3))},
    "sparse": {"pruning": SparseVLM((1, 3, 4), (12, 9, 3))},
    "lf+sparse": {"routing": Routing(split=3), "pruning": SparseVLM((2, 3), (0.5, 0.25))},
}
ALL = {**VARIANTS, **PRUNED}


def embeddings(host, batch):
    """What the decoder gets: [batch, tokens, hidden], through the host's own preparation."""
    seen = {}

    def note(module, args, kwargs):
        seen["embeds"] = kwargs.get("inputs_embeds", args[0] if args else None)

    hook = host.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        host.model(**batch.inputs, use_cache=False)
    finally:
        hook.remove()
    return seen["embeds"].detach()


def alone(host, samples, i):
    """The same tokens and pixels as row i of a ragged batch, as a batch of one."""
    whole = host.batch(samples, "right")
    length = int(whole.inputs["attention_mask"][i].sum())
    single = host.batch([samples[i]])
    single.inputs["input_ids"] = whole.inputs["input_ids"][i : i + 1, :length]
    key = "pixel_values" if host.name == "hf" else "images"
    fewest = 0 if host.name == "hf" else 1
    counts = [max(fewest, sum(p == IMAGE for p in s)) for s in samples]
    single.inputs.pop(key, None)
    if counts[i]:
        single.inputs[key] = whole.inputs[key][sum(counts[:i]) : sum(counts[: i + 1])]
    return single


def extend(batch, tokens):
    """The batch's inputs with further text tokens behind."""
    inputs = dict(batch.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    return inputs


def again(handle, cache):
    """For a plain forward over a conversation: what pruning has chosen on the way is chosen again."""
    pruned = handle.program().prune_at is not None
    return handle.image_positions(kept=cache.kept()) if pruned else contextlib.nullcontext()


def places(mask):
    """Position ids that do not count padding, as generate() makes them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
