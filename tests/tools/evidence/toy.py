"""A study that takes no time: a base, an arm that needs it, one that fails and one that needs what failed."""

from functools import partial

import torch

from llava_patch.core.plotting import panels
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Finding
from llava_patch.tools.evidence.study import Run

TITLE, ABOUT = "A toy", "Nothing is learnt from it."


def base(context):
    context.keep({"weight": torch.randn(3)})
    return {"rows": statistics.pack_bits(torch.rand(300) > 0.1)}


def arm(context, wrong):
    if wrong > 1:
        raise ValueError("more than all of them")
    assert context.load("toy/base")["weight"].shape == (3,)
    assert torch.get_num_threads() == 1
    rows = torch.rand(300) > wrong
    return {"rows": statistics.pack_bits(rows), "base": context.result("toy/base")["rows"]}


RUNS = (
    Run("base", base, quick=True, seconds=1),
    Run("arm", partial(arm, wrong=0.5), needs=("toy/base",), quick=True, seconds=1),
    Run("fails", partial(arm, wrong=2.0), needs=("toy/base",), seconds=1),
    Run("after", partial(arm, wrong=0.5), needs=("toy/fails",), seconds=1),
)


def findings(found):
    effect = tuple(statistics.paired(one["rows"], other["rows"]) for one, other in zip(found["base"], found["arm"]))
    return [
        Finding(
            "The base reads more than the arm",
            "theory",
            "share of rows",
            effect,
            "none is needed",
            True,
            short="base > arm",
        )
    ]


def figures(found):
    figure, (axis,) = panels()
    axis.plot([statistics.share(one["rows"]) for one in found["arm"]])
    return {"arms": figure}
