"""One forward pass seen layer by layer: hooks on a decoder's layers, and what is read there.

Hooks see the layers' own inputs and outputs, so the same code serves stock and patched models and every attention
backend. The side branch of a routed model is not part of `decoder.layers` and is not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_patch.diagnostics.attention import mass_on_keys
from llava_patch.errors import HostError, InputError
from llava_patch.hosts.anatomy import HF, LLAVA, Anatomy
from llava_patch.hosts.positions import hf_image_mask, llava_prepare
from llava_patch.hosts.projections import rotate, split_heads
from llava_patch.undo import UndoStack

NAN = float("nan")


@dataclass
class Trace:
    """What one sample's forward pass left behind; L layers, T tokens of which some are image.

    Attributes:
        image_mask: bool [T]; set when the host has placed the image features, before the first layer runs.
        states: output of each layer, [T, hidden], or [text tokens, hidden] in a layer that sees text only.
        image_cosine: per layer, mean cosine between input and output at image positions; NaN where absent.
        text_cosine: the same at text positions.
        mass: float32 [heads] per layer, text-to-image attention mass; zeros where image positions are absent.
    """

    image_mask: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    image_cosine: dict[int, float] = field(default_factory=dict)
    text_cosine: dict[int, float] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)

    def layer_mask(self, tokens: int, layer: int) -> Tensor:
        """Image positions among the tokens that a layer sees: bool [tokens].

        Raises:
            HostError: the layer sees neither every position nor exactly the text positions.
        """
        if self.image_mask is None:
            raise HostError("the decoder ran before the host told where the image features are")
        if tokens == len(self.image_mask):
            return self.image_mask
        if tokens == int((~self.image_mask).sum()):
            return torch.zeros(tokens, dtype=torch.bool, device=self.image_mask.device)
        raise HostError(
            f"layer {layer} sees {tokens} tokens, which is neither all {len(self.image_mask)} nor the "
            f"{int((~self.image_mask).sum())} text tokens of the sample; measure without pruning"
        )

    def rows(self, layer: int) -> Tensor:
        """Where each full position is in `states[layer]`: int64 [T], -1 where absent."""
        assert self.image_mask is not None
        if len(self.states[layer]) == len(self.image_mask):
            return torch.arange(len(self.image_mask), device=self.image_mask.device)
        text = (~self.image_mask).long()
        return torch.where(self.image_mask, -1, text.cumsum(0) - 1)


@contextlib.contextmanager
def traced(anatomy: Anatomy, chunk: int) -> Iterator[Trace]:
    """Watch the forward passes of one sample; every hook is gone afterwards, after an exception too.

    Args:
        anatomy: the host model.
        chunk: attention queries held at a time.

    Yields:
        The trace, filled by calling `run` inside the block.
    """
    trace = Trace()
    undo = UndoStack()
    try:
        for index, layer in enumerate(anatomy.layers):
            _watch_layer(trace, index, layer, undo)
            _watch_attention(trace, index, layer.self_attn, anatomy.text_config, chunk, undo)
        if anatomy.host == LLAVA:
            _watch_preparation(trace, anatomy, undo)
        yield trace
    finally:
        undo.unwind()


def run(anatomy: Anatomy, trace: Trace, sample: dict[str, Any]) -> None:
    """Run the model's own forward on one sample inside `traced`.

    Args:
        anatomy: the host model.
        trace: from `traced`.
        sample: keyword arguments of the model's forward, batch of one.

    Raises:
        InputError: a batch, or padding.
    """
    input_ids = sample["input_ids"]
    if input_ids.shape[0] != 1:
        raise InputError(f"saturation takes one sample at a time, got a batch of {input_ids.shape[0]}")
    mask = sample.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise InputError("saturation takes samples without padding: attention_mask holds zeros")
    if anatomy.host == HF:
        trace.image_mask = hf_image_mask(input_ids, anatomy.image_token_id)[0]
    anatomy.model(**{**sample, "use_cache": False})


def _hidden_argument(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.shape[0] != 1:
        raise InputError(f"saturation takes one sample at a time, but the decoder got {hidden.shape[0]}")
    return hidden[0]


def _watch_layer(trace: Trace, index: int, layer: nn.Module, undo: UndoStack) -> None:
    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        before = _hidden_argument(args, kwargs)
        states = (output[0] if isinstance(output, tuple) else output)[0]  # a tuple up to transformers 4.53
        image = trace.layer_mask(len(states), index).to(states.device)
        cosine = F.cosine_similarity(before.float(), states.float(), dim=-1)
        trace.image_cosine[index] = float(cosine[image].mean()) if bool(image.any()) else NAN
        trace.text_cosine[index] = float(cosine[~image].mean())
        trace.states[index] = states.detach()

    undo.push(layer.register_forward_hook(after, with_kwargs=True).remove)


def _watch_attention(trace: Trace, index: int, attention: Any, config: Any, chunk: int, undo: UndoStack) -> None:
    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = _hidden_argument(args, kwargs)
        image = trace.layer_mask(len(hidden), index).to(hidden.device)
        head_dim = int(module.head_dim)
        if not bool(image.any()):  # no image key to look at: zero by definition
            trace.mass[index] = torch.zeros(int(config.num_attention_heads))
            return
        rotary = kwargs.get("position_embeddings")
        if rotary is None:
            raise HostError(
                f"{type(module).__name__} does not take position_embeddings: rotary embedding outside the attention "
                "module needs transformers 4.48 or newer"
            )
        cos, sin = (part[0] for part in rotary)
        q = rotate(split_heads(module.q_proj(hidden[None])[0], head_dim), cos, sin)
        k = rotate(split_heads(module.k_proj(hidden[None])[0], head_dim), cos, sin)
        queries = text_after_image(image)
        window = getattr(config, "sliding_window", None)
        scaling = float(getattr(module, "scaling", head_dim**-0.5))
        trace.mass[index] = mass_on_keys(q, k, queries, image, scaling, window, chunk).cpu()

    undo.push(attention.register_forward_pre_hook(before, with_kwargs=True).remove)


def text_after_image(image: Tensor) -> Tensor:
    """Text positions behind the first image position: int64 [n]; they are the queries of the attention mass.

    Args:
        image: bool [tokens].
    """
    return (~image & (image.long().cumsum(0) > 0)).nonzero().flatten()


def _watch_preparation(trace: Trace, anatomy: Anatomy, undo: UndoStack) -> None:
    # Around whatever is there, so that a routed model's own bookkeeping still runs.
    prepare: Any = anatomy.model.prepare_inputs_labels_for_multimodal

    def prepare_and_note(*args: Any, **kwargs: Any) -> tuple:
        outputs, image_mask = llava_prepare(prepare, anatomy.image_token_id, *args, **kwargs)
        trace.image_mask = None if image_mask is None else image_mask[0]
        return outputs

    undo.set_attribute(anatomy.model, "prepare_inputs_labels_for_multimodal", prepare_and_note)


def lens_kl(anatomy: Anatomy, trace: Trace, chunk: int) -> tuple[list[float], list[float]]:
    """Logit lens: KL(final || layer) through the model's own final norm and head.

    Args:
        anatomy: the host model.
        trace: a finished trace.
        chunk: positions whose logits [chunk, vocabulary] are held at a time.

    Returns:
        (image, text): per layer the mean over positions in nats; NaN where positions are absent, in that layer or in
        the last one. The last layer's is 0 by definition.
    """
    assert trace.image_mask is not None
    n_layers = len(anatomy.layers)
    rows = [trace.rows(layer) for layer in range(n_layers)]
    results = []
    for positions in (trace.image_mask.nonzero().flatten(), (~trace.image_mask).nonzero().flatten()):
        sums = [0.0] * n_layers
        for part in positions.split(chunk):
            final = _lens(anatomy, trace, n_layers - 1, rows, part)
            for layer in range(n_layers):
                log_probs = None if final is None else _lens(anatomy, trace, layer, rows, part)
                if log_probs is None:
                    sums[layer] = NAN
                    continue
                assert final is not None
                sums[layer] += float((final.exp() * (final - log_probs)).sum())
        results.append([value / max(len(positions), 1) for value in sums])
    return results[0], results[1]


def _lens(anatomy: Anatomy, trace: Trace, layer: int, rows: list[Tensor], positions: Tensor) -> Tensor | None:
    take = rows[layer][positions]
    if bool((take < 0).any()):
        return None
    states = trace.states[layer]
    logits = anatomy.lm_head(anatomy.norm(states[take.to(states.device)][None]))
    return logits[0].float().log_softmax(-1)
