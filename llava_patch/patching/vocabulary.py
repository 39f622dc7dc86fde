"""A vocabulary that has grown since the base was loaded (LLaVA's mm_use_im_start_end, resize_token_embeddings)."""

from typing import Any

from torch import nn

from llava_patch.core.records import read_settings
from llava_patch.hosts import zero


def base_size(base: str) -> int | None:
    """Tokens of the vocabulary in the configuration of a base, which may be an adapter of ours; None: not known."""
    record = read_settings(base)
    if record is not None and record.get("form") == "adapter":
        base = str(record["base"])
    return _configured(base)


def _configured(base: str) -> int | None:
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(base).get_text_config(), "vocab_size", None)
    except (OSError, ValueError):  # it has moved, or is not a model
        return None


def grown(model: nn.Module) -> list[nn.Parameter]:
    """The token embedding and the output head where they are longer than the base's; else nothing.

    What they hold of new tokens may be random, so whatever is saved without the base must have it, trained or not.
    """
    base = getattr(model.config, "_name_or_path", "") or ""
    size = base_size(base) if base else None
    host: Any = model
    ends = [module for module in (host.get_input_embeddings(), host.get_output_embeddings()) if module is not None]
    if size is None or all(zero.shape(module.weight)[0] <= size for module in ends):
        return []
    return [parameter for module in ends for parameter in module.parameters()]
