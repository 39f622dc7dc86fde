"""From saturation curves to transition layers and to a split: mathematics only.

What the answers lose without the image decides where it was measured. Attention mass and the logit lens, which the
paper reads its split from, are what is left elsewhere; beside it they are named, and whether they disagree.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_patch.measurements.saturation.result import Saturation


@dataclass(frozen=True)
class Recommendation:
    """Where image tokens may leave the decoder."""

    reason: str  # a sentence; it says so when the signals disagree
    window: tuple[int, int] | None = None  # first and last layer, both included; None: there is none

    @property
    def split(self) -> int | None:
        """First layer of the window; None when there is no window."""
        return None if self.window is None else self.window[0]


def transition_layer(kl: Sequence[float], share: float) -> int | None:
    """First layer from which the logit-lens KL stays at or below a share of its layer-0 value.

    "Stays" rather than "first touches": one layer's dip must not count as the transition.

    Args:
        kl: KL(final || layer) per layer in nats; NaN where the positions are absent. Only the layers before the first
            absent one count: a routed model shows its last layer the image again, where KL is 0 by definition.
        share: of the layer-0 value.

    Returns:
        None when layer 0 already predicts what the last layer does (KL of 0) or is absent, or when the positions are
        absent before the KL has fallen.
    """
    if not kl or math.isnan(kl[0]) or kl[0] <= 0:
        return None
    followed = kl[: absent_from(kl)]
    above = [layer for layer, value in enumerate(followed) if value > share * kl[0]]
    first = above[-1] + 1 if above else 0
    return first if first < len(followed) else None


def absent_from(kl: Sequence[float]) -> int | None:
    """First layer without these positions (NaN), or None when all layers have them."""
    return next((layer for layer, value in enumerate(kl) if math.isnan(value)), None)


def deep_median(mass: Sequence[float]) -> float:
    """Median attention mass of the deep layers: L/2 .. L-2.

    The second half of the decoder is this project's reading of "deep". The last layer is left out: late-layer fusion
    always shows it the image (K >= 1), so it has no say in where the image may leave, and it is often unlike the rest.
    """
    deep = mass[len(mass) // 2 : -1]
    return statistics.median(deep if deep else mass)


def settled_layer(mass: Sequence[float], tolerance: float) -> int | None:
    """First layer from which attention mass stays within a tolerance of its deep median (the last layer left out)."""
    median = deep_median(mass)
    outside = [i for i, value in enumerate(mass[:-1]) if abs(value - median) > tolerance * median]
    first = outside[-1] + 1 if outside else 0
    return first if first < len(mass) - 1 else None


def recommend(
    mass: Sequence[float],
    image_kl: Sequence[float],
    image_cosine: Sequence[float],
    image_present: Sequence[bool],
    settings: "Saturation",
    patched: str = "",
) -> Recommendation:
    """Recommend a split as a window from where text has stopped reading the image to where the image has stopped.

    The window opens at the first layer from which attention mass stays near its deep median and closes at the image
    transition layer. Mass that is flat from the start says nothing (a small model reads the image to its end), so the
    deep median must also have fallen to `fall_share` of the highest mass.

    The sequences are per layer, as `Curves` has them. `patched` says in words how the model is routed or pruned: its
    curves say nothing about where to split it.
    """
    mass_tolerance, fall_share = settings.mass_tolerance, settings.fall_share
    absent = [layer for layer, present in enumerate(image_present) if not present]
    if patched or absent:
        where = f", and layers {absent[0]}..{absent[-1]} have no image states" if absent else ""
        return Recommendation(f"the model is already {patched or 'routed'}{where}; measure the stock model for a split")
    transition = transition_layer(image_kl, settings.transition_share)
    settled = settled_layer(mass, mass_tolerance)
    median, highest = deep_median(mass), max(mass)
    lens = f"the logit lens has its image transition at layer {transition}"
    if transition is None:
        lens = "the logit lens shows no image transition (KL is 0 from layer 0 on)"
    if median > fall_share * highest:
        return Recommendation(
            f"attention mass does not fall: its deep median {median:.3g} is {median / highest:.0%} of its highest "
            f"value {highest:.3g} (at most {fall_share:.0%} would count); {lens}"
            + ("; the signals disagree" if transition is not None and transition < len(mass) - 1 else "")
        )
    near = f"within {mass_tolerance:.0%} of its deep median {median:.3g}"
    if settled is None:
        return Recommendation(f"attention mass never settles {near}; {lens}")
    if transition is None:
        return Recommendation(f"attention mass settles from layer {settled} on, but {lens}")
    if settled > transition:
        return Recommendation(
            f"the signals disagree: attention mass settles only from layer {settled} on, after the image transition at "
            f"layer {transition}: the window is empty"
        )
    reason = (
        f"attention mass stays {near} from layer {settled} on, and image positions have made their transition by layer "
        f"{transition}"
    )
    before, after = image_cosine[:settled], image_cosine[settled:-1]
    if before and after and statistics.mean(after) < statistics.mean(before):
        reason += (
            f"; the signals disagree in part: image states still turn more after the split (mean cosine "
            f"{statistics.mean(after):.3f}) than before it ({statistics.mean(before):.3f})"
        )
    return Recommendation(reason, (settled, transition))


LEAST_LOSS = 0.01  # nats that answers must lose without any image, or they cannot say where it is needed


def kept_from(kl: Sequence[float], allowed: float) -> int | None:
    """First split from which what the answers lose (nats, per split) stays at most what is allowed, or None."""
    above = [split for split, value in enumerate(kl) if not value <= allowed]
    first = above[-1] + 1 if above else 0
    return first if first < len(kl) else None


def recommend_by_answers(
    withdrawn: Sequence[float],
    fused: Sequence[float],
    settings: "Saturation",
    late_fusion: bool,
    others: Recommendation,
) -> Recommendation:
    """Recommend the first split from which the answers lose hardly anything.

    Args:
        withdrawn: what they lose, in nats per split, when the image leaves for good.
        fused: the same when the last layer sees the image again.
        settings: `knockout_share` of `withdrawn[0]` may be lost.
        late_fusion: whether the model is going to see the image again in its last layer.
        others: what attention mass and logit lens recommend, for the reason.
    """
    scale, last = withdrawn[0], len(withdrawn) - 1
    if scale < LEAST_LOSS:
        return Recommendation(
            f"{others.reason}; the answers have no say, since without any image they lose {scale:.2g} nats only: take "
            "samples whose answers need it",
            others.window,
        )
    alone, again = (kept_from(kl, settings.knockout_share * scale) for kl in (withdrawn, fused))
    first, end = (again, last - 1) if late_fusion else (alone, last)
    when = "text that reads no image from there up to the last layer" if late_fusion else "text that reads no image"
    if first is None or first > end:
        return Recommendation(
            f"the answers need the image to the end: up to split {end} they lose more than "
            f"{settings.knockout_share:.0%} of the {scale:.3g} nats that they lose without any image; {_aside(others)}"
        )
    reason = (
        f"with {when} the answers lose at most {settings.knockout_share:.0%} of the {scale:.3g} nats that they lose "
        f"without any image from split {first} on"
    )
    if late_fusion:
        reason += f" (if the last layer did not see it again: {'from no split' if alone is None else alone} on)"
    disagrees = others.split is not None and others.split != first
    return Recommendation(f"{reason}; {'the signals disagree: ' * disagrees}{_aside(others)}", (first, end))


def recommend_vtw(kl: Sequence[float], settings: "Saturation") -> Recommendation:
    """Recommend a split as VTW's own search does: the first layer whose KL is at most a threshold.

    Source: "Boosting Multimodal LLMs with Visual Tokens Withdrawal", section 3.3, and the search (`findk`) of its
    repository, which begins at layer 5, and takes the first touch, where `recommend_by_answers` asks the loss to stay.

    Args:
        kl: KL(withdrawn || stock) of the token behind the prompt, in nats per split, mean over samples.
        settings: `vtw_threshold` and `vtw_first`.
    """
    last, first, threshold = len(kl) - 1, settings.vtw_first, settings.vtw_threshold
    if math.isnan(kl[0]):
        return Recommendation("what VTW's search goes by was not measured (Saturation.knockout)")
    if first > last:
        return Recommendation(
            f"VTW's search begins at layer {first} (Saturation.vtw_first), behind the last one, {last}"
        )
    found = next((split for split in range(first, last + 1) if kl[split] <= threshold), None)
    if found is None:
        least = min(kl[first:])
        return Recommendation(
            f"in layers {first}..{last} no withdrawal changes the token behind the prompt by at most {threshold:g} "
            f"nats (Saturation.vtw_threshold): the least is {least:.3g}"
        )
    reason = f"the first from layer {first} on at which withdrawal changes the token behind the prompt by at most"
    return Recommendation(f"{reason} {threshold:g} nats ({kl[found]:.3g}), as VTW's own search has it", (found, last))


def _aside(others: Recommendation) -> str:
    """What the other signals say, in a clause."""
    if others.split is not None:
        return f"attention mass and logit lens by themselves say {others.split}"
    return f"attention mass and logit lens by themselves say none ({others.reason})"
