"""Decoders whose deep layers learned without the image: every saturation signal on them, and VTW's sweep, the truth."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava_patch import Routing, Saturation, image_attention, measure_fusion_attention, measure_saturation, patch
from llava_patch.hosts import anatomy
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.small import chain, model, stacked, training
from llava_patch.tools.evidence.small.stacked import LAYERS
from llava_patch.tools.evidence.small.training import Questions, Recipe
from llava_patch.tools.evidence.statistics import short
from llava_patch.tools.evidence.study import Context, Run

FIRST = "routing/one"
"""Keeps the tower and the pair of layers that takes one step."""
CUTS = (2, 4, 6, 8)
"""First layer that does not see the image in training; a second step is read in the layer below it."""
TRAINED = 450  # steps
QUIET = 0.1
LONG = 40  # words before the image, where attention has somewhere else to go; else 4
STEPS = (1, 2)
LOOKS = ((1, 4), (2, 4), (2, LONG))  # steps that are asked for, words before the image
ROWS, SAMPLES = 256, 32  # of the sweeps, and of the signals, which other pictures give
BASES = ("early", "late", "turned")
"""What routing is judged on."""
READER = LAYERS - 1


def cut(context: Context, layer: int, steps: int = TRAINED, rows: int = ROWS) -> dict[str, Any]:
    """Train a decoder whose layers from `layer` on do not see the image, and look at it as it is without that mask.

    Where no layer is left to be blind, those in the middle are, so that the last one must read.
    """
    # The pair that takes one step at 0 and 1, and again from the layer below the cut on; quiet new layers in between.
    sources = {0: 0, 1: 1, layer - 1: 0, layer: 1}
    made = stacked.put(context.load(FIRST), sources, context.seed, QUIET).to(context.device)
    blind = list(range(layer, LAYERS) if layer < LAYERS else range(stacked.PAIR, READER))
    tasks = [chain.Chain(context.seed + 200 + words, words=words, steps=STEPS) for words in (4, LONG)]
    picks = torch.Generator().manual_seed(context.seed)

    def draw() -> Questions:
        long = torch.rand((), generator=picks) < 0.25
        return tasks[int(long)].batch(stacked.PICTURES, stacked.QUESTIONS).questions({max(layer - 2, 0): 1})

    with hidden(made, blind):
        losses = training.train_decoder(made, draw, Recipe(int(steps * context.size.scale), 3e-3))
    context.keep(model.weights(made))
    return {"seed": context.seed, "cut": layer, "loss": short(losses[-1]), **looked_at(context, made, rows)}


@contextlib.contextmanager
def hidden(made: Any, layers: list[int]) -> Iterator[None]:
    """Hide the image from every question in some layers, inside the block: their attention mask says so."""

    def hide(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        mask, (image,) = kwargs["attention_mask"].clone(), seen
        end = int(image.nonzero().max()) + 1
        mask[..., end:, :end].masked_fill_(image[:end], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen[:] = [kwargs["input_ids"][0] == chain.IMAGE]

    seen: list[Any] = []
    every: list[Any] = list(anatomy.find(made).layers)
    modules = [every[number].self_attn for number in layers]
    hooks = [made.register_forward_pre_hook(note, with_kwargs=True)]
    hooks += [module.register_forward_pre_hook(hide, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def base(context: Context, name: str, rows: int = ROWS) -> dict[str, Any]:
    """One of the bases that routing is judged on."""
    made = stacked.loaded(context.load(name), context.device)
    return {"seed": context.seed, "cut": None, **looked_at(context, made, rows)}


def looked_at(context: Context, made: Any, rows: int) -> dict[str, Any]:
    """Sweeps and signals by kind of question: its number of steps and of words before the image."""
    found = {}
    for taken, words in LOOKS:
        test = chain.held_out(context.seed + 1000, rows, taken, words)
        found[f"{taken} steps, {words} words"] = {
            **sweeps(made, test),
            **signals(made, chain.held_out(context.seed + 2000, SAMPLES, taken, words)[0]),
        }
    return {"looks": found}


def sweeps(made: Any, test: list[chain.Batch]) -> dict[str, Any]:
    """Right answers, packed: the stock model's, VTW's at every split, and those of LF as it begins."""

    def right(**routing: Any) -> str:
        with patch(made, routing=Routing(**routing)):
            return statistics.pack_bits(chain.right(made, test))

    return {
        "stock": statistics.pack_bits(chain.right(made, test)),
        "vtw": [right(variant="vtw", split=split) for split in range(LAYERS)],
        "lf": [right(variant="lf", split=split) for split in range(READER)],
    }


def samples_of(made: Any, batch: chain.Batch) -> list[dict[str, Tensor]]:
    """The prompts of a batch, one each."""
    given = {name: tensor.to(made.device) for name, tensor in batch.inputs().items()}
    return [{name: tensor[i : i + 1] for name, tensor in given.items()} for i in range(len(batch.pixels))]


def signals(made: Any, batch: chain.Batch) -> dict[str, Any]:
    """Every saturation curve, and what is recommended with and without the knock-out."""
    result = measure_saturation(made, samples_of(made, batch), Saturation(), progress=False)
    curves = {
        name: [short(value) for value in getattr(result.curves, name)]
        for name in (
            "mass", "peak", "image_cosine", "image_kl", "text_kl", "answer_kl", "withdrawn_kl", "withdrawn_kept",
            "fused_kl", "fused_kept",
        )
    }  # fmt: skip
    return {
        "curves": curves,
        "recommended": {
            "lf": result.recommended_split,
            "vtw": result.recommend_for(late_fusion=False).split,
            "passive": result.passive.split,
        },
        "reason": result.recommendation.reason,
    }


def fusion(context: Context, name: str, split: int = 4, rows: int = 128) -> dict[str, Any]:
    """Where LF's fusion layer looks in the picture when the answer needs a second look."""
    made = stacked.loaded(context.load(name), context.device)
    stock = stacked.loaded(context.load(name), context.device)
    test = chain.held_out(context.seed + 3000, rows, 2)[0]
    wanted = test.after(torch.ones_like(test.steps))[:, 0] - chain.LETTER  # whose patch the second look must find
    patches = (test.cells[..., 0] == wanted[:, None]).long().argmax(1)
    out: dict[str, Any] = {"seed": context.seed, "split": split}
    with patch(made, routing=Routing(split=split)):
        out["rows"] = statistics.pack_bits(chain.right(made, [test]))
        looked = torch.stack([image_attention(made, one)[READER] for one in samples_of(made, test)])
        several = samples_of(made, test)[:SAMPLES]
        mass = measure_fusion_attention(made, stock, several, progress=False)
    best = looked.amax(-1).argmax(-1)  # the head that looks at one patch most, in each sample
    at = looked[torch.arange(rows), best].argmax(-1)
    out["found"] = statistics.pack_bits(at == patches)
    out["weight"] = [short(value) for value in looked.amax(1).gather(1, patches[:, None])[:, 0].tolist()]
    out["mass"], out["stock mass"] = ([short(v) for v in heads[0]] for heads in (mass.trained, mass.stock))
    return out


RUNS = (
    *(Run(f"cut{layer}", partial(cut, layer=layer), needs=(FIRST,), quick=layer == 4, seconds=50) for layer in CUTS),
    *(Run(name, partial(base, name=f"routing/{name}"), needs=(f"routing/{name}",), seconds=15) for name in BASES),
    Run("fusion/late", partial(fusion, name="saturation/cut8"), needs=("saturation/cut8",), seconds=2),
    Run("fusion/early", partial(fusion, name="saturation/cut4"), needs=("saturation/cut4",), seconds=2),
)
