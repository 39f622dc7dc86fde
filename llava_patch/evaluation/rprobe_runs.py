"""The `rprobe` tasks: one probe a task, trained once, whose held-out samples are the task's documents.

Under several processes rank 0 trains and measures, and the result is broadcast: one probe, one set of numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_patch.errors import LlavaPatchError
from llava_patch.evaluation.access import reach
from llava_patch.evaluation.options import output_folder
from llava_patch.probe.settings import RProbe

DATA_VARIABLE = "LLAVA_PATCH_RPROBE_DATA"
NAN = float("nan")


def data_file(metadata: Any) -> str | None:
    """File of one's own samples: `metadata.data` of the task's YAML, else LLAVA_PATCH_RPROBE_DATA; None: pages."""
    given = metadata.get("data") if isinstance(metadata, dict) else None
    return given or os.environ.get(DATA_VARIABLE) or None


def own_samples(settings: RProbe, path: str) -> tuple[list[Any], list[Any]]:
    """(training samples, held-out samples) of a file, split by document."""
    from llava_patch.probe.data import read_jsonl
    from llava_patch.probe.sample import split_samples

    return split_samples(read_jsonl(path), settings.heldout_share, settings.seed)


def heldout_ids(settings: RProbe, path: str | None) -> list[str]:
    """Names of the held-out samples, in the order in which the probe reports them."""
    if path is None:
        return [f"page-heldout-{settings.seed}-{i}" for i in range(settings.heldout_pages)]
    return [sample.id for sample in own_samples(settings, path)[1]]


def answer(lm: Any, requests: Sequence[Any]) -> list[str]:
    """Train and measure one probe a task, then answer each request with its document's numbers and the run's.

    Args:
        lm: lmms-eval's model object.
        requests: of one or several rprobe tasks; may be empty on some ranks.

    Returns:
        One JSON string a request: `task`, `document`, `run`.
    """
    names = _from_rank_0(lambda: list(dict.fromkeys(request.task_name for request in requests)))
    runs = {name: _from_rank_0(lambda name=name: _run(lm, name)) for name in names}
    answers = []
    for request in requests:
        documents, run = runs[request.task_name]
        answers.append(json.dumps({"task": request.task_name, "document": documents[int(request.doc_id)], "run": run}))
    return answers


def _run(lm: Any, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from llava_patch.evaluation.tasks import active
    from llava_patch.probe.figures import save_figure
    from llava_patch.probe.fit import run_rprobe
    from llava_patch.probe.result import write_json

    task, subject = active(name), reach(lm)
    train, heldout = (None, None) if task.data() is None else own_samples(task.settings, task.data())
    # After llava has loaded a model, new tensors are float16 (it leaves torch's default changed).
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        result = run_rprobe(
            subject.anatomy.model, subject.image_processor, subject.tokenizer, task.settings, train, heldout
        )
    finally:
        torch.set_default_dtype(default)
    folder = output_folder(getattr(task, "args", None), name)
    if folder is not None:
        write_json(result, Path(folder) / "rprobe.json")
        save_figure(result, Path(folder) / "rprobe.png")
    print(f"{name}: {result.summary()}", flush=True)
    run = {
        "target_variance": result.target_variance,
        "constant_mse": result.constant_mse,
        "steps": None if result.threshold_is_vacuous else result.steps_to_threshold,
        "steps_half_fvu": result.steps_to_half_fvu,
        "threshold": result.threshold,
        "threshold_is_vacuous": result.threshold_is_vacuous,
        "warnings": result.warnings,
    }
    return result.documents, run


def _from_rank_0(compute: Any) -> Any:
    """Compute on rank 0 and give every rank the value, or the failure."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return compute()
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = compute()
        except Exception as error:  # the other ranks wait for the broadcast: tell them first
            failure, box[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise LlavaPatchError(f"R-Probe failed on rank 0: {box[1]}")
    return box[0]


def process_results(doc: Any, results: Sequence[str]) -> dict[str, Any]:
    """Per-document numbers for the samples log; `--limit` thus cuts what the means are taken over."""
    answered = json.loads(results[0])
    document, run = answered["document"], answered["run"]
    pair = {"mse": document["mse"], "tokens": document["tokens"], "target_variance": run["target_variance"]}
    return {
        "rprobe_mse": pair,
        "rprobe_fvu": pair,
        "rprobe_psnr": document["psnr"],
        "rprobe_steps": {"steps": run["steps"]},
        "rprobe_steps_half_fvu": {"steps": run["steps_half_fvu"]},
        "rprobe_run": {**run, "id": document["id"], "text": document["text"]},
    }


def mse(items: Sequence[dict[str, Any]]) -> float:
    """Held-out per-token MSE: mean inside a token, then over all tokens of all documents."""
    return sum(item["mse"] * item["tokens"] for item in items) / sum(item["tokens"] for item in items)


def fvu(items: Sequence[dict[str, Any]]) -> float:
    """That MSE divided by the variance of all held-out targets."""
    return mse(items) / items[0]["target_variance"]


def psnr(items: Sequence[float]) -> float:
    """Peak signal-to-noise ratio in dB, mean over documents."""
    return sum(items) / len(items)


def steps(items: Sequence[dict[str, Any]]) -> float:
    """Training steps to a threshold; nan when it was never reached, or lies above what a constant reaches."""
    value = items[0]["steps"]
    return NAN if value is None else value
