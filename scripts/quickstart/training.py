"""Two stages that teach the small LLaVA-1.5 to read: the tower on patch labels, then the rest on answers.

Trained jointly from scratch it learns nothing within minutes. Once the tower can tell which character covers each
patch and which place that has in the string, the rest follows quickly, provided that the tower is frozen at first and
then trains slowly: at the full learning rate it forgets within fifty steps what it has learnt.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from . import questions
from .model import SmallLlava, normalise
from .prompts import IMAGE_TOKEN_INDEX, PromptEncoder

PHOTO_SHARE = 0.1  # of the images in the tower's stage
BLANK = 10  # patch class after the ten digits; the photographs' words follow it


@dataclass(frozen=True)
class Stage:
    """Length and step size of one stage.

    Attributes:
        steps: optimiser steps.
        learning_rate: at the end of the warm-up; falls along a half cosine to a twentieth.
        warmup: steps of linear warm-up.
        batch_size: images a step.
        weight_decay: of matrices; vectors have none.
        clip: largest gradient norm.
    """

    steps: int
    learning_rate: float = 2e-3
    warmup: int = 50
    batch_size: int = 64
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self):
        for name in ("steps", "warmup", "batch_size", "learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.95 * cosine + 0.05)


@dataclass(frozen=True)
class Batch:
    """Token ids of a training step.

    Attributes:
        ids: int64 [batch, tokens], padded with 0 on the right.
        images: float [images, 3, height, width].
        answer_mask: bool [batch, tokens], True where an answer is.
    """

    ids: torch.Tensor
    images: torch.Tensor
    answer_mask: torch.Tensor


def patch_labels(sample: questions.Sample, photo_words: list[str], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """What each patch of an image shows, and which place in the string that has.

    Args:
        sample: with an image.
        photo_words: every object word, in the order of their classes.
        grid: patches along each side.

    Returns:
        Two int64 arrays [grid * grid]: the digit, `BLANK`, or `BLANK + 1 +` the index of the photograph's word; and
        the digit's place counted from 1, or 0 where there is none.
    """
    if sample.photo is not None:
        word = BLANK + 1 + photo_words.index(sample.photo)
        return np.full(grid * grid, word), np.zeros(grid * grid, dtype=np.int64)
    image = sample.text_image
    patch = sample.pixels.shape[0] / grid
    middle = (np.arange(grid) + 0.5) * patch
    left, top, right, bottom = image.box
    distance = np.abs(middle[:, None] - image.centres[None, :, 0])
    # Generous bounds: a patch whose middle lies just outside a glyph still holds part of its ink.
    in_columns = distance.min(axis=1) <= 0.75 * (right - left) / len(image.text)
    in_rows = (middle >= top - 0.3 * patch) & (middle <= bottom + 0.3 * patch)
    inked = in_rows[:, None] & in_columns[None, :]
    nearest = distance.argmin(axis=1)
    digit = np.array([int(c) for c in image.text])[nearest]
    return np.where(inked, digit, BLANK).reshape(-1), np.where(inked, nearest + 1, 0).reshape(-1)


def make_batch(
    samples: list[questions.Sample],
    encoder: PromptEncoder,
    num_patches: int,
    with_system: np.ndarray,
    as_caption: np.ndarray,
) -> Batch:
    """Tokenises samples into one padded batch.

    Args:
        samples: what to train on.
        encoder: of prompts and answers.
        num_patches: placeholders per image.
        with_system: bool [batch], which prompts begin with the system prompt.
        as_caption: bool [batch], which samples are image and caption alone, as stage 1 has them.
    """
    rows = []
    for sample, system, caption in zip(samples, with_system, as_caption, strict=True):
        if caption and sample.pixels is not None:
            prompt, answer = encoder.caption_ids(sample.caption)
        else:
            prompt = encoder.prompt_ids(sample.question, sample.pixels is not None, bool(system))
            answer = encoder.answer_ids(sample.answer)
        rows.append((expand_image(prompt, num_patches), answer))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        mask[i, len(prompt) : len(prompt) + len(answer)] = True
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    return Batch(ids, normalise(torch.from_numpy(np.stack(pixels))), mask)


def expand_image(prompt: tuple[int, ...], num_patches: int) -> list[int]:
    """Repeats the image placeholder once per patch."""
    return [i for token in prompt for i in ([token] * num_patches if token == IMAGE_TOKEN_INDEX else [token])]


def _minimise(
    losses: Iterator[torch.Tensor],
    parameters: list[tuple[nn.Parameter, float]],
    stage: Stage,
    on_step: Callable[[int, float], None] | None,
) -> float:
    """Runs one stage with AdamW.

    Args:
        losses: one loss a step, computed when it is asked for.
        parameters: what to train, each with the factor on its learning rate; those without a gradient are left alone.
        stage: length and step size.
        on_step: called with the number of steps done and the loss.

    Returns:
        Seconds taken.
    """
    started = time.perf_counter()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, factor in parameters:
        decay = stage.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    optimiser = torch.optim.AdamW(
        [{"params": p, "factor": factor, "weight_decay": decay} for (factor, decay), p in groups.items()],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    for step in range(stage.steps):
        for group in optimiser.param_groups:
            group["lr"] = stage.rate(step) * group["factor"]
        loss = next(losses)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for parameter, _ in parameters], stage.clip)
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return time.perf_counter() - started


def pretrain_tower(
    model: SmallLlava,
    sampler: questions.Sampler,
    stage: Stage,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Teaches the tower to tell, from the hidden state LLaVA selects, what each patch shows.

    Args:
        model: its `tower` is trained in place.
        sampler: source of images.
        stage: length and step size.
        on_step: called with the number of steps done and the loss.

    Returns:
        Seconds taken.
    """
    grid = math.isqrt(model.num_patches)
    width = model.tower.config.hidden_size
    character = nn.Linear(width, BLANK + 1 + len(sampler.photo_words))
    # Without the place the language model would have to find out by itself which character comes first, and that
    # alone takes it longer than all the rest.
    place = nn.Linear(width, sampler.renderer.num_digits + 1)

    def losses() -> Iterator[torch.Tensor]:
        while True:
            # Some photographs, or their classes would drown; the rest digits.
            samples = [sampler.draw_image(photo=u < PHOTO_SHARE) for u in sampler.rng.random(stage.batch_size)]
            labels = [patch_labels(s, sampler.photo_words, grid) for s in samples]
            characters, places = (torch.from_numpy(np.stack(part)).flatten() for part in zip(*labels, strict=True))
            features = model.patch_features(normalise(torch.from_numpy(np.stack([s.pixels for s in samples]))))
            character_loss = nn.functional.cross_entropy(character(features).flatten(0, 1), characters)
            place_loss = nn.functional.cross_entropy(place(features).flatten(0, 1), places)
            yield character_loss + place_loss

    parameters = [*model.tower.parameters(), *character.parameters(), *place.parameters()]
    return _minimise(losses(), [(parameter, 1.0) for parameter in parameters], stage, on_step)


def train_answers(
    model: SmallLlava,
    encoder: PromptEncoder,
    sampler: questions.Sampler,
    stage: Stage,
    frozen_steps: int = 100,
    tower_rate: float = 0.2,
    system_prompt_share: float = 0.75,
    caption_share: float = 0.0,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Trains projector and language model on answers, and later the tower too.

    Args:
        model: trained in place.
        encoder: of prompts and answers.
        sampler: source of samples.
        stage: length and step size.
        frozen_steps: steps before the tower trains too.
        tower_rate: factor on the tower's learning rate.
        system_prompt_share: share of batches with the system prompt, as llava writes them; the others are as the HF
            chat template writes them.
        caption_share: share of samples that are image and caption alone, as stage 1 has them.
        on_step: called with the number of steps done and the loss.

    Returns:
        Seconds taken.
    """
    if not 0 <= system_prompt_share <= 1:
        raise ValueError(f"system_prompt_share must be between 0 and 1, not {system_prompt_share}")

    def losses() -> Iterator[torch.Tensor]:
        for step in itertools.count():
            model.tower.requires_grad_(step >= frozen_steps)
            samples = [sampler.draw() for _ in range(stage.batch_size)]
            # Whole batches, not single samples: a batch without the system prompt is half as long.
            system = np.full(stage.batch_size, sampler.rng.random() < system_prompt_share)
            captions = sampler.rng.random(stage.batch_size) < caption_share
            batch = make_batch(samples, encoder, model.num_patches, system, captions)
            yield model.loss(batch.ids, batch.images, batch.answer_mask)

    parameters = [(parameter, tower_rate) for parameter in model.tower.parameters()]
    parameters += [(p, 1.0) for part in (model.projector, model.language) for p in part.parameters()]
    return _minimise(losses(), parameters, stage, on_step)


def accuracy(
    model: SmallLlava,
    encoder: PromptEncoder,
    samples: list[questions.Sample],
    *,
    shuffled: bool = False,
    with_system: bool = True,
    batch_size: int = 128,
) -> float:
    """Share of samples whose greedy answer, end token included, is exactly right.

    Args:
        model: in float32.
        encoder: of prompts and answers.
        samples: with images; two may share neither question nor image.
        shuffled: gives every sample the next one's image.
        with_system: whether prompts begin with the system prompt.
        batch_size: images at once.
    """
    pixels = [s.pixels for s in samples]
    if shuffled:
        pixels = pixels[1:] + pixels[:1]
    by_length: dict[int, list[int]] = {}
    prompts = [encoder.prompt_ids(s.question, True, with_system) for s in samples]
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    was_training = model.training
    model.eval()
    right = 0
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            ids = torch.tensor([expand_image(prompts[i], model.num_patches) for i in rows])
            images = normalise(torch.from_numpy(np.stack([pixels[i] for i in rows])))
            wanted = [list(encoder.answer_ids(samples[i].answer)) for i in rows]
            out = model.generate(ids, images, max(map(len, wanted))).tolist()
            right += sum(answer[: len(want)] == want for answer, want in zip(out, wanted, strict=True))
    model.train(was_training)
    return right / len(samples)
