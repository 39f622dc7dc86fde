"""The `saturation` task: measures each document in the live model, scores documents, aggregates the run.

Every answer holds its document's curves. The table is made from their mean, so it does not depend on how documents were
spread over processes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llava_patch.core.files import plain, track
from llava_patch.integrations.lmms_eval.access import reach
from llava_patch.integrations.lmms_eval.options import output_folder
from llava_patch.measurements.saturation.curves import Curves, RunningMean
from llava_patch.measurements.saturation.measure import measure_sample, patch_on
from llava_patch.measurements.saturation.measurement import Saturation
from llava_patch.measurements.saturation.recommend import transition_layer
from llava_patch.measurements.saturation.result import PatchOn, SaturationResult, summarise

NAN = float("nan")


def answer(lm: Any, requests: Sequence[Any]) -> list[str]:
    """Measure one document a request.

    Args:
        lm: lmms-eval's model object.
        requests: of one or several saturation tasks.

    Returns:
        One JSON string a request: `task`, `curves`, `settings`, `patch`, `folder`.
    """
    from llava_patch.data.pages import Pages
    from llava_patch.integrations.lmms_eval.tasks import active

    if not requests:
        return []
    subject = reach(lm)
    rows, _ = subject.anatomy.grid
    side = rows * subject.anatomy.patch_size
    patch = patch_on(subject.anatomy)
    answers = []
    for request in track(requests, "saturation", getattr(lm, "rank", 0) == 0):
        task = active(request.task_name)
        doc = lm.task_dict[request.task_name][request.metadata["split"]][request.doc_id]
        page = Pages(doc["page"] + 1, side, split="heldout")[doc["page"]]
        sample = subject.forward_inputs(page.open_image(), doc["question"])
        curves = measure_sample(subject.anatomy, sample, task.settings)
        answers.append(
            json.dumps(
                {
                    "task": request.task_name,
                    "curves": plain(asdict(curves)),
                    "settings": asdict(task.settings),
                    "patch": None if patch is None else asdict(patch),
                    "folder": output_folder(getattr(task, "args", None), request.task_name),
                }
            )
        )
    return answers


def process_results(doc: Any, results: Sequence[str]) -> dict[str, Any]:
    """Per-document numbers for the samples log; the entries also carry what aggregation needs."""
    answered = json.loads(results[0])
    curves, settings = Curves.from_dict(answered["curves"]), Saturation(**answered["settings"])
    found = summarise(curves, 1, settings=settings, patch=_patch(answered))
    share = settings.transition_share
    return {
        "vision_transition_layer": {"layer": found.image_transition, "kl": curves.image_kl, "share": share},
        "text_transition_layer": {"layer": found.text_transition, "kl": curves.text_kl, "share": share},
        "attention_mass_final": curves.mass[-1],
        "recommended_split": {"split": found.recommended_split, "reason": found.recommendation.reason, **answered},
    }


def mean_transition_layer(items: Sequence[dict[str, Any]]) -> float:
    """Transition layer of the mean logit-lens KL over documents; nan when there is none."""
    kl = [_mean(column) for column in zip(*(item["kl"] for item in items), strict=True)]
    layer = transition_layer(kl, items[0]["share"])
    return NAN if layer is None else layer


def mean_mass(items: Sequence[float]) -> float:
    """Attention mass, mean over documents."""
    return _mean(items)


def recommended_split(items: Sequence[dict[str, Any]]) -> float:
    """The split that the mean curves recommend; nan when they recommend none. Writes JSON and figure.

    The reason goes to lmms-eval's log and into the JSON; each document's own is in the samples log.
    """
    from lmms_eval.utils import eval_logger

    result, first = pooled(items), items[0]
    if first["folder"] is not None:
        json_path, figure_path = result.save(first["folder"])
        eval_logger.info(f"{first['task']}: wrote {json_path} and {figure_path}")
    eval_logger.info(f"{first['task']}: recommended split {result.recommended_split}: {result.recommendation.reason}")
    return NAN if result.recommended_split is None else result.recommended_split


def pooled(items: Sequence[dict[str, Any]]) -> SaturationResult:
    """The result over all documents of a run, whichever process measured them.

    Args:
        items: the `recommended_split` entries of `process_results`.
    """
    done = RunningMean()
    for item in items:
        done = done.plus(Curves.from_dict(item["curves"]))
    first = items[0]
    return summarise(done.mean(), done.samples, settings=Saturation(**first["settings"]), patch=_patch(first))


def _patch(answered: dict[str, Any]) -> PatchOn | None:
    return None if answered["patch"] is None else PatchOn(**answered["patch"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
