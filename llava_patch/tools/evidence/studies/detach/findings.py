"""What single steps and runs say of detaching."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Effect, Finding, Found
from llava_patch.tools.evidence.small import probing
from llava_patch.tools.evidence.studies.detach.cells import RULES, Cells, by_seed
from llava_patch.tools.evidence.studies.detach.figures import figures as figures  # the report asks for it here

TITLE = "Detached skip links: condition (7) as a prediction"
ABOUT = (
    "Proposition 4.3 of the Skip-Links paper says when a step without the skip gradient is no worse. Here its "
    "condition (7) gets the curvature along the gradient, measured, as L, and must say what detaching gains in one "
    "plain step of the tower of a small model that reads digits: from starts that differ in projector, taps, tower, "
    "batch and label noise, at several moments of training and step sizes. Predictions and steps take different "
    "batches. Then runs: no taps, all attached, all detached, and attached with steps as short as the detached ones."
)
ASSUMED = "Detached Skip-Links, Assumption 4.2"
PAPER = "Detached Skip-Links, Proposition 4.3"
ACROSS = 0.3
LEAST_READ = 0.2  # share of strings that one of a comparison's arms must read at the end


def findings(found: Found) -> list[Finding]:
    """Signs, ranks, the length of a step, and the runs."""
    cells = by_seed(found)
    claims = _claims(cells) if cells else []
    for projector in ("trained", "fresh"):
        for optimizer in ("sgd", "adamw"):
            if all(f"arm/{projector}/{optimizer}/{arm}" in found for arm in ("none", "fused", "detached", "short")):
                claims += _runs(found, projector, optimizer)
    fused, deepest = "arm/fresh/adamw/fused", "arm/fresh/adamw/detached"
    if all(name in found for name in (fused, deepest, "bubble/2-1")):
        claims += _depths(found, fused, deepest)
    return claims


def _claims(cells: Sequence[Cells]) -> list[Finding]:
    share = (
        "mean of the shares of right signs among steps in which detaching gains and in which it loses, by more than 2 "
    )
    share += "standard errors (0.5 for any constant guess); intervals draw starts"
    both = all(((one.gain > 0) & one.clear).sum() >= 3 and ((one.gain < 0) & one.clear).sum() >= 3 for one in cells)
    gate = "" if both else "detaching does not gain in at least three of a seed's steps and lose in three"
    control = "the same steps: detaching must gain in at least 3 and lose in at least 3, so that a guess can be wrong"
    mixed = all(one.ranks("condition (7)", mixed=True).value < one.ranks("condition (7)").value / 2 for one in cells)
    within = [one.plain("condition (7)", one.within) for one in cells]
    everywhere = [one.plain("condition (7)") for one in cells]
    counts = {
        "right signs, all steps": [float(right) for right, _ in everywhere],
        "clear, all steps": [float(count) for _, count in everywhere],
        "right signs, L gamma < 1": [float(right) for right, _ in within],
        "clear, L gamma < 1": [float(count) for _, count in within],
    }
    first = Finding(
        "Condition (7), with the curvature along the gradient as L, predicts whether detaching gains in one plain step",
        PAPER, share, tuple(one.signs("condition (7)") for one in cells), control, both, gate, least=0.5, values=counts,
        note="a step further than 1 / L from a fresh start is beyond any second order",
        short="condition (7), its curvature measured, predicts whether detaching gains in one step",
    )  # fmt: skip
    alone = [
        Finding(
            claim, source, share, tuple(one.signs(rule) for one in cells),
            "condition (7) on the same steps, beside", both, gate, least=0.5,
            values={"by condition (7)": [one.signs("condition (7)").value for one in cells]},
        )
        for rule, claim, source in (
            ("variance dominance", "Variance dominance alone (c > 1) predicts it", f"{ASSUMED}, 1"),
            ("cosine", "The cosine alone (below 0) predicts it", f"{ASSUMED}, 2"),
            (
                "SNR", "The signal-to-noise ratios alone (full below main) predict it",
                "Detached Skip-Links, section 4.2 (SNR)",
            ),
        )
    ]  # fmt: skip
    against = Finding(
        "Condition (7) predicts it better than variance dominance", PAPER,
        "difference of the two shares of right signs",
        tuple(one.better("condition (7)", "variance dominance") for one in cells), control, both, gate,
    )  # fmt: skip
    ranked = Finding(
        "Condition (7) ranks steps of one size by what detaching gains in them", PAPER,
        "Spearman's correlation of predicted and measured gain, mean over three step sizes; intervals draw starts",
        tuple(one.ranks("condition (7)") for one in cells),
        "predictions of the next start must rank them less than half as well", mixed,
        values={f"by {rule}": [one.ranks(rule).value for one in cells] for rule in RULES if rule != "condition (7)"},
    )  # fmt: skip
    won = all((one.clear & (one.gain > 0)).sum() >= 3 for one in cells)
    shorter = Finding(
        "Most of what detaching gains in a step is that the step is shorter", "theory: condition (7)'s penalty",
        "median share of the gain that is gone when the main gradient is stretched to the full one's length, over "
        "steps in which detaching gains by more than 2 standard errors; intervals draw starts",
        tuple(one.shorter() for one in cells), "at least 3 such steps a seed", won, least=0.5,
        short="what detaching gains in a step is mostly that the step is shorter",
    )  # fmt: skip
    both_kinds = all(one.fresh.any() and one.trained.any() for one in cells)
    picture = [_picture(cells)] if both_kinds else []
    return [*picture, first, *alone, against, ranked, shorter]


def _picture(cells: Sequence[Cells]) -> Finding:
    across = all(abs(cosine) < ACROSS for one in cells for cosine in one.of("cosine", one.fresh))
    beside = {
        f"{name}, {side} projector, median": [float(np.median(one.of(name, getattr(one, side)))) for one in cells]
        for side in ("fresh", "trained")
        for name in ("c", "cosine", "delta")
    }
    return Finding(
        "Skip and main gradient agree where the projector was trained with its taps, and not where it is fresh",
        "Detached Skip-Links, figure 3 and Assumption 4.2",
        "cosine at the first tapped block before any step, trained starts minus fresh ones; intervals draw starts",
        tuple(one.agreement() for one in cells), f"every fresh start has a cosine within {ACROSS} of 0, as the paper's",
        across, least=0.2, values=beside,
        short="skip and main gradient conflict before a fresh projector, not a trained one",
    )  # fmt: skip


def _runs(found: Found, projector: str, optimizer: str) -> list[Finding]:
    arms = {arm: found[f"arm/{projector}/{optimizer}/{arm}"] for arm in ("none", "fused", "detached", "short")}
    read = {arm: [statistics.share(one["rows"]) for one in seeds] for arm, seeds in arms.items()}
    lowest = min(max(read[arm][seed] for arm in read) for seed in range(len(read["fused"])))
    gate = "" if lowest >= LEAST_READ else f"the best arm of a seed reads {lowest:.2f} of the strings at the end"
    alike = all(
        abs(one["curve"][0][1] - arms["fused"][seed]["curve"][0][1]) < 1e-3
        for arm in ("detached", "short")
        for seed, one in enumerate(arms[arm])
    )
    name = {"sgd": "plain SGD", "adamw": "AdamW"}[optimizer]
    where = f"under {name}, from a {projector} projector"
    unit = "fall of the loss an answer token (nats) on 160 images that are not trained on; intervals draw images"
    beside: dict[str, list[float]] = {}
    for arm, seeds in arms.items():
        beside[f"{arm}: loss at the end"] = [float(np.mean(one["end"])) for one in seeds]
        beside[f"{arm}: strings read"] = read[arm]
        beside[f"{arm}: cosine with the start behind layer 2"] = [one["drift"]["image"] for one in seeds]
        beside[f"{arm}: attention of block 2, distance from the start"] = [
            float(np.mean(one["drift"]["attention"])) for one in seeds
        ]
        beside[f"{arm}: R-Probe's error"] = [one["probe"]["mse"] for one in seeds]
        beside[f"{arm}: R-Probe's steps to half of its FVU"] = [
            one["probe"]["steps_to_half_fvu"] or math.inf for one in seeds
        ]
    control = "fused, detached and short begin at the same loss (to 0.001), and take the same batches"
    looked = len(arms["fused"][0]["drift"]["attention"])

    def claim(sentence: str, better: str, worse: str, time: str, **more: Any) -> Finding:
        effect = tuple(_fall(one, other, time) for one, other in zip(arms[worse], arms[better], strict=True))
        return Finding(
            f"{sentence} {where}", "Detached Skip-Links, section 3", unit, effect, control, alike, gate, **more
        )

    short = {"trained sgd": "early", "trained adamw": "long"}.get(f"{projector} {optimizer}")
    early = "detaching lowers the loss of the first 40 steps (plain SGD)" if short == "early" else ""
    long = "detaching beats a fused step of the same length (AdamW, 120 steps)" if short == "long" else ""
    return [
        claim(
            "Detaching is better than fusing in the first 40 steps", "detached", "fused", "early", values=beside,
            short=early,
        ),
        claim("Detaching is better than fusing after 120 steps", "detached", "fused", "end"),
        claim(
            "Detaching is better than fused steps of the same length after 120 steps", "detached", "short", "end",
            short=long,
        ),
        claim("Fusing is better than no taps after 120 steps", "fused", "none", "end"),
        Finding(
            f"Detaching leaves the attention of the first tapped block nearer to where it began than fusing {where}",
            "Detached Skip-Links, figure 2",
            f"total variation distance of an image's map from the start's, fused - detached; {looked} images",
            tuple(
                statistics.mean(np.asarray(a["drift"]["attention"]) - np.asarray(b["drift"]["attention"]))
                for a, b in zip(arms["fused"], arms["detached"], strict=True)
            ),
            control, alike, gate, values={},
        ),
        Finding(
            f"R-Probe rebuilds better from what detaching trained than from what fusing did {where}",
            "Detached Skip-Links, section 5",
            "mean squared error after equal steps of the probe, fused - detached, paired",
            tuple(probing.rises(a["probe"], b["probe"]) for a, b in zip(arms["fused"], arms["detached"], strict=True)),
            control, alike, gate,
        ),
    ]  # fmt: skip


def _depths(found: Found, fused: str, deepest: str) -> list[Finding]:
    one, none, every = found["bubble/2-1"], found[fused], found[deepest]
    alike = all(abs(a["curve"][0][1] - b["curve"][0][1]) < 1e-3 for a, b in zip(one, none, strict=True))
    lowest = min(statistics.share(seed["rows"]) for seed in none)
    gate = "" if lowest >= LEAST_READ else f"without detaching, a seed reads {lowest:.2f} of the strings"
    return [
        Finding(
            claim, "Detached Skip-Links, section 6.3 and Figure 6",
            "difference of the share of 160 images read, under AdamW from a fresh projector, taps at blocks 2, 4 and 6",
            tuple(statistics.paired(a["rows"], b["rows"]) for a, b in zip(better, worse, strict=True)),
            "both begin at the same loss (to 0.001), and take the same batches", alike, gate,
        )
        for claim, better, worse in (
            ("Detaching the shallowest tap reads more than detaching none", one, none),
            ("Detaching the shallowest tap reads more than detaching all", one, every),
        )
    ]  # fmt: skip


def _fall(worse: dict[str, Any], better: dict[str, Any], time: str) -> Effect:
    return statistics.mean(np.asarray(worse[time]) - np.asarray(better[time]))
