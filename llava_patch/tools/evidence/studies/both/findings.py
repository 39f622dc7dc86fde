"""What the two methods do on one model."""

from typing import Any

from llava_patch.tools.evidence.findings import Finding, Found
from llava_patch.tools.evidence.statistics import gains, share

TITLE = "Skip-Links and LF on one model"
ABOUT = (
    "The chain-reading base behind whose middle the image must pass (`routing`), its projector tuned with taps of "
    "blocks 1 and 2 or alike without, then LF's side branch trained at split 4. If the two got into one another's way, "
    "LF on the fused model would lose more than LF on the plain one. The tower is frozen: detaching itself is tested "
    "elsewhere."
)
LITTLE, MUCH, GATE = 0.03, 0.3, 0.9


def findings(found: Found) -> list[Finding]:
    """Whether LF keeps a fused model's accuracy, and what the taps bring."""
    if not all(name in found for name in ("plain", "fused")):
        return []
    plain, fused = found["plain"], found["fused"]
    worst = min(share(one["tuned"]) for one in (*plain, *fused))
    gate = "" if worst >= GATE else f"a tuned model answers {worst:.2f} of two-step questions, under {GATE}"
    needs = all(gap.low > MUCH for gap in gains(fused, "rows", fused, "other"))
    control = f"LF trained on another picture's states must lose at least {MUCH}"
    count = plain[0]["rows"].partition(":")[0]
    values = {
        f"{name}, {what}": [share(one[key]) for one in arm]
        for name, arm in (("plain", plain), ("fused", fused))
        for what, key in (
            ("no LF", "tuned"), ("LF untrained", "untrained"), ("LF", "rows"), ("LF, other picture", "other")
        )
    }  # fmt: skip
    return [
        Finding(
            f"LF keeps a fused model's accuracy, within {LITTLE}", "both papers together",
            f"share of {count} held-out two-step questions, fused + LF - fused, paired",
            gains(fused, "rows", fused, "tuned"), control, needs, gate=gate, least=-LITTLE, values=values,
            short="LF on a model with Skip-Links keeps its accuracy (within 0.03)",
        ),
        Finding(
            f"LF loses no more on a fused model than on a plain one, within {LITTLE}", "both papers together",
            f"share of {count} held-out two-step questions, fused + LF - plain + LF, paired",
            gains(fused, "rows", plain, "rows"), control, needs, gate=gate, least=-LITTLE, values=values,
        ),
        Finding(
            "Taps raise the accuracy of a model that reads", "Detached Skip-Links, Table 1",
            f"share of {count} held-out two-step questions, fused - plain, both projectors tuned alike, paired",
            gains(fused, "tuned", plain, "tuned"), control, needs, gate=gate, values=values,
            note="the base answers nearly all of them without taps: there is little to gain",
        ),
    ]  # fmt: skip


def figures(found: Found) -> dict[str, Any]:
    """None: four figures are in the table."""
    return {}
