"""What any other Trainer of transformers gets of a patch, TRL's included: its model is patched when its run begins."""

from typing import Any
from weakref import WeakSet

from llava_patch.integrations.training import gradients as gradients_trainer
from llava_patch.integrations.training import llava
from llava_patch.integrations.training.extension import extend
from llava_patch.patching.handle import Handle
from llava_patch.settings import active

_prepared: WeakSet[Any] = WeakSet()


def prepare(trainer: Any, handle: Handle) -> None:
    """Check a run, and let what it needs take part in it; to be called before its optimizer is made.

    What trains is what trained when the run began: the script may have set flags after the model was patched. Settings
    and an adapter are written only where flags or environment asked for the patch.
    """
    arguments, asked = trainer.args, active.configuration()
    llava.check_run(handle, arguments)
    llava.check_fusion(handle, arguments)
    llava.say_what_trains(handle, arguments)
    if trainer in _prepared:
        return
    _prepared.add(trainer)
    gradients = None if asked is None else asked.measurements.get("Gradients")
    if gradients is not None:
        gradients_trainer.follow(trainer, gradients)
    if asked is not None and asked.patches:
        extend(trainer, llava.Records(handle))
