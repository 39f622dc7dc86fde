"""Decoders for chain reading whose reading layers are where they are wanted.

Two layers learn to take one step: to find the letter's patch and to say the letter beside it. A deeper decoder begins
with copies of the pair where it is to read; the layers between are new. Then all of it is trained on answers, with deep
supervision of the first steps, and may move what it reads to where it likes: where that is, is measured (VTW sweep).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.hosts import anatomy, compat
from llava_patch.tools.evidence.small import chain, training
from llava_patch.tools.evidence.small.model import build
from llava_patch.tools.evidence.small.training import IGNORED, Questions, Recipe

LAYERS = 8
PAIR = 2
"""Layers that take one step."""
LANGUAGE = "language_model"
RATE = 3e-3
PICTURES, QUESTIONS = 16, 8  # of a batch


@dataclass(frozen=True)
class Stack:
    """A decoder of `LAYERS` layers.

    Attributes:
        pairs: first layer of each pair, in order: as many as a question may have steps. Of a pair that begins at the
            last layer the second one is left out: norm and head say what it would.
        turned: whether the last pair is kept from reading image states that skip what lies before it: see
            `unread_loss`. Such a base is planted: its middle layers change the image states in a way that the last pair
            needs, which a base trained on answers alone has no reason to do.
    """

    pairs: tuple[int, ...]
    turned: bool = False

    @property
    def lens(self) -> dict[int, int]:
        """Layer -> steps that its output has taken, by deep supervision; the last pair has the answers themselves."""
        ends = [first + PAIR - 1 for first in self.pairs] + [LAYERS - 1]
        lens = {end: taken for taken, end in enumerate(ends[:-1], 1) if end < LAYERS - 1}
        before = self.pairs[-1] - 1  # what the middle must hold on to
        return {**lens, before: len(self.pairs) - 1}

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps that are asked for."""
        return tuple(range(1, len(self.pairs) + 1))


STACKS = {
    "early": Stack((0, 2)),
    "late": Stack((0, 7)),
    "sixth": Stack((0, 6)),
    "turned": Stack((0, 7), turned=True),
    "ladder": Stack((0, 2, 7)),
}
"""Bases by name: where the last step is read: early; at the last layer; one before it; at the last one behind a middle
that image states must pass; at the last one, of three steps."""


def new(seed: int, layers: int = LAYERS) -> Any:
    """A model of that many layers for chain reading, untrained."""
    return build(chain.VISION, chain.text(layers=layers), chain.IMAGE, seed)


def loaded(weights: Mapping[str, Tensor], device: torch.device | None = None) -> Any:
    """The model of `LAYERS` layers with weights that were kept."""
    model = new(0)
    model.load_state_dict(dict(weights))
    return model.to(device) if device is not None else model


def one_step(seed: int, device: torch.device, tower_steps: int = 700, steps: int = 400) -> tuple[Any, dict[str, Any]]:
    """Tower, projector and a decoder of two layers that takes one step.

    The head begins as the word embeddings, so that what a layer says is what the next one finds a patch by.

    Returns:
        (the model, {"tower": share of letters that the tower names, "right": of one-step questions}).
    """
    model = new(seed, PAIR).to(device)
    parts = anatomy.find(model)
    words = parts.embed_tokens.weight[chain.LETTER : chain.LETTER + chain.BLANK].detach().clone()
    with torch.no_grad():
        parts.lm_head.weight.copy_(parts.embed_tokens.weight / 4)
    task = chain.Chain(seed, steps=(1,))
    tower = training.pretrain_tower(model, task.patches(64), chain.BLANK + 1, Recipe(tower_steps, RATE), seed, words)
    training.train_decoder(model, lambda: task.batch(PICTURES, QUESTIONS).questions(), Recipe(steps, RATE))
    answered = chain.right(model, chain.held_out(seed + 1000, 512, 1))
    return model, {"tower": tower, "right": answered.float().mean().item()}


def stack(first: Mapping[str, Tensor], shape: Stack, seed: int) -> Any:
    """The deep decoder as it begins: the pair of layers `first` at each of its places, new layers elsewhere."""
    return put(first, {pair + i: i for pair in shape.pairs for i in range(PAIR) if pair + i < LAYERS}, seed)


def put(
    trained: Mapping[str, Tensor], sources: Mapping[int, int], seed: int, quiet: float = 1.0, last: Any = None
) -> Any:
    """A decoder of `LAYERS` layers with trained weights in some of them.

    Args:
        trained: of a decoder of any depth; what is no layer is taken as it is.
        sources: layer -> which of the trained decoder's it is a copy of; others are new.
        seed: of the new ones.
        quiet: what new layers write is multiplied by it, so that they pass on what came before.
        last: weights of another decoder, whose first layer becomes the last one.
    """
    model = new(seed + 7)
    state = model.state_dict()
    for name, tensor in state.items():
        before, found, rest = name.partition(".layers.")
        if not found or LANGUAGE not in before:
            tensor.copy_(trained[name])
            continue
        number, _, rest = rest.partition(".")
        if last is not None and int(number) == LAYERS - 1:
            tensor.copy_(last[f"{before}.layers.0.{rest}"])
        elif (source := sources.get(int(number))) is not None:
            tensor.copy_(trained[f"{before}.layers.{source}.{rest}"])
        elif rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            tensor.mul_(quiet)
    model.load_state_dict(state)
    return model


def train(model: Any, shape: Stack, seed: int, steps: int, rate: float = RATE) -> list[float]:
    """Train a stacked decoder on answers; returns the loss of each step.

    Args:
        model: of `stack`.
        shape: what it is to become.
        seed: of what is drawn.
        steps: optimizer steps.
        rate: highest learning rate.
    """
    task = chain.Chain(seed + 200, steps=shape.steps)
    picks = torch.Generator().manual_seed(seed)

    def unread(asked: Questions, out: Any) -> Tensor:
        source = int(torch.randint(*SKIPS, (), generator=picks))
        return TURN * unread_loss(model, asked, out, source, shape.pairs[-1])

    return training.train_decoder(
        model, lambda: task.batch(PICTURES, QUESTIONS).questions(shape.lens), Recipe(steps, rate),
        also=unread if shape.turned else None,
    )  # fmt: skip


TURN = 0.5
"""Weight of `unread_loss`."""
SKIPS = (2, 6)
"""Image states before these layers, the last excluded, must not be readable by the last pair of a turned base."""


def unread_loss(model: Any, asked: Questions, out: Any, source: int, reader: int) -> Tensor:
    """How much of the answer the layers from `reader` on read from image states that skip the layers before them.

    They run once more with the image positions of their input replaced by those of layer `source`'s input; the loss is
    the cross-entropy of their answers to the uniform distribution over letters, beyond its least.
    """
    parts = anatomy.find(model)
    states, earlier = out.hidden_states[reader], out.hidden_states[source]
    image = torch.cat([asked.prefix == chain.IMAGE, torch.zeros_like(asked.questions.flatten(1), dtype=torch.bool)], 1)
    states = torch.where(image.to(states.device)[..., None], earlier, states)
    mask = asked.mask().to(states.device).expand(len(states), -1, -1, -1)
    rotary = compat.rotary(parts.decoder, states, asked.positions().to(states.device))
    for layer in list(parts.layers)[reader:]:
        states = compat.call_layer(layer, states, attention_mask=mask, position_embeddings=rotary)
    logits = parts.lm_head(parts.norm(states[:, asked.prefix.shape[1] :]))
    deepest = asked.questions[..., 1] == chain.STEPS + (asked.questions[..., 1].max() - chain.STEPS)
    wanted = (asked.labels != IGNORED) & deepest[..., None]
    letters = logits[wanted.flatten(1).to(logits.device)][:, chain.LETTER : chain.LETTER + chain.BLANK]
    said = nn.functional.log_softmax(letters, -1)
    return -said.mean() - torch.log(torch.tensor(float(chain.BLANK)))
