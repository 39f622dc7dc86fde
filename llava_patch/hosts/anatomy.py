"""Finds where things are in a host model: decoder layers, norm, head, vision tower, projector, image tokens.

Two hosts are known, a file each: the original `llava` package (`hosts/llava.py`) and Hugging Face's LLaVA
(`hosts/hf.py`). They are recognised by the attributes they have, so neither package needs to be installed for the other
to work; which of the models that have them are taken is in `known`.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from llava_patch.core.errors import HostError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import known
from llava_patch.hosts.hf import HF, HF_FILES, HFAnatomy
from llava_patch.hosts.host import Anatomy, HostFiles
from llava_patch.hosts.llava import LLAVA, LLAVA_FILES, LlavaAnatomy

__all__ = ["HF", "HOSTS", "LLAVA", "Anatomy", "find", "get_handle", "unwrap", "when_loaded"]

HANDLE = "_llava_patch_handle"
HOSTS: dict[str, tuple[type[Anatomy], HostFiles]] = {
    LLAVA: (LlavaAnatomy, LLAVA_FILES),
    HF: (HFAnatomy, HF_FILES),
}
"""Every host by name: one more is a file beside the two, and a line here."""


def unwrap(model: Any) -> Any:
    """Strip DDP, FSDP, DeepSpeed engines, torch.compile and peft wrappers around a host model."""
    while True:
        model = known.bare(model)
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine", "DataParallel"):
            model = model.module
        else:
            return model


def find(model: Any) -> Anatomy:
    """Describe a host model, possibly inside DDP, DeepSpeed, torch.compile or peft.

    HostError: another kind of model, one that overrides what turns images into embeddings (see `known`), or one that
    has no vision tower yet.
    """
    model = unwrap(model)
    for kind, _ in HOSTS.values():
        found = kind.of(model)
        if found is not None:
            return found
    raise HostError(
        f"{type(model).__name__} is not a model that llava_patch knows: expected the llava package's "
        "LlavaLlamaForCausalLM or Hugging Face's LlavaForConditionalGeneration"
    )


def get_handle(model: nn.Module) -> Any:
    """The handle of a patched model.

    Args:
        model: also wrapped by DDP, DeepSpeed, torch.compile or peft.

    Returns:
        Its `patching.handle.Handle`, the one that `patch` returned; None: the model is not patched.
    """
    return vars(unwrap(model)).get(HANDLE)


def when_loaded(anatomy: Anatomy, undo: UndoStack, work: Callable[[UndoStack], object]) -> None:
    """Do `work` once the vision tower has its weights: now, or right after the host has loaded it.

    It is given where to note how it is taken back; what it raises reaches whoever loads the tower.

    Modifications: on `llava`, while the tower is not loaded yet, its instance attribute `load_model`.
    """
    late = UndoStack()  # has its place in the order now, whatever is applied until the tower is there
    undo.push(late.unwind)
    if anatomy.vision_model is not None:
        work(late)
        return

    def load_and_work(load_model: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        was_loaded = anatomy.tower.is_loaded
        load_model(*args, **kwargs)
        if not was_loaded:
            work(late)

    undo.wrap(anatomy.tower, "load_model", load_and_work)
