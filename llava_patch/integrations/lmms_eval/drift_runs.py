"""The `drift` task: compares each document's hidden states in the live model and in its base.

Every answer holds its document's cosines, so that the table's medians are over all positions of all documents,
whichever process measured them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_patch.integrations.lmms_eval.pairs import pairs
from llava_patch.measurements.drift.measure import Meter
from llava_patch.measurements.drift.result import Drift, DriftResult
from llava_patch.measurements.drift.states import cosines, states_of
from llava_patch.measurements.passes import evaluating, same_input


def answer(lm: Any, requests: Sequence[Any]) -> list[str]:
    """Measure one document a request.

    Args:
        lm: lmms-eval's model object.
        requests: of one or several drift tasks.

    Returns:
        One JSON string a request: the task's facts, and the document's cosines.
    """
    answers = []
    for number, (pair, sample, base_sample) in enumerate(pairs(lm, requests, "drift")):
        own, base = pair.own.anatomy, pair.base.anatomy
        meter = Meter.between(own, base, pair.task.settings)
        with meter, evaluating(own.model), evaluating(base.model):
            one, other = states_of(own, sample, meter.layers), states_of(base, base_sample, meter.layers)
            same_input(one.seen, other.seen, number, "drift")
            values, image = cosines(one, other), one.seen.placed.cpu().numpy()
        found = {
            "cosines": packed(values),
            "rows": len(values),
            "image": image.astype(int).tolist(),
            "split": meter.split,
            "prunes": meter.prunes,
            "n_layers": meter.n_layers,
        }
        answers.append(json.dumps({**pair.facts(), **found}))
    return answers


def packed(values: np.ndarray) -> str:
    """float32 values as text: 16 digits a number in JSON would make the samples log four times as long."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def process_results(doc: Any, results: Sequence[str]) -> dict[str, Any]:
    """Per-document numbers for the samples log; the entries of `drift_image` also carry what aggregation needs."""
    item = json.loads(results[0])
    found = pooled([item])
    return {
        "drift_image": {"lowest_median": min(found.image.median), **item},
        "drift_text": {"lowest_median": min(found.text.median), **item},
    }


def image(items: Sequence[dict[str, Any]]) -> float:
    """Lowest median cosine at image positions over the layers below the split. Writes JSON and figure."""
    from lmms_eval.utils import eval_logger

    result, first = pooled(items), items[0]
    if first["folder"] is not None:
        json_path, figure_path = result.save(first["folder"])
        eval_logger.info(f"{first['task']}: wrote {json_path} and {figure_path}")
    eval_logger.info(f"{first['task']}: {result.summary()}")
    return min(result.image.median)


def text(items: Sequence[dict[str, Any]]) -> float:
    """The same at text positions."""
    return min(pooled(items).text.median)


def pooled(items: Sequence[dict[str, Any]]) -> DriftResult:
    """The result over all documents of a run."""
    first = items[0]
    limit = first["split"], first["prunes"]
    with Meter(Drift(**first["settings"]), first["rows"] - 1, first["n_layers"], *limit) as meter:
        for item in items:
            values = np.frombuffer(base64.b64decode(item["cosines"]), dtype="<f4").reshape(item["rows"], -1)
            meter.add_cosines(values, np.array(item["image"], dtype=bool))
        return meter.result(first["checkpoint"], first["base"])
