"""Steps of decoding that need nothing of the call context: one token of text behind a static routed cache.

What the host's wrapped methods keep books for (images, embeddings, labels, what is read) is settled at the prefill and
lies in the cache. So they let a step pass untouched, and torch.compile follows it from the causal LM to the last layer
as one graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_patch.hosts.anatomy import Anatomy

# What a step may be given besides None: the rest is settled here to be of no account, or makes a call of it.
_TAKEN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "cache_position", "use_cache",
    "return_dict", "logits_to_keep", "output_attentions", "output_hidden_states",
}  # fmt: skip
_PLAIN = ("output_attentions", "output_hidden_states")


def stepping(given: dict[str, Any]) -> Any:
    """The cache of a call, by its named arguments, that is a step under way; else None.

    Its attribute `stepping`, which caches have behind which steps are taken, says so to the methods inside.
    """
    cache = _cache(given)
    return cache if getattr(cache, "stepping", False) else None


def around_calls(anatomy: Anatomy, around: Callable[..., Any], opens: bool = True) -> Callable[..., Any]:
    """`around(function, *arguments)` for every call of a host's method that is no step, for steps the function alone.

    `opens`: the method is the causal LM's own, which is told enough to see that a call is a step.
    """

    def pass_steps(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if stepping(kwargs) is not None:
            return function(*args, **kwargs)
        if not opens or args or not _is_step(anatomy, kwargs):
            return around(function, *args, **kwargs)
        cache = _cache(kwargs)
        cache.stepping = True
        try:
            return function(**kwargs)
        finally:
            cache.stepping = False

    return pass_steps


def _cache(given: dict[str, Any]) -> Any:
    cache = given.get("past_key_values")
    return given.get("cache") if cache is None else cache


def _is_step(anatomy: Anatomy, given: dict[str, Any]) -> bool:
    if not hasattr(_cache(given), "stepping") or anatomy.model.training or torch.is_grad_enabled():
        return False
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == 1:  # of the new token alone
        return False
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1 or given.get("use_cache") is False:
        return False
    if any(value is not None and name not in _TAKEN for name, value in given.items()):
        return False
    configs = (anatomy.model.config, anatomy.decoder.config)
    return not any(given.get(name) or any(getattr(config, name, False) for config in configs) for name in _PLAIN)
