"""What any other Trainer of transformers gets of a patch, TRL's included: its model is patched when its run begins."""

from typing import Any
from weakref import WeakSet

from llava_patch.hosts import lora
from llava_patch.integrations.training import gradients as gradients_trainer
from llava_patch.integrations.training import llava, resume
from llava_patch.integrations.training.extension import TrainerExtension, extend
from llava_patch.integrations.training.figures import ShareOfTraining
from llava_patch.patching.handle import Handle, get_handle
from llava_patch.settings import active

_prepared: WeakSet[Any] = WeakSet()


def prepare(trainer: Any, handle: Handle) -> None:
    """Check a run, and let what it needs take part in it; to be called before its optimizer is made.

    What trains is what trained when the run began: the script may have set flags after the model was patched. Settings
    and an adapter are written only where flags or environment asked for the patch.
    """
    arguments, asked = trainer.args, active.configuration()
    if lora.has_lora(handle.model):
        _train_beside_lora(trainer, handle)
    llava.check_run(handle, arguments)
    llava.check_fusion(handle, arguments)
    llava.say_what_trains(handle, arguments)
    if trainer in _prepared:
        return
    _prepared.add(trainer)
    extend(trainer, _Groups())
    extend(trainer, ShareOfTraining(handle))
    gradients = None if asked is None else asked.measurements.get("Gradients")
    if gradients is not None:
        gradients_trainer.follow(trainer, gradients)
    resume.follow(trainer, handle)
    if asked is not None and asked.patches:
        extend(trainer, llava.Records(handle))


def _train_beside_lora(trainer: Any, handle: Handle) -> None:
    """Let what the patch added train, as under LLaVA's LoRA script: peft froze whatever is not its own."""
    llava.train_side_branch_in_full(trainer.model, handle)
    handle.apply_freeze()
    if handle.fusion is not None and not any(p.requires_grad for p in handle.adapter_parameters()):
        for parameter in handle.adapter_parameters():
            parameter.requires_grad_(True)


class _Groups(TrainerExtension):
    """A fusion's learning rates and its warm-up, in whatever optimizer the Trainer makes."""

    def arrange(self, optimizer: Any) -> None:
        handle = get_handle(self.trainer.model)
        if handle is not None:
            llava.arrange_groups(self.trainer, handle)
