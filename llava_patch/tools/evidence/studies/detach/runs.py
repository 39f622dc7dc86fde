"""Single steps at many starts, four arms under two optimizers, and how many taps to detach at which stride."""

from functools import partial

from llava_patch.tools.evidence.studies.detach.arms import ARMS, TOWER_RATES, Training, train
from llava_patch.tools.evidence.studies.detach.starts import READER, STARTS, TAPS, Start, stage_one
from llava_patch.tools.evidence.studies.detach.steps import one_step
from llava_patch.tools.evidence.study import Run

FRESH = Start("fresh-arms", "dense", "fresh", 1.0, 8, 0.15)
TRAINED = Start("trained-arms", "dense", "trained", 1.0, 8, 0.15)
BUBBLES = {1: ((1, 2, 3, 4, 5, 6), (0, 3, 6)), 2: (TAPS, (1, 2)), 3: ((3, 6), (0, 2)), 4: ((4,), (0, 1))}
"""Taps by stride S, and the numbers D of the shallowest that are detached (the main feature is block 7 of 8).

At stride 2, none and all are arms already.
"""
QUICK = ("fresh-noise", "fresh-loud", "trained")


def _stages() -> list[Run]:
    known = {start.stage: start for start in STARTS if start.projector != "fresh"}
    runs = [
        Run(name, partial(stage_one, start=start), (READER,), quick=start.projector == "trained", seconds=11)
        for name, start in known.items()
    ]
    none = partial(stage_one, start=TRAINED, taps=False)
    return [*runs, Run(f"{TRAINED.stage}-none", none, (READER,), seconds=11)]


def _step(start: Start) -> Run:
    needs = (READER,) if start.projector == "fresh" else (READER, f"detach/{start.stage}")
    quick = start.name in QUICK
    return Run(f"one/{start.name}", partial(one_step, start=start), needs, quick=quick, seconds=24)


def _arm(start: Start, arm: str, optimizer: str) -> Run:
    stage = f"detach/{start.stage}" + ("-none" if arm == "none" else "")
    needs = (READER,) if start.projector == "fresh" else (READER, stage)
    seconds = 20 if arm == "short" else 10
    work = partial(train, training=Training(start, arm, optimizer))
    return Run(f"arm/{start.projector}/{optimizer}/{arm}", work, needs, seconds=seconds)


def _bubble(stride: int, detach: int) -> Run:
    layers = BUBBLES[stride][0]
    work = partial(train, training=Training(FRESH, "fused", "adamw", layers, detach), drift=False)
    return Run(f"bubble/{stride}-{detach}", work, (READER,), seconds=9)


RUNS = (
    *_stages(),
    *map(_step, STARTS),
    *(_arm(start, arm, optimizer) for start in (TRAINED, FRESH) for optimizer in TOWER_RATES for arm in ARMS),
    *(_bubble(stride, detach) for stride, (_, detached) in BUBBLES.items() for detach in detached),
)
