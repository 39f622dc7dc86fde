"""The `fusion_attention` task: head by head, the live model's text-to-image attention against its base's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from llava_patch.integrations.lmms_eval.pairs import pairs
from llava_patch.measurements.fusion_attention.measure import measure_fusion_attention
from llava_patch.measurements.fusion_attention.result import FusionAttention, FusionAttentionResult


def answer(lm: Any, requests: Sequence[Any]) -> list[str]:
    """Measure one document a request.

    Args:
        lm: lmms-eval's model object.
        requests: of one or several fusion attention tasks.

    Returns:
        One JSON string a request: the task's facts, and the document's result.
    """
    answers = []
    for pair, sample, base_sample in pairs(lm, requests, "fusion attention"):
        found = measure_fusion_attention(
            pair.own.anatomy.model, pair.base.anatomy.model, [sample], pair.task.settings, progress=False,
            base_samples=[base_sample],
        )  # fmt: skip
        found = dataclasses.replace(found, checkpoint=pair.checkpoint, base=pair.base_name)
        answers.append(json.dumps({**pair.facts(), "result": found.to_dict()}))
    return answers


def process_results(doc: Any, results: Sequence[str]) -> dict[str, Any]:
    """Per-document numbers for the samples log; each entry carries what aggregation needs."""
    item = json.loads(results[0])
    return {name: item for name in ("fusion_attention_mass", "fusion_attention_ratio", "heads_above_twice_stock")}


def mass(items: Sequence[dict[str, Any]]) -> float:
    """Text-to-image attention mass, mean over heads, fusion layers and documents. Writes JSON and figure."""
    from lmms_eval.utils import eval_logger

    result, first = pooled(items), items[0]
    if first["folder"] is not None:
        json_path, figure_path = result.save(first["folder"])
        eval_logger.info(f"{first['task']}: wrote {json_path} and {figure_path}")
    eval_logger.info(f"{first['task']}: {result.summary()}")
    return _mean([value for heads in result.trained for value in heads])


def ratio(items: Sequence[dict[str, Any]]) -> float | None:
    """That mass divided by the base's; None where the base's is zero."""
    result = pooled(items)
    stock = _mean([value for heads in result.stock for value in heads])
    return _mean([value for heads in result.trained for value in heads]) / stock if stock else None


def heads(items: Sequence[dict[str, Any]]) -> int:
    """Heads of the fusion layers that are above twice their own mass in the base."""
    result = pooled(items)
    return sum(result.above_twice(index) for index in range(len(result.layers)))


def pooled(items: Sequence[dict[str, Any]]) -> FusionAttentionResult:
    """The result over all documents of a run, each of which counts the same."""
    found = [FusionAttentionResult.from_dict(item["result"]) for item in items]
    trained, stock = (
        [[_mean(column) for column in zip(*layer, strict=True)] for layer in zip(*parts, strict=True)]
        for parts in ([one.trained for one in found], [one.stock for one in found])
    )
    settings = FusionAttention(**items[0]["settings"])
    return dataclasses.replace(found[0], trained=trained, stock=stock, samples=len(found), settings=settings)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
