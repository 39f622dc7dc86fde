"""Tasks that compare the live model with its base: the base is loaded beside it, and both see the same pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_patch.core.files import track
from llava_patch.core.records import CONFIG_KEY
from llava_patch.core.weights import read_json
from llava_patch.data.base_model import base_of, load_base
from llava_patch.data.inputs import Inputs
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.integrations.lmms_eval.access import reach
from llava_patch.integrations.lmms_eval.options import output_folder
from llava_patch.patching import checkpoint as patched
from llava_patch.patching.handle import get_handle


@dataclass(frozen=True, eq=False)
class Pair:
    """One task's two models, and its requests.

    Attributes:
        task: the task.
        own: the live model.
        base: what it is compared with.
        checkpoint: where the live model is from.
        base_name: where the base is from.
    """

    task: Any
    own: Inputs
    base: Inputs
    checkpoint: str
    base_name: str

    def facts(self) -> dict[str, Any]:
        """What every answer carries."""
        settings = dataclasses.asdict(self.task.settings)
        name = self.task.config.task
        folder = output_folder(getattr(self.task, "args", None), name)
        return {
            "task": name, "settings": settings, "folder": folder, "checkpoint": self.checkpoint, "base": self.base_name,
        }  # fmt: skip

    def samples(self, page: Any, question: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keyword arguments of both models' forward."""
        image = page.open_image()
        return self.own.forward_inputs(image, question), self.base.forward_inputs(image, question)


def pairs(lm: Any, requests: Sequence[Any], what: str) -> Iterator[tuple[Pair, dict[str, Any], dict[str, Any]]]:
    """The two samples of each request, in order.

    Args:
        lm: lmms-eval's model object.
        requests: of one or several tasks of one kind.
        what: name of the measurement, for the progress bar.

    Raises:
        CheckpointError: no base is named, or it is not there; says how to name one.
    """
    from llava_patch.data.pages import Pages
    from llava_patch.integrations.lmms_eval.tasks import active

    subject = reach(lm)
    side = side_of(subject.anatomy)
    loaded: dict[str, Pair] = {}
    bases: dict[str, Inputs] = {}
    for request in track(requests, what, getattr(lm, "rank", 0) == 0):
        name = request.task_name
        if name not in loaded:
            loaded[name] = _pair(active(name), subject, bases)
        doc = lm.task_dict[name][request.metadata["split"]][request.doc_id]
        page = Pages(doc["page"] + 1, side, split="heldout")[doc["page"]]
        own, base = loaded[name].samples(page, doc["question"])
        yield loaded[name], own, base


def side_of(anatomy: Anatomy) -> int:
    """Side of the vision tower's input in pixels."""
    return anatomy.grid[0] * anatomy.patch_size


def _pair(task: Any, subject: Inputs, bases: dict[str, Inputs]) -> Pair:
    checkpoint = str(getattr(subject.anatomy.model.config, "_name_or_path", "") or "the model")
    given = task.settings.base
    if not given and _was_stock(subject.anatomy, checkpoint):
        given = checkpoint  # an adapter of ours, or gin's patch: what is on disk there is the base
    name = base_of(checkpoint, given, f"{type(task.settings).__name__}.base")
    if name not in bases:
        weight = subject.anatomy.embed_tokens.weight
        base = load_base(name, str(weight.device), str(weight.dtype).removeprefix("torch."))
        bases[name] = dataclasses.replace(base.inputs(), conversation=subject.conversation)
    return Pair(task, subject, bases[name], checkpoint, name)


def _was_stock(anatomy: Anatomy, folder: str) -> bool:
    """Whether a patched model's weights were read from a folder that knows nothing of the patch."""
    if get_handle(anatomy.model) is None or not Path(folder).is_dir():
        return False
    config = read_json(folder, "config.json")
    return config is not None and CONFIG_KEY not in config and patched.read_settings(folder) is None
