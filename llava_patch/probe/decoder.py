"""R-Probe, step 7 of 8: the decoder, a trained copy of the first quarter of the LLM's layers, then an MLP to pixels.

Source: "Detached Skip-Links and R-Probe", section 5.1.
"""

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import HostError, InputError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import compat, known
from llava_patch.hosts.anatomy import Anatomy, get_handle
from llava_patch.hosts.compat import call_layer, causal_mask, sliding_window
from llava_patch.hosts.projections import rotate
from llava_patch.probe.sequence import ProbeSequence, TokenGrid, arrange, frequencies, rotary_1d, rotary_2d

MIN_LAYERS = 4


def quarter(layers: int) -> int:
    """Decoder layers that the probe copies: ceil(L / 4), 8 of 32; a HostError where there are fewer than 4."""
    if layers < MIN_LAYERS:
        raise HostError(f"R-Probe needs an LLM of at least {MIN_LAYERS} decoder layers, this one has {layers}")
    return math.ceil(layers / 4)


def injection_layers(anatomy: Anatomy) -> tuple[int, ...]:
    """Layers of the probe whose input takes a tap of DeepStack, in the order of the taps; () without DeepStack.

    The model's own numbers; those from ceil(L/4) on lie behind the probe and are left out.
    """
    return tuple(layer for layer in _injected(anatomy) if layer < quarter(len(anatomy.layers)))


def _injected(anatomy: Anatomy) -> Sequence[int]:
    handle = get_handle(anatomy.model)
    return () if handle is None else handle.program().injections


class ProbeDecoder(nn.Module):
    """First ceil(L/4) decoder layers and the final norm of the model under test, then hidden -> 2 hidden -> pixels.

    Everything is float32 and shares no memory with the model; overridden forwards and hooks of its layers are left
    behind. What DeepStack adds to the image tokens is added in the layers that are here (`injection_layers`); a warning
    names those that are not. Of the grid only the number of pixels under a token is read; the seed is of the MLP's
    weights, the caller's random state is not touched. A HostError: fewer than 4 layers, weights that are quantised or
    not in memory, a decoder that is not known.
    """

    inv_freq: Tensor
    embedding_freq: Tensor

    def __init__(self, anatomy: Anatomy, grid: TokenGrid, rope: str = "attention", seed: int = 0) -> None:
        super().__init__()
        known.check_decoder(anatomy.decoder, "R-Probe", by_class=True)
        hidden = int(anatomy.text_config.hidden_size)
        device = next(anatomy.layers[0].parameters()).device
        n_layers = quarter(len(anatomy.layers))
        self.grid = grid
        self.rope = rope
        self.injection_layers = injection_layers(anatomy)
        if beyond := [str(layer) for layer in _injected(anatomy) if layer not in self.injection_layers]:
            what = "only some of" if self.injection_layers else "none of"
            warnings.warn(
                f"R-Probe has layers 0 to {n_layers - 1} of this model, so it sees {what} what DeepStack adds to the "
                f"image tokens: out of reach is what enters layer {', '.join(beyond)}",
                stacklevel=2,
            )
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
            place: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
            first, last = nn.Linear(hidden, 2 * hidden, **place), nn.Linear(2 * hidden, grid.pixels, **place)
            self.head = nn.Sequential(first, nn.GELU(), last).to(device)
        compat.prepare_layers(None, self.layers, UndoStack())
        for layer in self.layers:
            compat.use_backend(layer.self_attn, "sdpa", UndoStack())
        inv_freq = compat.inverse_frequencies(anatomy.decoder)
        if inv_freq is None:
            name = type(anatomy.decoder).__name__
            raise HostError(f"{name} has no rotary_emb.inv_freq: R-Probe needs a rotary decoder")
        inv_freq = inv_freq.detach().clone().to(device, torch.float32)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("embedding_freq", frequencies(hidden).to(device), persistent=False)
        self.requires_grad_(True)
        self.eval()  # no dropout: a measurement, and the same on every run

    @torch.no_grad()
    def start_at(self, constant: Tensor) -> None:
        """Centre the first answers on a constant patch, float [pixels]: steps are then spent on what the tokens say.

        It becomes the last Linear's bias (this project's choice, the paper does not tell how the MLP starts).
        """
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        last.bias.copy_(constant)

    def forward(
        self, image_tokens: Tensor, text_tokens: Tensor, sequence: ProbeSequence, injections: Tensor | None = None
    ) -> Tensor:
        """Rebuild the pixels under every target token.

        Args:
            image_tokens: float32 [batch, image tokens, hidden], projected, in the host's order, padded at the end.
            text_tokens: float32 [batch, text width, hidden], token embeddings padded at the end.
            sequence: from `build_sequence`, on the same device.
            injections: float32 [batch, layers, image tokens, hidden], what DeepStack adds in those of
                `injection_layers`; None when there are none.

        Returns:
            float32 [targets, pixels]: all targets of the first sample in the host's order, then of the second, ...

        Raises:
            InputError: injections for another number of layers, or a sequence longer than a sliding window.
        """
        hidden = self.hidden_states(image_tokens, text_tokens, sequence, injections)
        return self.head(hidden[sequence.target])

    def hidden_states(
        self, image_tokens: Tensor, text_tokens: Tensor, sequence: ProbeSequence, injections: Tensor | None = None
    ) -> Tensor:
        """Normed decoder states of every slot, float32 [batch, slots, hidden]; arguments as in `forward`."""
        given = 0 if injections is None else injections.shape[1]
        if given != len(self.injection_layers):
            raise InputError(
                f"R-Probe's decoder takes DeepStack's features for layers {list(self.injection_layers)}, got those of "
                f"{given} layers"
            )
        slots, window = sequence.order.shape[1], sliding_window(self.config)
        if window is not None and window < slots:
            raise InputError(
                f"this LLM attends {window} positions back (sliding_window), an image and its text are {slots}, so "
                "targets would not see all of the context: set text_config.sliding_window = None or use fewer tokens"
            )
        rotary = rotary_2d(sequence.positions, self.inv_freq)
        turn = None
        if self.rope == "embedding":
            # Every token carries the place it had in the image: rotating before or after reordering is the same.
            turn = _like(image_tokens, rotary_2d(sequence.positions, self.embedding_freq))
            rotary = rotary_1d(slots, self.inv_freq)
        is_image = (sequence.order < image_tokens.shape[1])[..., None]

        def place(tokens: Tensor, text: Tensor) -> Tensor:
            arranged = arrange(tokens, text, sequence.order)
            return arranged if turn is None else torch.where(is_image, rotate(arranged, *turn), arranged)

        hidden = place(image_tokens, text_tokens)
        rotary = _like(hidden, rotary)
        # Padding is at the end, where causality already hides it from every valid token: no padding mask is needed.
        mask = causal_mask(self.config, hidden)
        for number, layer in enumerate(self.layers):
            if injections is not None and number in self.injection_layers:
                added = injections[:, self.injection_layers.index(number)]
                hidden = hidden + place(added, torch.zeros_like(text_tokens))
            hidden = call_layer(layer, hidden, attention_mask=mask, position_embeddings=rotary)
        return self.norm(hidden)


def trained_parameters(decoder: ProbeDecoder) -> dict[str, Tensor]:
    """The weights that train, by name, in a fixed order."""
    return {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}


def _like(hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines in the dtype that they turn, as the hosts do in half precision."""
    return rotary[0].to(hidden.dtype), rotary[1].to(hidden.dtype)


def stock_copy(module: nn.Module, name: str, config: Any) -> nn.Module:
    """Deep copy of a module in float32, with nothing that was put on the instance from outside.

    `config` takes the place of every transformers configuration held inside. A HostError where weights are quantised,
    or not in memory.
    """
    for weight, parameter in module.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            why = "not in memory (offloaded)" if parameter.is_meta else f"quantised ({parameter.dtype})"
            raise HostError(f"R-Probe copies {name}, but its {weight} is {why}: load the model without that")
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
