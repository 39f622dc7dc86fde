"""The side branch: trainable decoder layers that the image positions take instead of the deep layers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llava_patch.hosts import compat, storage, zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing.layers import Stream, prime, trains

SIDE_BRANCH = "side_branch"


def copy_layers(layers: Iterable[nn.Module], dtype: torch.dtype) -> nn.ModuleList:
    """Copies of decoder layers that share nothing with them and can train, see `storage.plain_copy`.

    Of quantised layers they have the dequantised values in `dtype`, the decoder's: the side branch trains in full.
    """
    return nn.ModuleList(storage.plain_copy(layer, dtype) for layer in layers)


def parameters(anatomy: Anatomy) -> list[nn.Parameter]:
    """Parameters of the side branch; empty when there is none."""
    branch = getattr(anatomy.decoder, SIDE_BRANCH, None)
    return [] if branch is None else list(branch.parameters())


def run(anatomy: Anatomy, states: Tensor, stream: Stream) -> Tensor:
    """Run the branch on the image positions `stream`: [batch, image positions, hidden], as layer split-1 left them."""
    for layer in getattr(anatomy.decoder, SIDE_BRANCH):
        states = prime(states, layer)
        states = compat.call_layer(
            layer, states, attention_mask=stream.mask(layer), position_embeddings=stream.rotary,
            checkpoint=states.requires_grad,
        )  # fmt: skip
    return states


def wants_gradient(anatomy: Anatomy) -> bool:
    """Whether a training step must reach the side branch."""
    branch = getattr(anatomy.decoder, SIDE_BRANCH, None)
    return branch is not None and anatomy.decoder.training and trains(branch)


def zero_gradient_pass(anatomy: Anatomy, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The side branch on one made-up position, times zero: a scalar 0 whose gradient reaches its weights.

    A rank or micro-batch without an image must still give the side branch a gradient (of zero), or the others wait for
    it in the all-reduce for ever. Call it at the split: autograd runs what was made last first. `hidden` [batch,
    tokens, hidden] gives dtype and device, `rotary` (cos, sin) of any positions when they are at hand.
    """
    row = torch.zeros_like(hidden[:1, :1])
    if rotary is None:
        rotary = compat.rotary(anatomy.decoder, row, torch.zeros(1, 1, dtype=torch.long, device=row.device))
    here = (rotary[0][:1, :1], rotary[1][:1, :1])
    for layer in getattr(anatomy.decoder, SIDE_BRANCH):
        row = prime(row, layer)
        row = compat.call_layer(layer, row, position_embeddings=here, checkpoint=row.requires_grad)
    return 0.0 * row.sum()


def keeps_order(anatomy: Anatomy, keys_layers: Iterable[nn.Module]) -> bool:
    """Whether a batch without an image must run the same modules in the same order as one that routes.

    DeepSpeed ZeRO-1 and -2 add up over the ranks whatever gradients come next, in flat buckets that know no names: in
    another order they fail, or add one parameter's gradient to another's. So also where the side branch is frozen but
    one of `keys_layers` trains, which project the image's keys apart from the text's.

    Weights that ZeRO-3 or FSDP has partitioned are put together module by module, by all ranks at once, and ZeRO-3
    counts modules without weights too: by the order of the first step it decides what to fetch ahead in the next.
    """
    learns = wants_gradient(anatomy) or (anatomy.decoder.training and trains(keys_layers))
    return learns or zero.is_partitioned(anatomy.layers[0].parameters())
