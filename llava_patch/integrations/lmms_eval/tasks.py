"""Our lmms-eval tasks: embedded documents, one request each, answered by looking inside the live model.

lmms-eval runs a task's requests through a method of the model object that bears the task's output type, once per rank
with all requests. Importing this module adds ours. The model is alive there, but no longer when results are processed,
so each answer is a JSON string that holds all that scoring needs.
"""

import functools
import os
from typing import Any, ClassVar

import datasets
from lmms_eval.api import task as api_task
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask

from llava_patch.core import registry
from llava_patch.core.extras import need
from llava_patch.data.examples import QUESTION
from llava_patch.integrations.lmms_eval import fail_fast, rprobe_runs, runner
from llava_patch.measurements.rprobe.settings import RProbe


class MeasurementTask(ConfigurableTask):
    """A measurement on rendered pages, `metadata.documents` of the YAML in number; EXTRAS: see `core.extras`."""

    SETTINGS: ClassVar[type]
    EXTRAS: ClassVar[tuple[str, ...]] = ("figures",)

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        config = dict(config or {})
        need(f"the lmms-eval task {config.get('task')}", *self.EXTRAS)
        config.pop("class", None)  # how lmms-eval found this class; not a field of its TaskConfig
        self.settings: Any = runner.settings_for(self.SETTINGS, config.get("metadata"), str(config.get("task")))
        fail_fast.install()
        super().__init__(config=config)

    def documents(self) -> dict[str, list[Any]]:
        """The documents as columns, `id` and `question` among them; pages are drawn when the tower's size is known."""
        pages = range(int((self.config.metadata or {}).get("documents", 32)))
        return {"id": [f"page-{i}" for i in pages], "page": list(pages), "question": [QUESTION] * len(pages)}

    def download(self, dataset_kwargs: Any = None) -> None:
        """Make the documents; nothing is downloaded."""
        self.dataset = datasets.DatasetDict({self.config.test_split: datasets.Dataset.from_dict(self.documents())})
        self.dataset_no_image = self.dataset

    def build_all_requests(self, **kwargs: Any) -> None:
        """Build the requests and let `runner.active` find this task while they run."""
        runner.active[self.config.task] = self
        super().build_all_requests(**kwargs)

    def construct_requests(self, doc_id: int, ctx: str, **kwargs: Any) -> Instance:
        """One request a document; `do_sample` keeps it out of the response cache, which does not know our settings."""
        split = kwargs["metadata"]["split"]
        arguments = (ctx, {"do_sample": True}, self.doc_to_visual, doc_id, self.config.task, split)
        return Instance(request_type=self.OUTPUT_TYPE, arguments=arguments, idx=0, **kwargs)

    def process_results(self, doc: Any, results: Any, full_docs: Any = None) -> dict[str, Any]:
        """Score one document, without the five silent retries of the base class."""
        if self.config.process_results is None:  # --predict_only
            return {"bypass": results}
        return self.config.process_results(doc, results)


class RProbeTask(MeasurementTask):
    """R-Probe: the documents are the held-out samples; the probe is trained on the others."""

    SETTINGS = RProbe
    EXTRAS = ("figures", "probe")

    def documents(self) -> dict[str, list[Any]]:
        """Held-out samples by number, in the order in which the probe reports them."""
        data, seed = self.data(), self.settings.seed
        if data is None:
            ids = [f"page-heldout-{seed}-{i}" for i in range(self.settings.heldout_pages)]
        else:
            ids = [sample.id for sample in rprobe_runs.own_samples(self.settings, data)[1]]
        return {"id": ids, "number": list(range(len(ids))), "question": [""] * len(ids)}

    def data(self) -> str | None:
        """One's own samples: `metadata.data` of the YAML, else LLAVA_PATCH_RPROBE_DATA; None: rendered pages."""
        metadata = self.config.metadata
        given = metadata.get("data") if isinstance(metadata, dict) else None
        return given or os.environ.get("LLAVA_PATCH_RPROBE_DATA") or None


def task_class(name: str) -> type[MeasurementTask]:
    """The task of a measurement of the registry, for its YAML."""
    return type("Task", (MeasurementTask,), {"SETTINGS": registry.measurement(name).settings})


# Our output types, and the methods of lmms-eval's models that answer their requests.
_answers: dict[str, Any] = {"rprobe": rprobe_runs.answer}
_measured = [one for one in map(registry.measurement, registry.MEASUREMENTS) if one.metrics]
for _name, _answer in (_answers | {one.name: functools.partial(runner.answer, one) for one in _measured}).items():
    _output_type = f"llava_patch_{_name}"
    if _output_type not in api_task.ALL_OUTPUT_TYPES:
        api_task.ALL_OUTPUT_TYPES.append(_output_type)
    setattr(lmms, _output_type, lambda self, requests, answer=_answer: answer(self, requests))

# What task.py of earlier versions imported, for copies of it.
DriftTask, FusionAttentionTask, SaturationTask = map(task_class, ("drift", "fusion_attention", "saturation"))
