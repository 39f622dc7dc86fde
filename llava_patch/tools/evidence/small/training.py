"""How the small models are trained: one loop, the tower on its patches, the decoder on questions."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.hosts import anatomy

IGNORED = -100
"""The label of a position that is not asked, as in transformers."""


@dataclass(frozen=True)
class Recipe:
    """How a loss is minimised.

    Attributes:
        steps: optimizer steps.
        rate: highest learning rate.
        optimizer: "adamw" or "sgd".
        warmup: steps in which the rate rises linearly; no more than a fifth of all.
        floor: share of `rate` at which the cosine ends; 1: a constant rate.
        decay: weight decay of matrices; norms and biases have none.
        betas: of AdamW.
        momentum: of SGD.
        clip: largest norm of the gradient; None: any.
    """

    steps: int
    rate: float = 3e-3
    optimizer: str = "adamw"
    warmup: int = 50
    floor: float = 0.05
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.0
    clip: float | None = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, 0-based."""
        warmup = min(self.warmup, self.steps // 5)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / (warmup + 1)) * (self.floor + (1 - self.floor) * cosine)


def fit(
    loss: Callable[[int], Tensor],
    parameters: Iterable[nn.Parameter],
    recipe: Recipe,
    before_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimise `loss(step)`, a scalar that draws its own batch, over the parameters.

    Args:
        loss: called once a step, 0-based.
        parameters: what trains; each must ask for a gradient.
        recipe: how.
        before_step: called with the step when the gradients are there, before they are clipped.

    Returns:
        The loss of each step.
    """
    trained = list(parameters)
    optimizer = _optimizer(trained, recipe)
    losses: list[Tensor] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if before_step is not None:
            before_step(step)
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses).tolist() if losses else []


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    matrices, vectors = ([p for p in parameters if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.rate, momentum=recipe.momentum)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.rate, betas=recipe.betas)
    raise ValueError(f'Recipe.optimizer = {recipe.optimizer!r}: expected "adamw" or "sgd"')


def tower_states(model: Any, pixels: Tensor) -> Tensor:
    """What the projector reads, [images, patches, channels], with its gradient; for towers with a CLS token."""
    parts = anatomy.find(model)
    states = parts.tower(pixels, output_hidden_states=True).hidden_states
    return states[parts.main_block][:, parts.dropped_tokens :]


def pretrain_tower(
    model: Any,
    draw: Callable[[], tuple[Tensor, Tensor]],
    classes: int,
    recipe: Recipe,
    seed: int,
    words: Tensor | None = None,
) -> float:
    """Teach the tower what each patch shows: a dense task, without which so small a model does not learn to read.

    Args:
        model: of `build`.
        draw: draws (pixels [images, 3, side, side], labels int64 [images, patches, parts]) on the CPU: what each part
            of a patch shows, one of `classes`.
        classes: the last one is "nothing".
        recipe: how.
        seed: of the heads that read the answers off, which are thrown away.
        words: [classes - 1, hidden] word embeddings of the other classes. With them the projector is trained as well,
            and its output must be like the word of the patch's first part, in direction and size: patches begin where
            the decoder's words are, as they do behind LLaVA's stage 1. They stay as they are.

    Returns:
        Share of parts named right in the last ten batches.
    """
    parts = anatomy.find(model)
    trained = list(parts.tower.parameters()) + (list(parts.projector.parameters()) if words is not None else [])
    labels_shape = draw()[1].shape[-1]
    width = parts.vision_width if words is None else words.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(labels_shape)).to(model.device)
    right: list[Tensor] = []

    def loss(step: int) -> Tensor:
        pixels, labels = (tensor.to(model.device) for tensor in draw())
        states = tower_states(model, pixels)
        states = states if words is None else parts.projector(states)
        logits = torch.stack([head(states) for head in heads], 2)  # [images, patches, parts, classes]
        value = states.new_zeros(())
        if words is not None:
            logits = torch.cat([_like(words, states, logits[:, :, 0]), logits[:, :, 1:]], 2)
            value = (states.square().mean().sqrt() / words.square().mean().sqrt() - 1).square()
        if step >= recipe.steps - 10:
            right.append((logits.argmax(-1) == labels).float().mean().detach())
        return value + nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten())

    model.requires_grad_(True)
    fit(loss, [*trained, *heads.parameters()], recipe)
    return torch.stack(right).mean().item()


def _like(words: Tensor, states: Tensor, logits: Tensor) -> Tensor:
    """Logits of the first part, [images, patches, 1, classes]: likeness to each word; "nothing" keeps its own."""
    return torch.cat([states @ words.T, logits[..., -1:]], -1)[:, :, None]


@dataclass(frozen=True)
class Questions:
    """Images, and several questions about each in one sequence, none of which sees another.

    Attributes:
        pixels: [images, 3, side, side].
        prefix: int64 [images, tokens], what all questions of an image share, the image's places included.
        questions: int64 [images, questions, tokens], answers included.
        labels: int64, of the same shape: what is to be said behind each token, or IGNORED.
        lens: layer -> labels of the same shape: what the model's own norm and head are to read from that layer's
            output already (deep supervision).
    """

    pixels: Tensor
    prefix: Tensor
    questions: Tensor
    labels: Tensor
    lens: Mapping[int, Tensor] = field(default_factory=dict)

    def mask(self) -> Tensor:
        """What is added to the attention's scores, [1, 1, tokens, tokens]: 0, or the lowest number where unseen."""
        prefix, (count, length) = self.prefix.shape[1], self.questions.shape[1:]
        owner = torch.full((prefix + count * length,), -1)
        owner[prefix:] = torch.arange(count).repeat_interleave(length)
        seen = (owner[None] == -1) | (owner[None] == owner[:, None])
        seen &= torch.ones_like(seen).tril()
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    def positions(self) -> Tensor:
        """Position ids, [1, tokens]: each question as if it were the only one."""
        prefix, (count, length) = self.prefix.shape[1], self.questions.shape[1:]
        return torch.cat([torch.arange(prefix), prefix + torch.arange(length).repeat(count)])[None]


def run_questions(model: Any, asked: Questions) -> Any:
    """The model's output for such a sequence, all hidden states included."""
    ids = torch.cat([asked.prefix, asked.questions.flatten(1)], 1).to(model.device)
    return model(
        input_ids=ids, pixel_values=asked.pixels.to(model.device), use_cache=False, output_hidden_states=True,
        attention_mask=asked.mask().to(model.device).expand(len(ids), -1, -1, -1),
        position_ids=asked.positions().to(model.device),
    )  # fmt: skip


def question_loss(model: Any, asked: Questions, out: Any, lens: bool = True) -> Tensor:
    """Cross-entropy of the answers, and with `lens` of what the layers named there are to say; a scalar."""
    parts = anatomy.find(model)
    begin = asked.prefix.shape[1]

    def of(logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.to(logits.device).flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED)

    value = of(out.logits[:, begin:], asked.labels)
    for layer, labels in (asked.lens if lens else {}).items():
        state = out.hidden_states[layer + 1][:, begin:]
        value = value + of(parts.lm_head(parts.norm(state)), labels)
    return value


def train_decoder(
    model: Any,
    draw: Callable[[], Questions],
    recipe: Recipe,
    lens_until: float = 1.0,
    also: Callable[[Questions, Any], Tensor] | None = None,
) -> list[float]:
    """Train projector, decoder and head on questions; the tower stays as it is, as in LLaVA.

    Args:
        model: of `build`.
        draw: draws a batch.
        recipe: how.
        lens_until: share of the steps that have the deep supervision.
        also: a further loss of a batch and the model's output for it.

    Returns:
        The loss of each step.
    """
    parts = anatomy.find(model)
    model.requires_grad_(True)
    parts.tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(step: int) -> Tensor:
        asked = draw()
        out = run_questions(model, asked)
        value = question_loss(model, asked, out, lens=step < lens_until * recipe.steps)
        return value if also is None else value + also(asked, out)

    model.train()
    losses = fit(loss, trained, recipe)
    model.eval()
    return losses
