"""Settings of the saturation measurement, what it found, and several results side by side."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from llava_patch.measurements.base import Comparison, Result, decode, decode_fields, differences, encode
from llava_patch.measurements.saturation import recommend
from llava_patch.settings.checks import integer, number, refused


@dataclass(frozen=True)
class Saturation:
    """Settings of the saturation measurement; the defaults are this project's choice unless a source is named.

    Attributes:
        transition_share: the transition layer is where the logit-lens KL has fallen to this share of layer 0's.
        mass_tolerance: attention mass has settled when it stays within this share of its deep median.
        fall_share: the deep median must have fallen to this share of the highest mass, or mass has no say.
        knockout: also measure what the answers lose when text stops reading the image at a layer, see
            `measurements.saturation.knockout`: a batch of text positions through the decoder beside each sample's pass.
            None: yes, but for the lmms-eval task, which takes as long as it always has.
        knockout_share: answers count as kept where their KL is at most this share of what it is without any image.
        vtw_threshold: VTW's search takes the first layer whose KL is at most this, in nats. Its repository has 0.003
            for LLaVA-1.5 7B and models that it does not know, 0.0005 for 13B and 0.0001 for LLaVA-1.6 7B.
        vtw_first: the layer at which VTW's search begins, as in its repository.
        max_samples: stop after so many usable samples; None: take all (the command takes 32).
        chunk: attention queries, and positions of the logit lens, held at a time (memory against speed).
        save_every: samples between two writes of the state from which an interrupted run goes on.
    """

    transition_share: float = 0.5
    mass_tolerance: float = 0.2
    fall_share: float = 0.5
    knockout: bool | None = None
    knockout_share: float = 0.05
    vtw_threshold: float = 0.003
    vtw_first: int = 5
    max_samples: int | None = None
    chunk: int = 128
    save_every: int = 8

    def __post_init__(self) -> None:
        if self.knockout is not None and not isinstance(self.knockout, bool):
            raise refused("Saturation", "knockout", self.knockout, "True, False or None")
        for name in ("transition_share", "mass_tolerance", "fall_share", "knockout_share"):
            number("Saturation", name, getattr(self, name), above=0, below=1)
        number("Saturation", "vtw_threshold", self.vtw_threshold, above=0)
        integer("Saturation", "vtw_first", self.vtw_first, 0)
        for name in ("max_samples", "chunk", "save_every"):
            if name != "max_samples" or self.max_samples is not None:
                integer("Saturation", name, getattr(self, name), 1)


DEFAULTS = Saturation()
SQUARES = {"withdrawn_kl": "withdrawn_square", "fused_kl": "fused_square"}
"""Names of the curves' squares, from whose means the standard error of what answers lose follows."""
KNOCKOUT = ("withdrawn_kl", "withdrawn_kept", "fused_kl", "fused_kept", "vtw_kl", *SQUARES.values())
"""The curves that `Saturation.knockout` asks for."""
LATER = ("peak", "answer_kl", *KNOCKOUT)
"""The curves that results of earlier versions lack."""


@dataclass(frozen=True)
class Curves:
    """Per-layer values of one sample, or the mean over samples, by layer number; NaN where positions are absent."""

    image_cosine: list[float]  # between a layer's input and output, mean over image positions
    text_cosine: list[float]  # the same over text positions (everything that is not image)
    head_mass: list[list[float]]  # [layers][heads], attention probability that text behind the image puts on image keys
    image_kl: list[float]  # KL(final || layer) of the logit lens in nats, mean over image positions
    text_kl: list[float]  # the same over text positions
    image_states: list[float]  # number of image positions that have hidden states in a layer
    # Number of image positions that a layer's queries can look at: keys without states in the KV variant's deep layers,
    # the ones that are kept in pruned layers.
    image_keys: list[float]
    # Largest attention probability of a position that is read on one image key: of the head that has most. This and
    # what follows came later than the curves above: NaN in earlier results, and where it was not asked for.
    peak: list[float] = field(default_factory=list)
    answer_kl: list[float] = field(default_factory=list)  # the logit lens's KL at the positions that are read
    # What the answers lose when text reads no image from a layer on, see `knockout.Knockout`: KL to the stock answer in
    # nats, and the share whose most probable token stays; `fused`, where the last layer sees the image again.
    withdrawn_kl: list[float] = field(default_factory=list)
    withdrawn_kept: list[float] = field(default_factory=list)
    fused_kl: list[float] = field(default_factory=list)
    fused_kept: list[float] = field(default_factory=list)
    vtw_kl: list[float] = field(default_factory=list)  # what VTW's own search goes by
    withdrawn_square: list[float] = field(default_factory=list)  # of `withdrawn_kl`, sample by sample
    fused_square: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in LATER:
            if not getattr(self, name):
                object.__setattr__(self, name, [math.nan] * len(self.image_cosine))

    @property
    def knocked_out(self) -> bool:
        """Whether it was measured what the answers lose without the image."""
        return bool(self.withdrawn_kl) and not math.isnan(self.withdrawn_kl[0])

    @property
    def mass(self) -> list[float]:
        """Attention mass per layer, mean over heads."""
        return [sum(heads) / len(heads) for heads in self.head_mass]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Curves":
        """Read curves from JSON values, where null is NaN; KeyError, TypeError or ValueError when they are damaged."""
        curves: Curves = decode_fields(cls, values, others=True)
        lengths = {len(curve) for curve in vars(curves).values()}
        if len(lengths) != 1 or 0 in lengths or not all(curves.head_mass):
            raise ValueError(f"curves over {sorted(lengths)} layers")
        return curves

    @property
    def image_present(self) -> list[bool]:
        """Whether each layer has hidden states of image positions."""
        return [not math.isnan(value) for value in self.image_cosine]


@dataclass(frozen=True)
class PatchOn:
    """What a patch on the measured model does to its image positions."""

    split: int | None  # the layer at which image tokens leave the decoder; None: they stay
    prune_at: int | None  # the first layer without pruned image tokens; None: nothing is pruned
    words: str  # what the model is, such as "routed (lf, split 4)"


@dataclass(frozen=True)
class SaturationResult(Result):
    """What was measured; what follows from it are properties."""

    NAME = TITLE = "saturation"
    FIGURE = "llava_patch.measurements.saturation.figure:saturation_figure"

    curves: Curves  # mean over samples, each of which counts the same
    samples: int  # how many were measured
    skipped: dict[str, int] = field(default_factory=dict)  # how many were left out, by reason
    settings: Saturation = field(default_factory=Saturation)
    patch: PatchOn | None = None  # what a routing or pruning patch on the model does; None: the stock decoder

    @property
    def n_layers(self) -> int:
        """Number L of decoder layers."""
        return len(self.curves.image_cosine)

    @cached_property
    def recommendation(self) -> recommend.Recommendation:
        """The split of LF and why: by what the answers lose, where it was measured, else as `passive`."""
        return self.recommend_for(late_fusion=True)

    def errors(self, name: str) -> list[float]:
        """Two standard errors over samples of `withdrawn_kl` or `fused_kl`, by split; NaN where they are not known."""
        if self.samples < 2:
            return [math.nan] * self.n_layers
        pairs = zip(getattr(self.curves, name), getattr(self.curves, SQUARES[name]), strict=True)
        return [2 * math.sqrt(max(square - mean**2, 0.0) / (self.samples - 1)) for mean, square in pairs]

    def split_interval(self) -> tuple[int | None, int | None] | None:
        """First and last split of LF that the answers allow within two standard errors over samples.

        A bound is None where no split is left; the whole is None where answers do not decide, or of one sample.
        """
        losses, errors = self.curves.fused_kl, self.errors("fused_kl")
        if not self._answers_decide or math.isnan(errors[0]):
            return None
        allowed = self.settings.knockout_share * self.curves.withdrawn_kl[0]
        bounds = ([v + sign * e for v, e in zip(losses, errors, strict=True)] for sign in (-1, 1))
        found = [recommend.kept_from(values, allowed) for values in bounds]
        low, high = (None if split is None or split > self.n_layers - 2 else split for split in found)
        return low, high

    @property
    def _answers_decide(self) -> bool:
        """Whether it was measured what the answers lose, and they lose enough without any image to say anything."""
        knocked = self.patch is None and self.curves.knocked_out
        return knocked and self.curves.withdrawn_kl[0] >= recommend.LEAST_LOSS

    def finding(self) -> str:
        """Which split to take, that there is none, or that these samples do not say."""
        split = self.recommended_split
        if self.patch is not None:
            return f"Nothing is left to decide: the model is {self.patch.words}; measure the stock one for a split."
        if not self._answers_decide:
            others = "name no split" if split is None else f"by themselves name split {split}"
            why = "what the answers lose without the image was not measured (Saturation.knockout)"
            if self.curves.knocked_out:
                why = "the answers hardly change without any image: take samples whose answers need it"
            return f"Undecided: {why}; attention mass and logit lens {others}."
        interval = self.split_interval()
        if split is None and interval is not None and interval[0] is not None:
            return (
                "Undecided: the answers seem to need the image to the last layers, but within two standard errors "
                f"split {interval[0]} keeps them: take more samples."
            )
        if split is None:
            return "Not saturated: the answers need the image to the last layers, so no split keeps them."
        if interval is not None and interval[1] is None:
            return (
                f"Undecided: these samples say split {split}, but within two standard errors no split keeps the "
                "answers: take more samples."
            )
        return (
            f"Saturated from layer {split} of {self.n_layers} on: take Routing.split = {split}, from where the answers "
            "lose hardly anything without the image."
        )

    def caution(self) -> str:
        """For what the split holds."""
        if self.patch is not None or self.recommended_split is None:
            return ""
        return (
            f"The split holds for questions like these {self.samples}; others may need the image longer. It takes for "
            "granted that the side branch learns what the layers did to the image, which only training shows."
        )

    def _spread(self) -> str:
        """What the answers lose at the split, with its interval; nothing where it was not measured."""
        split = self.recommended_split
        if split is None or not self._answers_decide:
            return ""
        lost = f" At split {split} the answers lose {self.curves.fused_kl[split]:.3g}"
        interval = self.split_interval()
        if interval is None:
            return f"{lost} nats (one sample has no interval)."
        low, high = ("none" if bound is None else str(bound) for bound in interval)
        where = f"the split is {low} to {high}" if low != high else f"the split stays {low}"
        return f"{lost} ± {self.errors('fused_kl')[split]:.2g} nats (two standard errors); within that {where}."

    def recommend_for(self, late_fusion: bool) -> recommend.Recommendation:
        """The split of a variant whose last layer sees the image again (LF), or of one without that."""
        if self.patch is not None or not self.curves.knocked_out:
            return self.passive
        c = self.curves
        return recommend.recommend_by_answers(c.withdrawn_kl, c.fused_kl, self.settings, late_fusion, self.passive)

    @property
    def vtw(self) -> recommend.Recommendation:
        """The split that VTW's own search finds."""
        if self.patch is not None:
            return self.passive
        return recommend.recommend_vtw(self.curves.vtw_kl, self.settings)

    @cached_property
    def passive(self) -> recommend.Recommendation:
        """What attention mass and logit lens alone recommend."""
        c, patched = self.curves, "" if self.patch is None else self.patch.words
        return recommend.recommend(c.mass, c.image_kl, c.image_cosine, c.image_present, self.settings, patched)

    @property
    def image_transition(self) -> int | None:
        """Transition layer at image positions or None, see `recommend.transition_layer`."""
        return recommend.transition_layer(self.curves.image_kl, self.settings.transition_share)

    @property
    def text_transition(self) -> int | None:
        """The same at text positions."""
        return recommend.transition_layer(self.curves.text_kl, self.settings.transition_share)

    @property
    def recommended_split(self) -> int | None:
        """First layer of the window, or None (see `recommendation.reason`)."""
        return self.recommendation.split

    @property
    def split(self) -> int | None:
        """The measured model's own split; None on a model that is not routed."""
        return None if self.patch is None else self.patch.split

    @property
    def deep_mass(self) -> float:
        """Median attention mass of the deep layers, see `recommend.deep_median`."""
        return recommend.deep_median(self.curves.mass)

    def depth_percent(self, layer: int | None) -> float | None:
        """A layer number as percent of the decoder's depth."""
        return None if layer is None else 100.0 * layer / self.n_layers

    def worded(self, layer: int | None) -> str:
        """A layer number with its percentage, such as "18 (56 %)"; "none" where there is none."""
        return "none" if layer is None else f"{layer} ({self.depth_percent(layer):.0f} %)"

    def summary(self) -> str:
        """What was found, in a few lines of plain text."""
        samples = f"{self.samples} sample" + "s" * (self.samples != 1)
        if self.recommendation.window is not None:
            first, last = self.recommendation.window
            split = self.worded(self.recommended_split)
            head = f"Recommended split: layer {split} of {self.n_layers}, window {first}..{last}"
        else:
            head = "No split is recommended"
        image = self.worded(self.image_transition)
        if self.image_transition is None and self.image_leaves is not None:
            image += f" (not reached before the image leaves at layer {self.image_leaves})"
        return (
            f"{head} ({samples}): {self.recommendation.reason}. Attention mass on the image is "
            f"{self.curves.mass[0]:.3g} at layer 0 and {self.deep_mass:.3g} in the deep median; transition layers: "
            f"image {image}, text {self.worded(self.text_transition)}.{self._spread()}"
        )

    @property
    def image_leaves(self) -> int | None:
        """First layer without hidden states of image positions, or None when all layers have them."""
        return recommend.absent_from(self.curves.image_kl)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(head, rows): the curves, a line a layer."""
        c = self.curves
        head = ["layer", "image tokens", "cosine image", "text", "mass", "highest head", "KL image", "text"]
        columns = [c.image_cosine, c.text_cosine, c.mass, map(max, c.head_mass), c.image_kl, c.text_kl]
        if not math.isnan(c.peak[0]):
            head += ["one patch", "KL answer"]
            columns += [c.peak, c.answer_kl]
        if c.knocked_out:
            head += ["lost", "lost (fused)"]
            columns += [c.withdrawn_kl, c.fused_kl]
        rows = [
            [str(i), f"{keys:g}", *("-" if math.isnan(v) else f"{v:.3g}" for v in values)]
            for i, (keys, *values) in enumerate(zip(c.image_keys, *columns, strict=True))
        ]
        return head, rows

    def encode(self) -> dict[str, Any]:
        """The curves, what follows from them in words of its own, and the rest."""
        window = self.recommendation.window
        return {
            "n_layers": self.n_layers,
            "samples": self.samples,
            "skipped": self.skipped,
            "recommended_split": self.recommended_split,
            "recommended_split_percent": self.depth_percent(self.recommended_split),
            "window": None if window is None else list(window),
            "reason": self.recommendation.reason,
            "split_without_late_fusion": self.recommend_for(late_fusion=False).split,
            "split_by_vtw": self.vtw.split,
            "split_by_mass_and_lens": self.passive.split,
            "image_transition_layer": self.image_transition,
            "image_transition_percent": self.depth_percent(self.image_transition),
            "image_leaves_layer": self.image_leaves,
            "text_transition_layer": self.text_transition,
            "text_transition_percent": self.depth_percent(self.text_transition),
            "patch": encode(self.patch),
            "attention_mass": self.curves.mass,
            **encode(self.curves),
            "settings": encode(self.settings),
            "facts": self.facts,
        }

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "SaturationResult":
        """Read the curves; what follows from them is worked out again."""
        patch = decode(PatchOn | None, values["patch"])
        settings = decode(Saturation, values["settings"])
        curves = Curves.from_dict(values)
        samples, skipped = decode(int, values["samples"]), decode(dict[str, int], values["skipped"])
        return cls(curves, samples, skipped, settings, patch, facts=values["facts"])


def compare(results: Mapping[str, SaturationResult]) -> Comparison:
    """Several results side by side: a line and a colour each.

    In the table, layers are numbers with their percentage of the depth: `image` and `text` are the transition layers,
    `mass 0` and `deep` the attention mass at layer 0 and in the deep median, `own` a patched model's own split. The
    notes say why a model has no recommended split, and what besides the model differs from the first.
    """
    head = ["model", "layers", "split", "window", "image", "text", "mass 0", "deep"]
    own = ["own"] * any(result.split is not None for result in results.values())
    rows, notes = [], []
    base_name, base = next(iter(results.items()))
    for name, result in results.items():
        window = result.recommendation.window
        masses = (f"{mass:.3g}" for mass in (result.curves.mass[0], result.deep_mass))
        layers = [result.recommended_split, result.image_transition, result.text_transition, result.split]
        split, *transitions, own_split = map(result.worded, layers)
        shown = "none" if window is None else f"{window[0]}..{window[1]}"
        rows.append([name, str(result.n_layers), split, shown, *transitions, *masses, *(own_split for _ in own)])
        if window is None:
            notes.append(f"{name}: no split: {result.recommendation.reason}")
        unlike = differences(_conditions(result), _conditions(base), (name, base_name))
        notes += [] if unlike is None else [unlike]
    title = "Recommended split, window, image and text transition; attention mass"
    figure = "llava_patch.measurements.saturation.figure:comparison_figure"
    return Comparison(results, head + own, rows, notes, figure, title)


def _conditions(result: SaturationResult) -> dict[str, Any]:
    """What else than the model changes the numbers."""
    settings = {k: v for k, v in asdict(result.settings).items() if k not in ("save_every", "max_samples", "chunk")}
    facts = {name: result.facts.get(name) for name in ("data", "question", "dtype")}
    return {**settings, **facts, "samples": result.samples}
