"""The side branch: trainable decoder layers that the image positions take instead of the deep layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llava_patch.hosts import compat
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing.autograd import prime, trains
from llava_patch.routing.streams import Stream

SIDE_BRANCH = "side_branch"


def copy_layers(layers: Iterable[nn.Module]) -> nn.ModuleList:
    """Copies of decoder layers, with weights of their own."""
    return nn.ModuleList(copy.deepcopy(layer) for layer in layers)


def parameters(anatomy: Anatomy) -> list[nn.Parameter]:
    """Parameters of the side branch; empty when there is none."""
    branch = getattr(anatomy.decoder, SIDE_BRANCH, None)
    return [] if branch is None else list(branch.parameters())


def run(anatomy: Anatomy, states: Tensor, stream: Stream) -> Tensor:
    """Run the branch.

    Args:
        anatomy: a routed host model.
        states: [batch, image positions, hidden], what layer split-1 made of them.
        stream: those positions.

    Returns:
        [batch, image positions, hidden].
    """
    for layer in getattr(anatomy.decoder, SIDE_BRANCH):
        states = prime(states, layer)
        states = compat.call_layer(
            layer, states, attention_mask=stream.mask(compat.attention_of(layer.self_attn.config)),
            position_embeddings=stream.rotary, checkpoint=states.requires_grad,
        )  # fmt: skip
    return states


def wants_gradient(anatomy: Anatomy) -> bool:
    """Whether a training step must reach the side branch."""
    branch = getattr(anatomy.decoder, SIDE_BRANCH, None)
    return branch is not None and anatomy.decoder.training and trains(branch)


def keep_in_graph(anatomy: Anatomy, hidden: Tensor) -> Tensor:
    """Add the side branch's output on a dummy row, times zero.

    A rank or micro-batch without an image must still give the side branch a gradient (of zero), or the others wait for
    it in the all-reduce for ever.

    Args:
        anatomy: a routed host model.
        hidden: [batch, tokens, hidden].
    """
    row = torch.zeros_like(hidden[:1, :1])
    rotary = anatomy.decoder.rotary_emb(row, torch.zeros(1, 1, dtype=torch.long, device=row.device))
    for layer in getattr(anatomy.decoder, SIDE_BRANCH):
        row = prime(row, layer)
        row = compat.call_layer(layer, row, position_embeddings=rotary, checkpoint=row.requires_grad)
    return hidden + 0.0 * row.sum()
