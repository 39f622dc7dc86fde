"""Which signal finds the layer from which the image is no longer needed, and what is recommended by it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llava_patch.core import plotting
from llava_patch.measurements.saturation.recommend import kept_from
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Effect, Finding, Found

TITLE = "Saturation: where the image is no longer needed"
ABOUT = (
    "Decoders of 8 layers that answer questions of two steps, each a look at the picture. Four were trained with the "
    "image hidden from layer 2, 4 or 6 on, or from all of the middle so that the last layer must read (8): it is known "
    "where the last look may be. What each needs is then measured on the unmasked model: VTW at every split, 256 "
    "held-out pictures. Every saturation signal is asked for the same layer on 32 other pictures, with 4 words of text "
    "before the image and with 40. A question of one step needs the first look only, in the same decoder and with the "
    "same image states."
)
LAYERS = 8
MIDDLE = LAYERS // 2
LOST = 0.02
GATE = 0.9
CHANCE = 1 / 8  # patches that show a pair
PLANTED = {"cut2": 2, "cut4": 4, "cut6": 6, "cut8": 8}
BASES = ("early", "late", "turned")
SHORT, LONG = "2 steps, 4 words", "2 steps, 40 words"
GRID = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CAUSAL = "what the answers lose"


@dataclass(frozen=True)
class Signal:
    """A curve over the layers that falls, and the share of its highest value at which it counts as fallen."""

    name: str
    curve: Callable[[dict[str, list[float]]], list[float]]
    share: float = 0.5
    source: str = "DPVR, section 3.1"

    def place(self, look: "Look", share: float | None = None) -> int:
        """The first layer from which it stays down; the number of layers where there is none."""
        curve = self.curve(look.data["curves"])
        found = kept_from(curve, (self.share if share is None else share) * max(curve))
        return LAYERS if found is None else found


SIGNALS = (
    Signal("attention mass", lambda curves: curves["mass"]),
    Signal("the image states' turning (1 - cosine)", lambda curves: [1 - value for value in curves["image_cosine"]]),
    Signal("the image's logit lens", lambda curves: curves["image_kl"]),
    Signal("the largest weight on one patch", lambda curves: curves["peak"], source="theory: a further signal"),
    Signal("the answer's logit lens", lambda curves: curves["answer_kl"], source="theory: a further signal"),
    Signal(CAUSAL, lambda curves: curves["withdrawn_kl"], 0.05, "VTW, asked at every split"),
)


@dataclass(frozen=True)
class Look:
    """One base under one kind of question."""

    base: str
    kind: str
    data: dict[str, Any]

    @cached_property
    def stock(self) -> float:
        """Share of right answers of the unrouted model."""
        return statistics.share(self.data["stock"])

    @cached_property
    def truths(self) -> dict[str, int]:
        """The first split of each sweep from which accuracy stays within `LOST` of stock's; one behind it if none."""
        found = {}
        for variant in ("vtw", "lf"):
            lost = [self.stock - statistics.share(rows) for rows in self.data[variant]]
            first = kept_from(lost, LOST)
            found[variant] = len(lost) if first is None else first
        return found

    def truth(self, variant: str = "vtw") -> int:
        """One of `truths`."""
        return self.truths[variant]


def findings(found: Found) -> list[Finding]:
    """The cuts, each signal, long text, what is recommended, and late fusion."""
    seeds = looks(found)
    gate = _gate(seeds)
    return [
        _cuts(seeds, gate),
        *(_signal(signal, seeds, gate) for signal in SIGNALS),
        _long_text(seeds, gate),
        _recommended(seeds, gate),
        _late_fusion(seeds),
        *([_fusion_attention(found)] if "fusion/late" in found and "fusion/early" in found else []),
    ]


def looks(found: Found) -> list[list[Look]]:
    """All looks of each seed; bases that routing has not trained are left out."""
    # Full names: a base has its own run in the routing study.
    full = {name: f"saturation/{name}" for name in (*PLANTED, *BASES)}
    names = [name for name in full if name in PLANTED or full[name] in found]
    runs = {name: found[full[name]] for name in names}
    count = min(map(len, runs.values()))
    return [
        [Look(name, kind, data) for name in names for kind, data in runs[name][seed]["looks"].items()]
        for seed in range(count)
    ]


def _gate(seeds: Sequence[Sequence[Look]]) -> str:
    low = min((look for row in seeds for look in row if look.base in PLANTED), key=lambda look: look.stock)
    return "" if low.stock >= GATE else f"{low.base} answers {low.stock:.0%} of {low.kind} (less than {GATE:.0%})"


def _gain(pairs: Iterable[tuple[int, int]]) -> Effect:
    """By how many layers (placed, truth) is nearer than a guess at the middle."""
    return statistics.mean([abs(MIDDLE - truth) - abs(placed - truth) for placed, truth in pairs])


def _error(pairs: Iterable[tuple[int, int]]) -> float:
    return float(np.mean([abs(placed - truth) for placed, truth in pairs]))


def _near(pairs: Iterable[tuple[int, int]]) -> float:
    return float(np.mean([abs(placed - truth) <= 1 for placed, truth in pairs]))


def _causal() -> Signal:
    return next(signal for signal in SIGNALS if signal.name == CAUSAL)


def _cuts(seeds: Sequence[Sequence[Look]], gate: str) -> Finding:
    deep = [[look for look in row if look.base in PLANTED and look.kind != "1 steps, 4 words"] for row in seeds]
    once = [look for row in seeds for look in row if PLANTED.get(look.base, 0) > 2 and look.kind == "1 steps, 4 words"]
    planted = [[(_causal().place(look), PLANTED[look.base]) for look in row] for row in deep]
    return Finding(
        "A decoder whose deep layers learned without the image is placed where it was cut, by what its answers lose",
        "theory: planted",
        "layers by which the placement is nearer to the cut than a guess at the middle; mean of four cuts, short and "
        "long text",
        tuple(_gain(row) for row in planted),
        "the sweep itself must find the cut (within a layer), and questions of one step in the same decoders must be "
        "placed below layer 3",
        all(abs(look.truth() - PLANTED[look.base]) <= 1 for row in deep for look in row)
        and all(_causal().place(look) < 3 for look in once),
        gate,
        values={
            "error in layers": [_error(row) for row in planted],
            "VTW sweep's own distance to the cut": [
                _error((look.truth(), PLANTED[look.base]) for look in row) for row in deep
            ],
        },
        short="saturation finds the planted cut",
    )


def _signal(signal: Signal, seeds: Sequence[Sequence[Look]], gate: str) -> Finding:
    pairs = [[(signal.place(look), look.truth()) for look in row] for row in seeds]
    tuned = [_error((signal.place(look, _best(signal, seeds, seed)), look.truth()) for look in row)
             for seed, row in enumerate(seeds)]  # fmt: skip
    guess = [_error((MIDDLE, look.truth()) for look in row) for row in seeds]
    causal = [[(_causal().place(look), look.truth()) for look in row] for row in seeds]
    constant = signal.name in ("the image's logit lens", "the image states' turning (1 - cosine)")
    return Finding(
        f"By itself, {signal.name} says from which layer on the image is no longer needed",
        signal.source,
        f"layers by which it is nearer to the VTW sweep than a guess at the middle (fallen: at most {signal.share:g} "
        f"of its highest value); mean of {len(seeds[0])} pairs of base and question",
        tuple(_gain(row) for row in pairs),
        "a signal that does find it, on the same samples: what the answers lose must be within a layer",
        all(_near(row) == 1 for row in causal),
        gate,
        values={
            "error in layers": [_error(row) for row in pairs],
            "with the share that is best on other seeds": tuned,
            "of the guess": guess,
            "share within a layer": [_near(row) for row in pairs],
        },
        note="It is a function of the picture alone and cannot know what is asked." if constant else "",
    )


def _best(signal: Signal, seeds: Sequence[Sequence[Look]], without: int) -> float:
    """The share of the grid with the least error on the other seeds (on its own where there is but one)."""
    others = [look for seed, row in enumerate(seeds) for look in row if seed != without or len(seeds) == 1]
    return min(GRID, key=lambda share: _error((signal.place(look, share), look.truth()) for look in others))


def _long_text(seeds: Sequence[Sequence[Look]], gate: str) -> Finding:
    mass = SIGNALS[0]
    both = [[[look for look in row if look.kind == kind] for kind in (LONG, SHORT)] for row in seeds]
    errors = [[[abs(mass.place(look) - look.truth()) for look in part] for part in row] for row in both]
    deep = [[float(np.mean([look.data["curves"]["mass"][-2] for look in part])) for part in row] for row in both]
    return Finding(
        "With long text before the image, attention mass falls where the image is no longer needed",
        "DPVR, figure 2",
        "layers by which it is nearer to the VTW sweep with 40 words before the image than with 4; mean of the bases",
        tuple(statistics.mean(np.array(short) - np.array(long)) for long, short in errors),
        "mass must be free to fall: in the last layer but one it is lower with 40 words than with 4",
        all(long < short for long, short in deep),
        gate,
        values={
            "error in layers, 40 words": [float(np.mean(long)) for long, _ in errors],
            "error in layers, 4 words": [float(np.mean(short)) for _, short in errors],
            "mass in the last layer but one, 40 words": [long for long, _ in deep],
            "mass in the last layer but one, 4 words": [short for _, short in deep],
        },
    )


def _recommended(seeds: Sequence[Sequence[Look]], gate: str) -> Finding:
    def right(look: Look, way: str) -> float:
        split = look.data["recommended"][way]
        # LF at the last split that it has (here L - 1) saves nothing: "none" is then the right answer.
        truth = look.truth("lf")
        return float(truth == LAYERS - 1 if split is None else abs(split - truth) <= 1)

    new, old = ([[right(look, way) for look in row] for row in seeds] for way in ("lf", "passive"))
    return Finding(
        'The recommended split, and Routing(split="auto"), is where LF keeps its answers',
        "DPVR, section 4.4",
        "share of recommendations within a layer of the first split at which untrained LF keeps stock's accuracy, "
        "minus the share by attention mass and logit lens alone",
        tuple(statistics.mean(np.array(a) - np.array(b)) for a, b in zip(new, old, strict=True)),
        "the splits of the sweep must differ by three layers or more from base to base, or any constant would do",
        all(max(look.truth("lf") for look in row) - min(look.truth("lf") for look in row) >= 3 for row in seeds),
        gate,
        values={
            "by what the answers lose": [float(np.mean(row)) for row in new],
            "by mass and logit lens": [float(np.mean(row)) for row in old],
            "points that untrained LF loses there": [float(np.mean([_points(look) for look in row])) for row in seeds],
            "no split at all by mass and logit lens": [
                float(np.mean([look.data["recommended"]["passive"] is None for look in row])) for row in seeds
            ],
        },
        note="What is measured is an LF whose side branch does what the layers did: in the base turned, whose middle "
        "layers change what the last one reads, only a trained side branch can be that, and untrained LF is not.",
        short="the recommended split is where LF keeps its answers, not where mass falls",
    )


def _points(look: Look) -> float:
    """Accuracy that untrained LF loses at the recommended split, in points of 100; 0 where none is recommended."""
    split = look.data["recommended"]["lf"]
    return 0.0 if split is None else 100 * (look.stock - statistics.share(look.data["lf"][split]))


def _late_fusion(seeds: Sequence[Sequence[Look]]) -> Finding:
    last = [next(look for look in row if (look.base, look.kind) == ("cut8", SHORT)) for row in seeds]
    early = [next(look for look in row if (look.base, look.kind) == ("cut4", SHORT)) for row in seeds]

    def gap(look: Look, split: int) -> Effect:
        return statistics.paired(look.data["lf"][split], look.data["vtw"][split])

    splits = [look.data["recommended"]["lf"] for look in last]
    low = min(look.stock for look in last)
    return Finding(
        "Where the last layer reads, LF splits below what VTW can bear",
        "DPVR, section 3.2",
        "right answers of untrained LF minus VTW's at the split that is recommended for LF; decoder whose last layer "
        "reads, two steps, 256 pictures",
        tuple(gap(look, MIDDLE if split is None else split) for look, split in zip(last, splits, strict=True)),
        "in the decoder cut at 4 LF must gain nothing over VTW (5 points) at split 2, below its last look",
        all(gap(look, 2).value < 0.05 for look in early),
        "" if low >= GATE and None not in splits else f"stock answers {low:.0%}; splits {splits}",
        least=0.1,
        values={
            "recommended split": [float("nan") if split is None else float(split) for split in splits],
            "stock": [look.stock for look in last],
        },
    )


def _fusion_attention(found: Found) -> Finding:
    late, early = found["fusion/late"], found["fusion/early"]

    def above(run: dict[str, Any]) -> Effect:
        one = statistics.proportion(run["found"])
        return Effect(one.value - CHANCE, one.low - CHANCE, one.high - CHANCE)

    return Finding(
        "Where LF's fusion layer must read, its attention is on the patch that the answer is in",
        "DPVR, section 3.2",
        "share of questions whose most attended patch in the fusion layer is the one that the second step looks for, "
        "minus chance (1 of 8 patches with letters); 128 pictures, untrained LF, split 4",
        tuple(above(run) for run in late),
        "in the decoder cut at 4, whose last layer reads nothing, the patch is found in less than half as many",
        all(
            a["found"] and statistics.share(b["found"]) < statistics.share(a["found"]) / 2
            for a, b in zip(late, early, strict=True)
        ),
        least=0.25,
        values={
            "found": [statistics.share(run["found"]) for run in late],
            "found, cut at 4": [statistics.share(run["found"]) for run in early],
            "mass of the best head": [max(run["mass"]) for run in late],
            "mass of the best head, cut at 4": [max(run["mass"]) for run in early],
            "largest head's weight on the patch": [float(np.mean(run["weight"])) for run in late],
            "largest head's weight on the patch, cut at 4": [float(np.mean(run["weight"])) for run in early],
        },
        short="LF's fusion layer reads where it must",
    )


COLOURS = (plotting.IMAGE, "#dd8452", plotting.OTHER, "#64b5cd", "#937860", plotting.TEXT)


def figures(found: Found) -> dict[str, Any]:
    """Every signal over the layers, a panel a base, with the sweep's own answer."""
    seeds = looks(found)
    names = list(dict.fromkeys(look.base for look in seeds[0]))
    figure, axes = plotting.panel_grid(len(names))
    for name, axis in zip(names, axes, strict=True):
        of_base = [look for row in seeds for look in row if (look.base, look.kind) == (name, SHORT)]
        for signal, color in zip(SIGNALS, COLOURS, strict=True):
            curves = np.array([signal.curve(look.data["curves"]) for look in of_base])
            curves = curves / curves.max(1, keepdims=True)
            axis.plot(curves.mean(0), color=color, marker="o", ms=2.5, label=signal.name,
                      lw=2.2 if signal.name == CAUSAL else 1.0)  # fmt: skip
        for look in of_base:
            axis.axvline(
                look.truth() - 0.5, color=plotting.SPLIT, ls="--", lw=1.0, label="VTW keeps accuracy from here"
            )
        plotting.layer_axis(axis, LAYERS)
        title = f"image hidden from layer {PLANTED[name]} on" if name in PLANTED else f"{name} base"
        axis.set(title="last layer must read" if name == "cut8" else title, ylim=(0, 1.05), ylabel="share of highest")
    unique = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)
    figure.suptitle("Saturation signals, questions of two steps (mean of seeds)", fontsize=plotting.TITLE)
    return {"signals": figure}
