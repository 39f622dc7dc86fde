"""Trains the bases and their arms."""

from functools import partial
from typing import Any

from llava_patch.settings.methods import FastV, Routing
from llava_patch.tools.evidence.small import arms, stacked
from llava_patch.tools.evidence.small.arms import SIDE, Base
from llava_patch.tools.evidence.small.model import weights
from llava_patch.tools.evidence.small.stacked import LAYERS, STACKS
from llava_patch.tools.evidence.study import Context, Run

SPLIT = 4
"""Where the late bases' arms split: half of the decoder, as the paper's 18 of 32."""
EARLY_SPLIT = 2
"""Before the early base's second look (layer 2), so that the image is still needed behind it."""
PRUNING = FastV(layer=2, ratio=0.5)
RATES = (5e-4, 2e-3, 8e-3)
SAMPLES = SIDE.steps * arms.BATCH
RECIPES = {"batch 4": (4, RATES[:2]), "batch 128": (128, RATES)}
"""The paper's batch, and that of LLaVA's scripts, at equal samples; the larger one is tried at a larger rate too."""
FEW = "batch 128", RATES[0]
"""The fewest and smallest steps, whose companion of another picture is trained as well."""
BASE_STEPS = {"early": 600, "late": 600, "sixth": 600, "turned": 200, "ladder": 1600}


def one(ctx: Context) -> dict[str, Any]:
    """Tower, projector and the pair of layers that every base begins with."""
    scale = ctx.size.scale
    model, found = stacked.one_step(ctx.seed, ctx.device, max(1, round(700 * scale)), max(1, round(400 * scale)))
    ctx.keep(weights(model))
    return {"seed": ctx.seed, **found}


def base(ctx: Context, name: str) -> dict[str, Any]:
    """Train one base, see where it reads, and score every arm that needs no training."""
    shape, steps = STACKS[name], max(1, round(BASE_STEPS[name] * ctx.size.scale))
    if shape.turned:
        model = stacked.loaded(ctx.load("routing/late"), ctx.device)
        losses = stacked.train(model, shape, ctx.seed + 5, steps, rate=2e-3)
    else:
        first = ctx.load("routing/one")
        if name == "ladder":  # grows from the base that takes two steps early
            model = stacked.put(ctx.load("routing/early"), {i: i for i in range(LAYERS)}, ctx.seed, last=first)
        else:
            model = stacked.stack(first, shape, ctx.seed)
        model.to(ctx.device)
        losses = stacked.train(model, shape, ctx.seed, steps)
    ctx.keep(weights(model))
    last = losses[-50:]
    there = Base(weights(model), shape.steps, ctx.seed, ctx.device)
    return {
        "seed": ctx.seed,
        "loss": sum(last) / len(last),
        **_untrained(there, EARLY_SPLIT if name == "early" else SPLIT),
    }


def _untrained(there: Base, split: int) -> dict[str, Any]:
    def sweep(last: int, **settings: Any) -> dict[str, str]:
        return {str(split): there.answers(Routing(split=split, **settings)) for split in range(1, last + 1)}

    late = Routing(split=SPLIT)
    costs = {
        "vtw": there.cost(Routing(variant="vtw", split=SPLIT)), "lf": there.cost(late),
        "lf2": there.cost(Routing(split=SPLIT, fusion_layers=2)), "pc": there.cost(Routing(variant="pc", split=SPLIT)),
        "kv": there.cost(Routing(variant="kv", split=SPLIT)), "fastv": there.cost(None, PRUNING),
        "lf_fastv": there.cost(late, PRUNING),
    }  # fmt: skip
    return {
        "stock": there.answers(), "vtw": sweep(LAYERS, variant="vtw"),
        "one": there.answers(steps=1), "one_vtw": there.answers(Routing(variant="vtw", split=split), steps=1),
        "ideal": there.answers(Routing(variant="ideal", split=SPLIT)), "lf": sweep(LAYERS - 1),
        "lf2": sweep(LAYERS - 2, fusion_layers=2), "fastv": there.answers(None, PRUNING), "cost": costs,
    }  # fmt: skip


def _base(ctx: Context, name: str) -> Base:
    return Base(ctx.load(f"routing/{name}"), STACKS[name].steps, ctx.seed, ctx.device)


def trained(ctx: Context, name: str, settings: dict[str, Routing]) -> dict[str, Any]:
    """Side branches on one base, each with its companions."""
    there, recipe = _base(ctx, name), arms.scaled(SIDE, ctx.size.scale)
    return {"seed": ctx.seed, "arms": {arm: there.companions(routing, recipe) for arm, routing in settings.items()}}


def beside(ctx: Context) -> dict[str, Any]:
    """What is compared with LF on the turned base: LF with FastV, LoRA and full fine-tuning of the stock model."""
    there, recipe = _base(ctx, "turned"), arms.scaled(SIDE, ctx.size.scale)
    found = {
        "lf_fastv": there.companions(Routing(split=SPLIT), recipe, PRUNING), "lora": there.tuned(16, recipe),
        "full": there.tuned(None, recipe),
    }  # fmt: skip
    return {"seed": ctx.seed, "arms": found}


def rates(ctx: Context) -> dict[str, Any]:
    """LF's and PC's learning rates on the turned base."""
    there = _base(ctx, "turned")
    found = {}
    for variant in ("lf", "pc"):
        for rate in RATES:
            recipe = arms.scaled(SIDE, ctx.size.scale, rate=rate)
            found[f"{variant} {rate:g}"] = there.side(Routing(variant=variant, split=SPLIT), recipe=recipe)
    return {"seed": ctx.seed, "arms": found}


def recipes(ctx: Context) -> dict[str, Any]:
    """LF on the turned base with the paper's batch of 4, and with 32 times larger batches and fewer steps."""
    there, found = _base(ctx, "turned"), {}
    for name, (batch, tried) in RECIPES.items():
        for rate in tried:
            recipe = arms.scaled(SIDE, ctx.size.scale * arms.BATCH / batch, rate=rate)
            found[f"{name} {rate:g}"] = there.side(Routing(split=SPLIT), recipe=recipe, batch=batch)
            if (name, rate) == FEW:
                found[f"another picture, {name} {rate:g}"] = there.side(
                    Routing(split=SPLIT), image="other", recipe=recipe, batch=batch
                )
    return {"seed": ctx.seed, "arms": found}


def _variants(split: int, names: tuple[str, ...] = ("lf", "pc")) -> dict[str, Routing]:
    return {variant: Routing(variant=variant, split=split) for variant in names}


def _fusions() -> dict[str, Routing]:
    return {
        "K=1": Routing(split=SPLIT), "K=2": Routing(split=SPLIT, fusion_layers=2),
        "layer 6": Routing(split=SPLIT, fusion_layers=(6,)),
    }  # fmt: skip


RUNS = (
    Run("one", one, quick=True, seconds=50),
    Run("late", partial(base, name="late"), ("routing/one",), quick=True, seconds=55),
    Run("turned", partial(base, name="turned"), ("routing/late",), quick=True, seconds=30),
    Run(
        "turned/arms", partial(trained, name="turned", settings=_variants(SPLIT, ("lf", "pc", "kv"))),
        ("routing/turned",), quick=True,
        seconds=55,
    ),
    Run("early", partial(base, name="early"), ("routing/one",), seconds=55),
    Run("sixth", partial(base, name="sixth"), ("routing/one",), seconds=55),
    Run("ladder", partial(base, name="ladder"), ("routing/one", "routing/early"), seconds=110),
    Run("late/arms", partial(trained, name="late", settings=_variants(SPLIT)), ("routing/late",), seconds=45),
    Run("early/arms", partial(trained, name="early", settings=_variants(EARLY_SPLIT)), ("routing/early",), seconds=45),
    Run("sixth/arms", partial(trained, name="sixth", settings=_fusions()), ("routing/sixth",), seconds=45),
    Run("ladder/arms", partial(trained, name="ladder", settings={"lf": Routing(split=SPLIT)}), ("routing/ladder",)),
    Run(
        "turned/splits",
        partial(trained, name="turned", settings={str(split): Routing(split=split) for split in (2, 5)}),
        ("routing/turned",), seconds=50,
    ),
    Run("turned/beside", beside, ("routing/turned",), seconds=30),
    Run("turned/rates", rates, ("routing/turned",), seconds=50),
    Run("turned/recipes", recipes, ("routing/turned",), seconds=40),
)  # fmt: skip
