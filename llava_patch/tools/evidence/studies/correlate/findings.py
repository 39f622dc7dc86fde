"""What R-Probe's error says about reading."""

from collections.abc import Mapping, Sequence
from typing import Any

from llava_patch.core.plotting import IMAGE, OTHER, SPLIT, TEXT, panels
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Effect, Finding, Found

TITLE = "R-Probe's error against reading"
ABOUT = (
    "Exact match on held-out strings beside R-Probe's error on the images of strings, without text, over checkpoints "
    "of one backbone: those of one training that starts half taught, and a taught model whose projector loses rank or "
    "whose tower's weights get noisier. Noise in the decoder's layers behind those that R-Probe copies must ruin "
    "reading and leave the error: the probe says what tokens keep, not what the decoder makes of them. Then the same "
    "training with R-Probe's error in its loss, on equal batches; every fourth step asks for the largest digit instead."
)
BEHIND = 0.3  # exact match that noise in the decoder has to cost
SAME = 0.01  # share by which the error may move meanwhile
SHORT = {
    "damage/rank": "R-Probe ranks as reading does: less let through",
    "damage/tower": "R-Probe ranks as reading does: noisy tower",
    "training": "R-Probe ranks as reading does: one training",
}
PAPER = "Detached Skip-Links and R-Probe, Table 8"


def findings(found: Found) -> list[Finding]:
    """Rank correlations, and what the auxiliary loss does."""
    every: list[Finding] = []
    if "damage/decoder" in found:
        every += [
            _correlation(found, name, claim, note)
            for name, claim, note in (
                (
                    "damage/rank",
                    "Where a projector lets less and less through, R-Probe's error ranks checkpoints as reading does",
                    "what is taken away is information, which is what the probe measures",
                ),
                (
                    "damage/tower",
                    "Where a tower's weights get noisier, R-Probe's error ranks checkpoints as reading does",
                    "noise makes features others that the decoder cannot read; it need not take pixels away, and a "
                    "probe that is made anew learns to read them",
                ),
                (
                    "training",
                    "Over the checkpoints of one training, R-Probe's error ranks checkpoints as reading does",
                    "here reading grows while the tower, taught on patch labels before, keeps about what it kept",
                ),
            )
            if name in found
        ]
    for name in ("auxiliary/0.1", "auxiliary/1"):
        if "training" in found and name in found:
            every += _auxiliary(found, name)
    return every


def exact(seed: Mapping[str, Any], question: str = "read") -> list[float]:
    """Exact match of every checkpoint."""
    return [statistics.share(one[question]) for one in seed["snapshots"]]


def errors(seed: Mapping[str, Any]) -> list[float]:
    """R-Probe's error of every checkpoint."""
    return [one["mse"] for one in seed["snapshots"]]


def _correlation(found: Found, name: str, claim: str, note: str) -> Finding:
    seeds, blind = found[name], found["damage/decoder"]
    lost = [max(values) - min(values) for values in map(exact, blind)]
    moved = [max(values) / min(values) - 1 for values in map(errors, blind)]
    return Finding(
        claim,
        PAPER,
        f"Spearman's rank correlation of -MSE and exact match over {len(seeds[0]['snapshots'])} checkpoints, interval "
        "over checkpoints",
        tuple(_agreement(one) for one in seeds),
        f"noise in the decoder behind R-Probe's layers must cost {BEHIND} of exact match and leave the error within "
        f"{SAME:.0%}: reading can fail where the probe rightly sees nothing",
        min(lost) > BEHIND and max(moved) < SAME,
        least=0.5,
        values={
            "exact match, lowest": [min(exact(one)) for one in seeds],
            "exact match, highest": [max(exact(one)) for one in seeds],
            "MSE, lowest": [min(errors(one)) for one in seeds],
            "MSE, highest": [max(errors(one)) for one in seeds],
            "exact match lost by noise in the decoder": lost,
        },
        note=note,
        short=SHORT[name],
    )


def _agreement(seed: Mapping[str, Any]) -> Effect:
    return statistics.rank_correlation([-error for error in errors(seed)], exact(seed))


def _auxiliary(found: Found, name: str) -> list[Finding]:
    plain, aided = ([one["end"] for one in found[run]] for run in ("training", name))
    weight = name.partition("/")[2]
    fell = [a["mse"] / b["mse"] for a, b in zip(aided, plain, strict=True)]
    count = len(statistics.unpack_bits(plain[0]["read"]))
    values = {
        f"{what}, {arm}": [read(one) for one in ends]
        for arm, ends in (("without", plain), ("with", aided))
        for what, read in (
            ("exact match", lambda one: statistics.share(one["read"])),
            ("loss", lambda one: one["read_loss"]),
            ("largest digit", lambda one: statistics.share(one["largest"])),
            ("R-Probe's MSE", lambda one: one["mse"]),
        )
    } | {"time of a step, ratio": [one["step_time_ratio"] for one in found[name]]}
    control = "the loss must do what it says: R-Probe's error, by a probe made anew, lower than without it in all seeds"
    same: dict[str, Any] = {
        "source": "Detached Skip-Links and R-Probe, Table 4",
        "control": control,
        "passed": max(fell) < 1,
        "values": values,
    }
    steps = found[name][0]["steps"]
    return [
        Finding(
            f"R-Probe as an auxiliary loss (lambda {weight}) improves reading at equal steps",
            measured=f"exact match with it - without, same {count} held-out images, {steps} steps on equal batches",
            effect=tuple(statistics.paired(a["read"], b["read"]) for a, b in zip(aided, plain, strict=True)),
            short=f"auxiliary R-Probe (lambda {weight}) helps reading",
            **same,
        ),
        Finding(
            f"The auxiliary loss (lambda {weight}) costs answers that take a thought more",
            measured=f"largest digit right without it - with it, same {count} held-out images, {steps} steps",
            effect=tuple(statistics.paired(a["largest"], b["largest"]) for a, b in zip(plain, aided, strict=True)),
            **same,
        ),
    ]


def figures(found: Found) -> dict[str, Any]:
    """Exact match against the error, a line a seed; and the auxiliary loss's ends."""
    figure, axes = panels(1, 3)
    titles = {
        "training": "one training",
        "damage/tower": "noise in the tower",
        "damage/decoder": "noise in the decoder",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for colour, one in zip((IMAGE, TEXT, SPLIT, OTHER), found[name], strict=False):
            axis.plot(errors(one), exact(one), "o-", ms=3, lw=0.8, color=colour)
        axis.set_title(title)
        axis.set_xlabel("R-Probe's held-out MSE")
        axis.set_ylim(-0.03, 1.03)
    for name, marker in (("auxiliary/0.1", "^"), ("auxiliary/1", "s")):
        ends = _ends(found, name)
        axes[0].plot([one["mse"] for one in ends], [statistics.share(one["read"]) for one in ends], marker, ms=5,
                     color="black", fillstyle="none", ls="", label=f"lambda {name.partition('/')[2]}, end")  # fmt: skip
        if ends:
            axes[0].legend()
    axes[0].set_ylabel("exact match, held-out strings")
    return {"rprobe_against_reading": figure}


def _ends(found: Found, name: str) -> Sequence[Mapping[str, Any]]:
    return [one["end"] for one in found[name]] if name in found else []
