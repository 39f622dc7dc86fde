"""The saturation measurement: what commands, report and lmms-eval ask of it.

Source: "Late-Layer Fusion is Enough" (DPVR), section 3.1 and figure 2.
"""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError
from llava_patch.core.files import plain
from llava_patch.data.target import Target
from llava_patch.measurements.base import Measurement, Table, decode
from llava_patch.measurements.saturation.recommend import transition_layer
from llava_patch.measurements.saturation.result import Curves, PatchOn, Saturation, SaturationResult


def _transition(entries: Sequence[dict[str, Any]]) -> float:
    """Transition layer of the mean logit-lens KL over documents; NaN when there is none."""
    kl = [sum(column) / len(column) for column in zip(*(entry["kl"] for entry in entries), strict=True)]
    layer = transition_layer(kl, entries[0]["share"])
    return math.nan if layer is None else layer


def _split(entries: Sequence[dict[str, Any]]) -> float:
    """The split that the mean curves recommend; NaN when they recommend none."""
    split = SaturationMeasurement().pooled(entries).recommended_split
    return math.nan if split is None else split


class SaturationMeasurement(Measurement):
    """Visual saturation: from which layer on the image is no longer needed.

    Measures cosine, attention mass and logit lens of one checkpoint, stock or
    patched, layer by layer, and what a stock one's answers lose when the image
    is taken away at a split; recommends a split. OUTPUT gets saturation.json
    and saturation.png. Interrupted, the same command goes on, and its result is
    the same to the last bit.
    """

    name = "saturation"
    title = "Visual saturation"
    about = (
        "From which layer on does the decoder no longer need its image tokens? Cosine near 1: a layer hardly turns the "
        "states. Attention mass: how much text looks at the image. KL: how far a layer's prediction is from the last. "
        "What the answers lose when the image is taken away at a split decides where it may leave."
    )
    terms = {  # noqa: RUF012
        "attention mass": "The probability that text behind the image puts on image positions: the sum over "
        "image keys, "
        "mean over heads and queries (DPVR paper, section "
        "3.1).",
        "logit lens": "KL(p_final || p_layer) in nats, where p_layer is the model's own final norm and head on "
        "a layer's "
        "states. The transition layer is the first from which it stays at or below transition_share of layer 0's.",
        "nats that they lose": "KL(p_stock || p_without) of the next token at the positions that are read, "
        "where from a "
        "split on text reads no image.",
    }
    alt = (
        "Panels over the decoder layers: cosine of a layer's input and output, attention of text on the image, KL of "
        "the logit lens, and what the answers lose when the image is taken away."
    )
    settings = Saturation
    result = "llava_patch.measurements.saturation.result:SaturationResult"
    compare = "llava_patch.measurements.saturation.result:compare"
    resumes = True
    aside = ("Saturation.save_every", "Saturation.chunk")
    metrics = {  # noqa: RUF012
        "recommended_split": _split,
        "vision_transition_layer": _transition,
        "text_transition_layer": _transition,
        "attention_mass_final": lambda entries: sum(entries) / len(entries),
    }
    readers = ('Routing.split = "auto"',)

    def tables(self, result: Any) -> list[tuple[str, Table]]:
        """None: the curves are for the figure."""
        return []

    def measure(self, target: Target, settings: Saturation, folder: Path | None = None) -> SaturationResult:
        """One forward pass a sample; an unfinished run goes on from its state in the folder."""
        from llava_patch.data.readers.read import resolve_source
        from llava_patch.measurements.saturation.measure import STATE_FILE, State, measure_saturation

        samples = target.samples(settings.max_samples)
        key = self._key(target, settings)
        state = None if folder is None else State(folder / STATE_FILE, key)
        result = measure_saturation(target.subject.model, samples, settings, state=state)
        facts = {
            "base": target.below,
            "data": resolve_source(target.data) or "rendered pages",
            "question": target.question,
            "examples": len(samples),
            "dtype": key["dtype"],
            "device": key["device"],
            "key": _digest(key),
        }
        return replace(result, facts=facts)

    def kept(self, target: Target, settings: Saturation, folder: Path) -> SaturationResult | None:
        """The result of the very same measurement; one of an earlier version, or damaged, counts as none."""
        path = folder / "saturation.json"
        if not path.is_file():
            return None
        try:
            found = SaturationResult.load(path)
        except InputError as error:
            print(f"measured anew: {error}", file=sys.stderr)
            return None
        return found if found.facts.get("key") == _digest(self._key(target, settings)) else None

    def finished(self, folder: Path) -> None:
        """Delete the state."""
        from llava_patch.measurements.saturation.measure import STATE_FILE

        (folder / STATE_FILE).unlink(missing_ok=True)

    def document(
        self, anatomies: Sequence[Any], samples: Sequence[dict[str, Any]], settings: Saturation, number: int
    ) -> dict[str, Any]:
        """The document's curves."""
        from llava_patch.measurements.saturation.measure import measure_sample, patch_on

        curves = measure_sample(anatomies[0], samples[0], replace(settings, knockout=bool(settings.knockout)))
        patch = patch_on(anatomies[0])
        return {"curves": plain(asdict(curves)), "patch": None if patch is None else asdict(patch)}

    def entries(self, item: dict[str, Any]) -> dict[str, Any]:
        """Layers of the document's own, and of its curves what the means are taken over."""
        found = self.pooled([item])
        curves, share = found.curves, found.settings.transition_share
        return {
            "recommended_split": {"split": found.recommended_split, "reason": found.recommendation.reason, **item},
            "vision_transition_layer": {"layer": found.image_transition, "kl": curves.image_kl, "share": share},
            "text_transition_layer": {"layer": found.text_transition, "kl": curves.text_kl, "share": share},
            "attention_mass_final": curves.mass[-1],
        }

    def pooled(self, items: Sequence[dict[str, Any]]) -> SaturationResult:
        """The result of the mean curves."""
        from llava_patch.measurements.saturation.measure import RunningMean

        done = RunningMean()
        for item in items:
            done = done.plus(Curves.from_dict(item["curves"]))
        settings, patch = Saturation(**items[0]["settings"]), decode(PatchOn | None, items[0]["patch"])
        return SaturationResult(done.mean(), done.samples, settings=settings, patch=patch)

    def _key(self, target: Target, settings: Saturation) -> dict[str, Any]:
        from llava_patch.hosts.anatomy import find
        from llava_patch.measurements.saturation.measure import make_key

        return make_key(find(target.subject.model), target.examples(settings.max_samples), settings)


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
