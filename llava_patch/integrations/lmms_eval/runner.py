"""Runs measurements as lmms-eval tasks: measures each document in the live model, scores documents, pools the run.

Every answer is a JSON object that holds its document's numbers, so that the table is made from all documents whichever
process measured them. Where a measurement compares, the base is loaded beside the live model, and both see the same
pages.
"""

import dataclasses
import functools
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_patch.core import registry
from llava_patch.core.errors import HostError, SettingError
from llava_patch.core.files import track
from llava_patch.data.inputs import Inputs
from llava_patch.data.loaded import base_of, load_base
from llava_patch.data.pages import Pages
from llava_patch.hosts import configs
from llava_patch.hosts.anatomy import find
from llava_patch.integrations.lmms_eval.fail_fast import model_of
from llava_patch.measurements.base import Measurement
from llava_patch.patching.handle import get_handle
from llava_patch.settings.active import settings_of

active: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The tasks whose requests are being answered, by name."""


def names(name: str) -> dict[str, Any]:
    """What the YAML file of a measurement's task names: `Task`, `process_results`, and each metric's aggregation."""
    from llava_patch.integrations.lmms_eval.tasks import task_class

    measurement = registry.measurement(name)
    found: dict[str, Any] = {"Task": task_class(name), "process_results": functools.partial(process, measurement)}
    return found | {metric: functools.partial(_aggregate, measurement, metric) for metric in measurement.metrics}


def answer(measurement: Measurement, lm: Any, requests: Sequence[Any]) -> list[str]:
    """Measure one document a request: a JSON string with the task's facts and the document's numbers."""
    if not requests:
        return []
    live = reach(lm)
    side = live.anatomy.grid[0] * live.anatomy.patch_size
    models: dict[str, tuple[list[Inputs], dict[str, str]]] = {}  # of each task
    bases: dict[str, Inputs] = {}
    found = []
    shown = getattr(lm, "rank", 0) == 0
    for number, request in enumerate(track(requests, measurement.name.replace("_", " "), shown)):
        name, task = request.task_name, active[request.task_name]
        if name not in models:
            models[name] = _beside(task, live, bases) if measurement.compares else ([live], {})
        inputs, sources = models[name]
        doc = lm.task_dict[name][request.metadata["split"]][request.doc_id]
        image = Pages(doc["page"] + 1, side, split="heldout")[doc["page"]].open_image()
        samples = [one.forward_inputs(image, doc["question"]) for one in inputs]
        values = measurement.document([one.anatomy for one in inputs], samples, task.settings, number)
        settings, folder = dataclasses.asdict(task.settings), output_folder(getattr(task, "args", None), name)
        found.append(json.dumps({"task": name, "settings": settings, "folder": folder, **sources, **values}))
    return found


def process(measurement: Measurement, doc: Any, results: Sequence[str]) -> dict[str, Any]:
    """Per-document numbers for the samples log; those of the first metric also carry what pooling needs."""
    return measurement.entries(json.loads(results[0]))


def _aggregate(measurement: Measurement, metric: str, entries: Sequence[Any]) -> Any:
    """A metric over all documents; with the first one, what they came to is written beside lmms-eval's own results."""
    if metric == next(iter(measurement.metrics)):
        from lmms_eval.utils import eval_logger

        result, first = measurement.pooled(entries), entries[0]
        if first["folder"] is not None:
            paths = result.save(first["folder"])
            eval_logger.info(f"{first['task']}: wrote {' and '.join(map(str, paths))}")
        eval_logger.info(f"{first['task']}: {result.summary()}")
    return measurement.metrics[metric](entries)


def _beside(task: Any, live: Inputs, bases: dict[str, Inputs]) -> tuple[list[Inputs], dict[str, str]]:
    """The live model and its base, which is loaded once for all tasks; and where they are from."""
    checkpoint = str(getattr(live.anatomy.model.config, "_name_or_path", "") or "the model")
    given = task.settings.base
    if not given and get_handle(live.anatomy.model) is not None and Path(checkpoint).is_dir():
        files = configs.look(checkpoint)
        if files.host and files.record is None:
            given = checkpoint  # an adapter of ours, or gin's patch: what is on disk there is the base
    name = base_of(checkpoint, given, f"{type(task.settings).__name__}.base")
    if name not in bases:
        weight = live.anatomy.embed_tokens.weight
        base = load_base(name, str(weight.device), str(weight.dtype).removeprefix("torch."))
        bases[name] = dataclasses.replace(base.inputs(), conversation=live.conversation)
    return [live, bases[name]], {"checkpoint": checkpoint, "base": name}


def reach(lm: Any) -> Inputs:
    """Find model, tokenizer and processors in lmms-eval's `llava` and `llava_hf` models; others are refused."""
    model = model_of(lm)
    tokenizer = getattr(lm, "tokenizer", None)
    processor = getattr(lm, "_image_processor", None)
    if model is None or tokenizer is None or processor is None:
        raise HostError(
            f"llava_patch's tasks look inside the model and know lmms-eval's `llava` and `llava_hf`; "
            f"{type(lm).__name__} has no model, tokenizer and image processor to look at"
        )
    anatomy = find(model)
    joint = processor if hasattr(processor, "image_processor") else None
    if (joint is not None) != anatomy.ids_hold_places:
        raise HostError(f"{type(processor).__name__} is not the processor of a model of the host {anatomy.host!r}")
    images = processor if joint is None else joint.image_processor
    return Inputs(anatomy, tokenizer, images, joint, getattr(lm, "conv_template", None))


def settings_for(cls: Any, metadata: Any, task: str) -> Any:
    """Settings of one task: defaults, then gin, then the entry `settings` in its YAML's `metadata`."""
    given = dict(metadata.get("settings") or {}) if isinstance(metadata, dict) else {}
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - known):
        raise SettingError(
            f"task {task}: metadata.settings names {', '.join(unknown)}; {cls.__name__} has {', '.join(sorted(known))}"
        )
    return dataclasses.replace(settings_of(cls), **given)


def output_folder(args: Any, task: str) -> str | None:
    """Where a task's figures go: `<output_path>/<model>/<task>`, beside lmms-eval's own results; None without path."""
    path = getattr(args, "output_path", None)
    if not path:
        return None
    from lmms_eval.loggers.evaluation_tracker import GeneralConfigTracker
    from lmms_eval.utils import sanitize_model_name

    model = sanitize_model_name(GeneralConfigTracker._get_model_name(str(args.model_args)))
    return str(Path(path) / model / task)
