"""Differences between versions of transformers, each found by feature rather than by version number.

How decoder layers, masks and caches are called, and what tensors and settings are named; a file a subject. What makes
LLaVA's own code run on the supported versions is in `llava_code`.
"""

from llava_patch.hosts.compat.caches import (
    as_cache,
    cache_layers,
    keep_beams,
    keep_every_position,
    new_cache,
    take_held,
    to_forget,
)
from llava_patch.hosts.compat.features import parameters_of
from llava_patch.hosts.compat.layers import (
    cache_argument,
    call_layer,
    call_layers,
    checkpointed,
    input_grads_are_forced,
    layer_cache_argument,
    layer_output,
    prepare_layers,
    run_in_a_row,
)
from llava_patch.hosts.compat.masks import (
    allow_any_mask,
    attention_of,
    backend_of,
    causal_mask,
    choose_backend_again,
    makes_windows,
    position_mask,
    scaling,
    sliding_window,
    stock_mask,
    use_backend,
    visible,
)
from llava_patch.hosts.compat.names import (
    as_here,
    dtype_argument,
    keep_floating,
    load_saved_names,
    neutral_tower,
    saves_offloaded,
    stored_dtype,
    text_config,
)
from llava_patch.hosts.compat.positions import as_read, inverse_frequencies, rope_type, rotary, rotary_of_call
from llava_patch.hosts.compat.versions import SUPPORTED_TRANSFORMERS, brings_towers, check_versions, unsupported
from llava_patch.hosts.compat.vision import (
    ask_all_states,
    encode_in_forward,
    known_options,
    layout_options,
    one_tensor,
    pil_processor,
    ties_last_state,
)

__all__ = [
    "SUPPORTED_TRANSFORMERS", "allow_any_mask", "as_cache", "as_here", "as_read", "ask_all_states", "attention_of",
    "backend_of", "brings_towers", "cache_argument", "cache_layers", "call_layer", "call_layers", "causal_mask",
    "check_versions", "checkpointed", "choose_backend_again", "dtype_argument", "encode_in_forward",
    "input_grads_are_forced", "inverse_frequencies", "keep_beams", "keep_every_position", "keep_floating",
    "known_options", "layer_cache_argument", "layer_output", "layout_options", "load_saved_names", "makes_windows",
    "neutral_tower", "new_cache", "one_tensor", "parameters_of", "pil_processor", "position_mask", "prepare_layers",
    "rope_type", "rotary", "rotary_of_call", "run_in_a_row", "saves_offloaded", "scaling", "sliding_window",
    "stock_mask", "stored_dtype", "take_held", "text_config", "ties_last_state", "to_forget", "unsupported",
    "use_backend", "visible",
]  # fmt: skip
