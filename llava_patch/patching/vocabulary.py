"""A vocabulary of another size than the base's (LLaVA's mm_use_im_start_end, resize_token_embeddings)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llava_patch.core.records import ADAPTER, base_of, read_settings
from llava_patch.hosts import compat, zero


def base_size(base: str) -> int | None:
    """Tokens of the vocabulary in the configuration of a base, which may be an adapter of ours; None: not known."""
    record = read_settings(base)
    if record is not None and record.get("form") == ADAPTER:
        base = base_of(base, record)
    return _configured(base)


def _configured(base: str) -> int | None:
    from transformers import AutoConfig

    try:
        return getattr(compat.text_config(AutoConfig.from_pretrained(base)), "vocab_size", None)
    except (OSError, ValueError):  # it has moved, or is not a model
        return None


def resized(model: nn.Module) -> list[nn.Parameter]:
    """The token embedding and the output head where they are not as long as the base's; else nothing.

    What they hold of new tokens may be random, so whatever is saved without the base must have it, trained or not.
    """
    base = getattr(model.config, "_name_or_path", "") or ""
    size = base_size(base) if base else None
    ends = _ends(model)
    if size is None or all(zero.shape(module.weight)[0] == size for module in ends):
        return []
    return [parameter for module in ends for parameter in module.parameters()]


def resize_for(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a base the vocabulary of an adapter's tensors, which are to be copied into it."""
    host: Any = model
    rows = {len(tensors[name]) for name in names_of_ends(model) if name in tensors}
    if rows - {zero.shape(module.weight)[0] for module in _ends(model)}:
        takes = compat.parameters_of(type(host).resize_token_embeddings)  # of the model's own it would keep the model
        options = {"mean_resizing": False} if "mean_resizing" in takes else {}
        host.resize_token_embeddings(max(rows), **options)  # every new value is overwritten


def names_of_ends(model: nn.Module) -> set[str]:
    """The names of the token embedding's and the output head's weights."""
    own = {id(module.weight) for module in _ends(model)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _ends(model: nn.Module) -> list[Any]:
    """The token embedding and the output head."""
    host: Any = model
    return [module for module in (host.get_input_embeddings(), host.get_output_embeddings()) if module is not None]
