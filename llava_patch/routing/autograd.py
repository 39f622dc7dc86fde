"""Where a graph is wanted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def trains(modules: Iterable[nn.Module]) -> bool:
    """Whether a gradient is wanted for any parameter of some modules."""
    return torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters())


def prime(states: Tensor, layer: nn.Module) -> Tensor:
    """Reentrant checkpointing gives no gradient at all unless an input requires one."""
    if not states.requires_grad and trains([layer]):
        states = states.detach().requires_grad_()
    return states
