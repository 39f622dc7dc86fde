"""Weights that truly saturate: the first layers read the image, the others look at all positions alike.

Two channels of the residual stream say what a position is: KIND is positive at image positions and negative at text,
ONE is positive everywhere. Queries are made of ONE and keys of KIND in the slowest rotary pair, so that a reading layer
puts nearly all its attention on the image. A layer with zero queries attends to every position before it alike.
Only one layer writes to the residual stream, so that the logit lens falls there and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KIND, ONE = 0, 1
SIZE = 30.0


def saturate(layers: Any, embedding: nn.Module, projector: nn.Module, reading: int, writing: int) -> None:
    """Change a model's weights in place: attention falls at layer `reading`, the logit lens at layer `writing`.

    Args:
        layers: the decoder layers.
        embedding: the token embedding.
        projector: its last child is a Linear.
        reading: how many layers read the image, 1 or more; the window's first layer.
        writing: the one layer that writes, `reading` or later; the window's last layer.
    """
    last = list(projector.children())[-1]
    with torch.no_grad():
        for channel, text, image in ((KIND, -SIZE, SIZE), (ONE, SIZE, SIZE)):
            embedding.weight[:, channel] = text
            last.weight[channel] = 0
            last.bias[channel] = image
        for index, layer in enumerate(layers):
            attention = layer.self_attn
            slow = attention.head_dim // 2 - 1
            for linear, channel in ((attention.q_proj, ONE), (attention.k_proj, KIND)):
                linear.weight.zero_()
                if index < reading:
                    linear.weight[slow :: attention.head_dim, channel] = 1.0
            if index != writing:
                attention.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            else:
                layer.mlp.down_proj.weight.mul_(100 / layer.mlp.down_proj.weight.norm())
