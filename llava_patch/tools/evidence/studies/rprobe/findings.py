"""What R-Probe's positive controls say."""

from collections.abc import Mapping, Sequence
from typing import Any

from llava_patch.core.plotting import IMAGE, OTHER, SPLIT, TEXT, panels
from llava_patch.measurements.rprobe.ablation import VARIANTS
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Effect, Finding, Found
from llava_patch.tools.evidence.small.probing import rises

TITLE = "R-Probe sees what is planted"
ABOUT = (
    "A model of 0.9 million parameters that reads strings of three digits (tower of 8 blocks, 16 image tokens, Llama "
    "of 4 layers). R-Probe rebuilds pages whose region is decided by its text wholly (`fixed`: four digits, nothing "
    "else varies) or but for the ink (`small_ink`: eight digits that are too small for the tower, ink varied). If it "
    "were blind to text or to the region, the four settings of the modality ablation would not differ; if it were "
    "blind to the features, damage to them would not move its error."
)
TABLE = "Detached Skip-Links and R-Probe, Table 5"
READS = 0.85
NOTHING_TO_SEE = 0.95  # FVU above which a probe knows nothing
BLIND = 0.25
_NAMES = {
    "masked_without_text": "masked, no text",
    "masked_with_text": "masked, text",
    "full_without_text": "seen, no text",
    "full_with_text": "seen, text",
}


def findings(found: Found) -> list[Finding]:
    """The order of the four settings, the order of planted damage, and what shallow taps add."""
    every: list[Finding] = []
    if "ablation/small_ink" in found:
        every += _order(found["ablation/small_ink"], _gate(found))
    if "ablation/fixed" in found:
        every.append(_decided_by_text(found["ablation/fixed"]))
    if "damage" in found:
        every += _damage(found["damage"])
    if all(f"taps/{arm}" in found for arm in ("none", "taps", "other_image")):
        every.append(_taps(found))
    return every


DAMAGES = {
    "blurred": "features blurred", "dropped_0.25": "a quarter of the tokens dropped", "dropped_0.5": "half, further",
}  # fmt: skip


def _gate(found: Found) -> str:
    read = [statistics.share(one["held"]) for one in found["reader"]]
    return "" if min(read) >= READS else f"the model reads {min(read):.2f} of held-out strings, under {READS}"


def _order(seeds: Sequence[Mapping[str, Any]], gate: str) -> list[Finding]:
    names = list(VARIANTS)
    claims = (
        (
            "Where the region is masked, its text lowers R-Probe's error",
            "R-Probe: text helps where the region is masked",
        ),
        (
            "The region without text is worth more than the text without region",
            "R-Probe: the region without text beats the text without region",
        ),
        ("Where the region is seen, its text lowers R-Probe's error further", "R-Probe: text helps where it is seen"),
    )
    unseen = [one["masked_without_text"]["fvu"] for one in seeds]
    count = len(seeds[0][names[0]]["errors"].split())
    values = {f"MSE {_NAMES[name]}": [one[name]["mse"] for one in seeds] for name in names}
    return [
        Finding(
            claim,
            TABLE,
            f"held-out MSE ({_NAMES[more]}) - MSE ({_NAMES[less]}), `small_ink`, {count} pages a seed",
            tuple(rises(one[more], one[less]) for one in seeds),
            f"masked and without text there is nothing to know: FVU must stay above {NOTHING_TO_SEE}",
            min(unseen) > NOTHING_TO_SEE,
            gate=gate,
            values=values | {"FVU masked, no text": unseen},
            note="pages made so that text helps: it does not where fonts or places vary that the text does not tell",
            short=short,
        )
        for (claim, short), more, less in zip(claims, names, names[1:], strict=False)
    ]


def _decided_by_text(seeds: Sequence[Mapping[str, Any]]) -> Finding:
    unseen = [one["masked_without_text"]["fvu"] for one in seeds]
    names = {f"MSE {_NAMES[name]}": [one[name]["mse"] for one in seeds] for name in VARIANTS}
    return Finding(
        "Where the text decides every pixel, R-Probe rebuilds a masked region from its text alone",
        TABLE,
        "share of the masked region's variance that the text explains, 1 - MSE (masked, text) / MSE (masked, no text), "
        f"`fixed`, {len(seeds[0]['masked_with_text']['errors'].split())} pages a seed",
        tuple(_explained(one["masked_with_text"], one["masked_without_text"]) for one in seeds),
        f"without text the masked region must stay unknown (FVU above {NOTHING_TO_SEE})",
        min(unseen) > NOTHING_TO_SEE,
        least=0.9,
        values=names | {"FVU masked, no text": unseen},
        short="R-Probe rebuilds a masked region from its text alone",
    )


def _explained(with_it: Mapping[str, Any], without: Mapping[str, Any]) -> Effect:
    gain = rises(without, with_it)
    return Effect(*(value / without["mse"] for value in (gain.value, gain.low, gain.high)))


def _damage(seeds: Sequence[Mapping[str, Any]]) -> list[Finding]:
    claims = (
        ("Blurred features raise R-Probe's error", "intact", "blurred"),
        ("Dropping a quarter of the tokens raises R-Probe's error", "intact", "dropped_0.25"),
        ("Dropping half of the tokens raises it further than dropping a quarter", "dropped_0.25", "dropped_0.5"),
    )
    values = {f"MSE {name}": [one[name]["mse"] for one in seeds] for name in seeds[0]}
    knows = [one["intact"]["fvu"] for one in seeds]
    return [
        Finding(
            claim,
            "Detached Skip-Links and R-Probe, section 5: the probe measures what tokens keep",
            f"rise of the held-out MSE ({more} - {less}), `small_ink` seen without text, "
            f"{len(seeds[0]['intact']['errors'].split())} pages a seed",
            tuple(rises(one[more], one[less]) for one in seeds),
            "with intact features the probe must know the region (FVU under 0.5), or there is nothing to lose",
            max(knows) < 0.5,
            values=values,
            short=f"R-Probe's error rises: {DAMAGES[more]}",
        )
        for claim, less, more in claims
    ]


def _taps(found: Found) -> Finding:
    none, taps, other = (found[f"taps/{arm}"] for arm in ("none", "taps", "other_image"))
    effect = tuple(rises(a, b) for a, b in zip(none, taps, strict=True))
    control = tuple(rises(a, b) for a, b in zip(none, other, strict=True))
    values = {"none": none, "taps": taps, "other image's taps": other}
    return Finding(
        "Shallow taps lower R-Probe's error",
        "Detached Skip-Links and R-Probe, Table 6",
        "fall of the held-out MSE by taps of blocks 2, 4 and 6, projector made anew and trained for 100 steps in both "
        f"arms, tower and decoder frozen; {len(none[0]['errors'].split())} pages a seed",
        effect,
        f"taps of another image must not lower it by a share of {BLIND} of that",
        all(there.high < BLIND * one.value for there, one in zip(control, effect, strict=True)),
        values={
            **{f"MSE {name}": [one["mse"] for one in arm] for name, arm in values.items()},
            "fall by another image's taps": [one.value for one in control],
        },
        note="says what tokens keep, not what is read: the loss of the projector's training is about the same",
        short="shallow taps lower R-Probe's error",
    )


def figures(found: Found) -> dict[str, Any]:
    """The four settings on both kinds of pages, and damage and taps beside intact features."""
    figure, axes = panels(1, 3)
    for axis, kind in zip(axes, ("small_ink", "fixed"), strict=False):
        _points(axis, [{name: one[name]["mse"] for name in VARIANTS} for one in found[f"ablation/{kind}"]])
        axis.set_title(f"{kind}: the four settings")
    arms = [
        {
            **{name: result["mse"] for name, result in one.items()},
            **{name: found[f"taps/{name}"][seed]["mse"] for name in ("none", "taps", "other_image")},
        }
        for seed, one in enumerate(found["damage"])
    ]
    _points(axes[2], arms)
    axes[2].set_title("damaged features, added taps")
    axes[0].set_ylabel("held-out MSE, a point a seed")
    return {"rprobe_controls": figure}


def _points(axis: Any, seeds: Sequence[Mapping[str, float]]) -> None:
    names = list(seeds[0])
    for number, one in enumerate(seeds):
        for place, name in enumerate(names):
            colour = (IMAGE, TEXT, SPLIT, OTHER)[place % 4]
            axis.plot(place + 0.12 * (number - (len(seeds) - 1) / 2), one[name], "o", ms=4, color=colour)
    labels = {**_NAMES, "dropped_0.25": "drop ¼", "dropped_0.5": "drop ½", "other_image": "other's taps"}
    axis.set_xticks(range(len(names)), [labels.get(name, name) for name in names], rotation=30, ha="right")
    axis.set_yscale("log")
