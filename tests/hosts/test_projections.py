"""Keys and values of some positions, as the layer's own attention would make them."""

import torch

from llava_patch.hosts import projections
from llava_patch.hosts.anatomy import find


def test_projections_are_called_in_the_layers_own_order(host):
    """Adapters on them may draw random numbers (LoRA's dropout): another order would draw others."""
    anatomy = find(host.model)
    layer, called = anatomy.layers[0], []
    attention = layer.self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda *_, name=name: called.append(name))
        for name in ("k_proj", "v_proj")
    ]
    states = torch.randn(1, 3, attention.k_proj.in_features)
    rotary = (torch.ones(1, 3, attention.head_dim), torch.zeros(1, 3, attention.head_dim))
    try:
        keys, values = projections.keys_values(layer, states, rotary)
    finally:
        for hook in hooks:
            hook.remove()
    assert called == ["k_proj", "v_proj"]
    assert torch.equal(keys, projections.keys(layer, states, rotary)) and values.shape == keys.shape
