"""The `rprobe` tasks: one probe a task, trained once, whose held-out samples are the task's documents.

Under several processes all of them train and measure the one probe together, each with its own copy of the model,
whatever documents lmms-eval gave it; every process then answers its own requests from the one result.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_patch.core import parallel
from llava_patch.core.errors import InputError
from llava_patch.integrations.lmms_eval.runner import active, output_folder, reach
from llava_patch.measurements.rprobe.settings import RProbe


def own_samples(settings: RProbe, path: str) -> tuple[list[Any], list[Any]]:
    """(training samples, held-out samples) of one's own data, split by document."""
    from llava_patch.data.readers import Samples, read_samples
    from llava_patch.probe.sample import split_samples

    samples = read_samples(path, settings.boxes_per_sample, settings.broken)
    if samples.skipped and parallel.is_first():
        print(f"{path}: {len(samples.skipped)} things were skipped; the first: {samples.skipped[0]}", file=sys.stderr)
    train, heldout = split_samples(samples, settings.heldout_share, settings.seed)
    return Samples(train, samples.skipped, samples.unread, samples.format), heldout


def answer(lm: Any, requests: Sequence[Any]) -> list[str]:
    """Train and measure one probe a task, then answer each request with its document's numbers and the run's.

    Requests may be of several tasks, and empty on some ranks; each answer is a JSON string: `task`, `document`, `run`.
    """
    with parallel.guard():
        # A process may have no request, or none of some task: what is run is what any of them was asked for.
        names = dict.fromkeys(parallel.gather_rows([request.task_name for request in requests]))
        runs = {name: _run(lm, name) for name in names}
    answers = []
    for request in requests:
        documents, run = runs[request.task_name]
        task = active[request.task_name]
        name = task.dataset[task.config.test_split]["id"][int(request.doc_id)]
        # None: a document that could not be used when it came to its image (RProbe.broken = "skip").
        answers.append(json.dumps({"task": request.task_name, "document": documents.get(name), "run": run}))
    return answers


def _run(lm: Any, name: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Train and measure one task's probe; (numbers of each held-out sample by its id, the run's)."""
    from llava_patch.core.locks import folder_lock
    from llava_patch.measurements.rprobe.fit import run_rprobe
    from llava_patch.measurements.rprobe.output import write_run

    task, subject = active[name], reach(lm)
    train, heldout = (None, None) if task.data() is None else own_samples(task.settings, task.data())
    folder = output_folder(getattr(task, "args", None), name)
    with folder_lock(None if folder is None else Path(folder)):
        parts = subject.anatomy.model, subject.image_processor, subject.tokenizer
        result = run_rprobe(*parts, task.settings, train, heldout, work=folder)
        if folder is not None:
            write_run(result, folder)
    if parallel.rank() == 0:
        print(f"{name}: {result.summary()}", flush=True)
    run = {
        "target_variance": result.target_variance,
        "constant_mse": result.constant_mse,
        "steps": None if result.threshold_is_vacuous else result.steps_to_threshold,
        "steps_half_fvu": result.steps_to_half_fvu,
        "threshold": result.threshold,
        "threshold_is_vacuous": result.threshold_is_vacuous,
        "comparable": result.facts["comparable"],
        "steps_done": len(result.losses),
        "warnings": result.warnings,
    }
    for called, times in Counter(document["id"] for document in result.documents).items():
        if times > 1:
            raise InputError(f"{name}: two held-out samples are called {called!r}: their numbers cannot be told apart")
    return {document["id"]: document for document in result.documents}, run


def process_results(doc: Any, results: Sequence[str]) -> dict[str, Any]:
    """Per-document numbers for the samples log; `--limit` thus cuts what the means are taken over."""
    answered = json.loads(results[0])
    document, run = answered["document"], answered["run"]
    pair, psnr_of, named = None, None, {}
    if document is not None:
        pair = {"mse": document["mse"], "tokens": document["tokens"], "target_variance": run["target_variance"]}
        psnr_of, named = document["psnr"], {"id": document["id"], "text": document["text"]}
    return {
        "rprobe_mse": pair,
        "rprobe_fvu": pair,
        "rprobe_psnr": psnr_of,
        "rprobe_steps": {"steps": run["steps"]},
        "rprobe_steps_half_fvu": {"steps": run["steps_half_fvu"]},
        "rprobe_run": {**run, **named},
    }


def mse(items: Sequence[dict[str, Any] | None]) -> float | None:
    """Held-out MSE, the mean over all tokens of all documents that could be used."""
    # None, here and below, where there is no number: lmms-eval prints N/A, and its JSON has null (a NaN is no JSON).
    used = [item for item in items if item is not None]
    return sum(item["mse"] * item["tokens"] for item in used) / sum(item["tokens"] for item in used) if used else None


def fvu(items: Sequence[dict[str, Any] | None]) -> float | None:
    """That MSE divided by the variance of all held-out targets."""
    error = mse(items)
    variance = next((item["target_variance"] for item in items if item is not None), None)
    return None if error is None or variance is None else error / variance


def psnr(items: Sequence[float | None]) -> float | None:
    """Peak signal-to-noise ratio in dB, mean over documents."""
    used = [item for item in items if item is not None]
    return sum(used) / len(used) if used else None


def steps(items: Sequence[dict[str, Any]]) -> int | None:
    """Training steps to a threshold; None when it was never reached, or lies above what a constant reaches."""
    return items[0]["steps"]
