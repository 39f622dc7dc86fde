"""Widens the projector of a base by taps, trains it, and then trains LF on top."""

import contextlib
from functools import partial
from typing import Any

from llava_patch.fusion.skip_links import SkipLinks
from llava_patch.patching.patch import patch
from llava_patch.settings.methods import Routing
from llava_patch.tools.evidence.small import arms
from llava_patch.tools.evidence.small.arms import Base, other_image
from llava_patch.tools.evidence.small.stacked import STACKS
from llava_patch.tools.evidence.study import Context, Run

FUSION = SkipLinks(layers=(1, 2))
"""Both are under stop-gradient; the tower is frozen here, so that this costs nothing and changes nothing."""
ROUTING = Routing(split=4)
BASE = "turned"


def arm(ctx: Context, fused: bool) -> dict[str, Any]:
    """The projector tuned with the taps or without, then LF's side branch trained on that model.

    Returns:
        Packed rows: "tuned", "untrained" (LF's branch), "rows" (trained), "other" (trained on another picture).
    """
    there = Base(ctx.load(f"routing/{BASE}"), STACKS[BASE].steps, ctx.seed, ctx.device)
    recipe = arms.scaled(arms.SIDE, ctx.size.scale)
    found: dict[str, Any] = {"seed": ctx.seed}
    for image in ("own", "other"):
        model = there.model()
        with patch(model, fusion=FUSION) if fused else contextlib.nullcontext():
            model.requires_grad_(False)
            projector = model.model.multi_modal_projector
            projector.requires_grad_(True)
            found["projector"] = there.train(model, recipe)
            found["tuned"] = there.rows(model)
            with patch(model, routing=ROUTING) as handle:
                found["untrained"] = there.rows(model)
                branch = handle.anatomy.decoder.side_branch
                model.requires_grad_(False)
                branch.requires_grad_(True)
                with other_image(branch) if image == "other" else contextlib.nullcontext():
                    there.train(model, recipe)
                    found["rows" if image == "own" else "other"] = there.rows(model)
    return found


RUNS = tuple(
    Run(name, partial(arm, fused=fused), (f"routing/{BASE}",), seconds=40)
    for name, fused in (("plain", False), ("fused", True))
)
