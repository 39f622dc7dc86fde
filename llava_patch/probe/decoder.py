"""The probe's decoder: the first quarter of the LLM's layers, copied and trained, then an MLP to pixels.

Source: "Detached Skip-Links and R-Probe", section 5.1.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.errors import HostError
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.hosts.compat import call_layer, causal_mask
from llava_patch.hosts.projections import rotate
from llava_patch.probe.rotary import frequencies, rotary_1d, rotary_2d
from llava_patch.probe.sequence import ProbeSequence, TokenGrid, arrange

MIN_LAYERS = 4


def quarter(layers: int) -> int:
    """Decoder layers that the probe copies: ceil(L / 4), 8 of 32.

    Raises:
        HostError: fewer than 4 layers have no first quarter.
    """
    if layers < MIN_LAYERS:
        raise HostError(f"R-Probe needs an LLM of at least {MIN_LAYERS} decoder layers, this one has {layers}")
    return math.ceil(layers / 4)


class ProbeDecoder(nn.Module):
    """First ceil(L/4) decoder layers and the final norm of the model under test, then hidden -> 2 hidden -> pixels.

    Everything is float32 and shares no memory with the model. The copies are stock layers: overridden forwards and
    hooks that a patch or a dispatcher put on the model's own layers are left behind.

    Args:
        anatomy: the model under test.
        grid: its visual tokens.
        rope: "attention" or "embedding", see `RProbe.rope`.
        seed: of the MLP's initial weights; the caller's random state is not touched.

    Raises:
        HostError: fewer than 4 layers, weights that are quantised or not in memory, unknown rotary embedding.
    """

    inv_freq: Tensor
    embedding_freq: Tensor

    def __init__(self, anatomy: Anatomy, grid: TokenGrid, rope: str = "attention", seed: int = 0) -> None:
        super().__init__()
        hidden = int(anatomy.text_config.hidden_size)
        device = next(anatomy.layers[0].parameters()).device
        n_layers = quarter(len(anatomy.layers))
        self.grid = grid
        self.rope = rope
        # sdpa whatever the model runs: flash attention has no float32.
        self.config = copy.deepcopy(anatomy.text_config)
        self.config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList(
            stock_copy(layer, f"decoder layer {i}", self.config).to(device)
            for i, layer in enumerate(anatomy.layers[:n_layers])
        )
        self.norm = stock_copy(anatomy.norm, "the decoder's final norm", self.config).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Linear(hidden, 2 * hidden, device="cpu", dtype=torch.float32),
                nn.GELU(),
                nn.Linear(2 * hidden, grid.pixels, device="cpu", dtype=torch.float32),
            ).to(device)
        self.register_buffer("inv_freq", _host_frequencies(anatomy).to(device), persistent=False)
        self.register_buffer("embedding_freq", frequencies(hidden).to(device), persistent=False)
        self.requires_grad_(True)
        self.eval()  # no dropout: a measurement, and the same on every run

    @torch.no_grad()
    def start_at(self, constant: Tensor) -> None:
        """Centre the first answers on a constant patch, so that steps are spent on what the tokens say.

        Args:
            constant: [pixels], the mean training target; it becomes the bias of the last Linear (this project's
                choice, the paper does not tell how the MLP starts).
        """
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        last.bias.copy_(constant)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, sequence: ProbeSequence) -> Tensor:
        """Rebuild the pixels under every target token.

        Args:
            image_tokens: float32 [batch, image tokens, hidden], projected visual tokens in raster order.
            text_tokens: float32 [batch, text width, hidden], token embeddings padded at the end.
            sequence: from `build_sequence`, on the same device.

        Returns:
            float32 [targets, pixels]: all targets of the first sample in raster order, then of the second, ...
        """
        hidden = self.hidden_states(image_tokens, text_tokens, sequence)
        return self.head(hidden[sequence.target])

    def hidden_states(self, image_tokens: Tensor, text_tokens: Tensor, sequence: ProbeSequence) -> Tensor:
        """Normed decoder states of every slot, float32 [batch, slots, hidden]; arguments as in `forward`."""
        if self.rope == "embedding":
            places = self.grid.positions(image_tokens.device)
            image_tokens = rotate(image_tokens, *rotary_2d(places, self.embedding_freq))
            rotary = rotary_1d(sequence.order.shape[1], self.inv_freq)
        else:
            rotary = rotary_2d(sequence.positions, self.inv_freq)
        hidden = arrange(image_tokens, text_tokens, sequence.order)
        rotary = (rotary[0].to(hidden.dtype), rotary[1].to(hidden.dtype))  # as the host does in half precision
        # Padding is at the end, where causality already hides it from every valid token: no padding mask is needed.
        mask = causal_mask(self.config, hidden)
        for layer in self.layers:
            hidden = call_layer(layer, hidden, attention_mask=mask, position_embeddings=rotary)
        return self.norm(hidden)


def stock_copy(module: nn.Module, name: str, config: Any) -> nn.Module:
    """Deep copy of a module in float32, with nothing that was put on the instance from outside.

    Args:
        module: the module; it is not changed.
        name: what to call it in an error.
        config: takes the place of every transformers configuration held inside.

    Raises:
        HostError: its weights are quantised, or not in memory.
    """
    for parameter_name, parameter in module.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            why = "not in memory (offloaded)" if parameter.is_meta else f"quantised ({parameter.dtype})"
            raise HostError(f"R-Probe copies {name}, but its {parameter_name} is {why}: load the model without that")
    # Overridden forwards and hooks may hold the whole model: the memo keeps deepcopy from following them.
    memo: dict[int, Any] = {}
    for part in module.modules():
        for key, value in vars(part).items():
            if key in ("forward", "_old_forward", "_hf_hook"):
                memo[id(value)] = None
            elif key.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif hasattr(value, "_attn_implementation"):
                memo[id(value)] = config
    clone = copy.deepcopy(module, memo)
    for part in clone.modules():
        for key in ("forward", "_old_forward", "_hf_hook"):
            vars(part).pop(key, None)
    return clone.to(torch.float32)


def _host_frequencies(anatomy: Anatomy) -> Tensor:
    """Rotary frequencies of the model under test, float32 [head_dim / 2]."""
    inv_freq = getattr(getattr(anatomy.decoder, "rotary_emb", None), "inv_freq", None)
    if not isinstance(inv_freq, Tensor):
        raise HostError(f"{type(anatomy.decoder).__name__} has no rotary_emb.inv_freq: R-Probe needs a rotary decoder")
    return inv_freq.detach().clone().to(torch.float32)
