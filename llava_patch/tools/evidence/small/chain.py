"""Chain reading: a picture of letter pairs (A→C, C→F, …), and a question that follows them: "two steps on from A".

Each step is a look at the image that cannot begin before the one before it has ended, so the number of steps decides
how many layers must read the image, and where the last of them may be. One step is the negative control of every claim
about deep layers: one early look answers it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from llava_patch.core import extras
from llava_patch.tools.evidence.small.model import Text, Vision
from llava_patch.tools.evidence.small.training import IGNORED, Questions

LETTERS = "ABCDEFHKLMNPRSTX"
BLANK = len(LETTERS)
GRID, CELL = 4, 28  # patches a side, pixels of a patch
SIZE, CELLS = GRID * CELL, GRID * GRID
PAIRS = 8  # patches that show a pair
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
HEIGHTS = range(13, 18)  # font sizes in pixels
HELD_OUT = 7  # every seventh rendering of a letter is kept from training

PAD, BOS, IMAGE, COLON = range(4)
LETTER = 4  # LETTER + i: the i-th letter
STEPS = LETTER + len(LETTERS)  # STEPS + h: "h steps on from"
MOST_STEPS = 8
WORD = STEPS + MOST_STEPS + 1  # WORD + i: a word that tells nothing
WORDS = 16
VOCABULARY = WORD + WORDS

VISION = Vision(image=SIZE, patch=CELL)


def text(layers: int = 8, width: int = 64, heads: int = 2, wide: int = 128) -> Text:
    """The decoder's sizes for this task."""
    return Text(VOCABULARY, width=width, layers=layers, heads=heads, wide=wide)


@cache
def renderings(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ink of half a patch for every letter and for a blank.

    Every font, size and place within two pixels of the middle line is drawn; a seventh of them, chosen once, is shown
    only in held-out pictures.

    Returns:
        (float32 [classes, most, CELL, CELL // 2] in 0..1, int64 [classes] how many of them each class has).
    """
    matplotlib = extras.optional("matplotlib", "chain reading")
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [ImageFont.truetype(str(folder / f"{name}.ttf"), height) for name in FONTS for height in HEIGHTS]
    order = np.random.default_rng(77)
    drawn = []
    for letter in LETTERS:
        every = [ink for face in faces for ink in _drawn(letter, face)]
        every = [every[i] for i in order.permutation(len(every))]
        kept = len(every) // HELD_OUT
        drawn.append(every[:kept] if held_out else every[kept:])
    drawn.append([np.zeros((CELL, CELL // 2), np.float32)])
    counts = np.array([len(inks) for inks in drawn])
    bank = np.zeros((len(drawn), counts.max(), CELL, CELL // 2), np.float32)
    for row, inks in zip(bank, drawn, strict=True):
        row[: len(inks)] = inks
    return bank, counts


def _drawn(letter: str, face: Any) -> list[np.ndarray]:
    left, top, right, bottom = face.getbbox(letter)
    inks = []
    for x in range(max(1, CELL // 2 - (right - left) + 1)):
        for lift in range(-2, 3):
            canvas = Image.new("L", (CELL // 2, CELL), 0)
            y = (CELL - (bottom - top)) // 2 + lift
            ImageDraw.Draw(canvas).text((x - left, y - top), letter, fill=255, font=face)
            inks.append(np.asarray(canvas, np.float32) / 255)
    return inks


@dataclass(frozen=True)
class Batch:
    """Pictures and questions about them.

    Attributes:
        pixels: float32 [n, 3, SIZE, SIZE].
        cells: int64 [n, CELLS, 2], left and right letter of each patch (BLANK: none).
        prefix: int64 [n, 1 + words + CELLS], tokens up to the end of the image.
        prompts: int64 [n, questions, 3], the tokens behind it: colon, how many steps, from which letter.
        chain: int64 [n, questions, most steps + 1], the letters' tokens: the start, after one step, …
        steps: int64 [n, questions].
    """

    pixels: Tensor
    cells: Tensor
    prefix: Tensor
    prompts: Tensor
    chain: Tensor
    steps: Tensor

    @property
    def answers(self) -> Tensor:
        """The answers' tokens, int64 [n, questions]."""
        return self.after(self.steps)

    def after(self, steps: Tensor) -> Tensor:
        """The token that so many steps lead to, int64 [n, questions]."""
        return self.chain.gather(2, steps[..., None])[..., 0]

    def inputs(self, labels: bool = False) -> dict[str, Tensor]:
        """The model's arguments for the first question of each picture: the prompt alone, or with answer and labels."""
        ids = torch.cat([self.prefix, self.prompts[:, 0]], 1)
        if labels:
            ids = torch.cat([ids, self.answers[:, :1]], 1)
        given = {"input_ids": ids, "pixel_values": self.pixels, "attention_mask": torch.ones_like(ids)}
        if labels:
            given["labels"] = torch.full_like(ids, IGNORED)
            given["labels"][:, -1] = ids[:, -1]
        return given

    def questions(self, lens: Mapping[int, int] | None = None) -> Questions:
        """All questions of a picture in one sequence.

        Args:
            lens: layer -> how many steps its output must have taken already.
        """

        def labels(tokens: Tensor) -> Tensor:
            empty = torch.full((*tokens.shape, self.prompts.shape[2] - 1), IGNORED)
            return torch.cat([empty, tokens[..., None]], 2)

        intermediate = {layer: labels(self.after(self.steps.clamp(max=done))) for layer, done in (lens or {}).items()}
        return Questions(self.pixels, self.prefix, self.prompts, labels(self.answers), intermediate)


class Chain:
    """Draws batches.

    Args:
        seed: of everything that is drawn.
        held_out: pictures of renderings that training never shows.
        words: tokens before the image, drawn at random; they tell nothing.
        steps: the numbers of steps that are asked for, each as often as the others.
    """

    def __init__(self, seed: int, held_out: bool = False, words: int = 4, steps: tuple[int, ...] = (1, 2)) -> None:
        self.rng = np.random.default_rng([seed, int(held_out)])
        self.held_out, self.words, self.steps = held_out, words, steps

    def batch(self, n: int, questions: int = 1) -> Batch:
        """Draw `n` pictures with so many questions each."""
        rng, rows = self.rng, np.arange(n)[:, None]
        cycle = rng.random((n, len(LETTERS))).argsort(1)[:, :PAIRS]  # of eight letters: each points at the next
        place = rng.random((n, CELLS)).argsort(1)[:, :PAIRS]  # the patch of each pair
        cells = np.full((n, CELLS, 2), BLANK)
        cells[rows, place, 0], cells[rows, place, 1] = cycle, np.roll(cycle, -1, axis=1)
        start = rng.integers(PAIRS, size=(n, questions, 1))
        steps = rng.choice(self.steps, size=(n, questions))
        chain = LETTER + cycle[rows[..., None], (start + np.arange(max(self.steps) + 1)) % PAIRS]
        prompts = np.stack([np.full_like(steps, COLON), STEPS + steps, chain[..., 0]], 2)
        words = WORD + rng.integers(WORDS, size=(n, self.words))
        prefix = np.concatenate([np.full((n, 1), BOS), words, np.full((n, CELLS), IMAGE)], 1)
        arrays = (self._pixels(cells), cells, prefix, prompts, chain, steps)
        return Batch(*map(torch.from_numpy, arrays))

    def _pixels(self, cells: np.ndarray) -> np.ndarray:
        bank, counts = renderings(self.held_out)
        n = len(cells)
        ink = bank[cells, (self.rng.random(cells.shape) * counts[cells]).astype(int)]  # [n, CELLS, 2, CELL, CELL / 2]
        ink = ink.reshape(n, GRID, GRID, 2, CELL, CELL // 2).transpose(0, 1, 4, 2, 3, 5).reshape(n, SIZE, SIZE)
        paper, black = self.rng.uniform(0.41, 0.51, (n, 1, 1)), self.rng.uniform(0, 0.08, (n, 1, 1))
        gray = (paper + (black - paper) * ink - 0.45) / 0.27  # about the mean and deviation that CLIP's processor takes
        return np.repeat(gray[:, None].astype(np.float32), 3, axis=1)

    def patches(self, n: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """What `pretrain_tower` draws from: pixels, and the letters of each patch."""

        def draw() -> tuple[Tensor, Tensor]:
            batch = self.batch(n)
            return batch.pixels, batch.cells

        return draw


@torch.no_grad()
def right(model: Any, batches: Iterable[Batch]) -> Tensor:
    """Whether the likeliest next token is the answer, bool [rows] on the CPU, for the first question of each picture.

    Only the prompt is given, so that methods that look at its last position (FastV) see what they see in generation.
    """
    was_training = model.training
    model.eval()
    rows = []
    for batch in batches:
        given = {name: tensor.to(model.device) for name, tensor in batch.inputs().items()}
        said = model(**given, use_cache=False).logits[:, -1].argmax(-1)
        rows.append(said.cpu() == batch.answers[:, 0])
    model.train(was_training)
    return torch.cat(rows)


def held_out(seed: int, rows: int, steps: int, words: int = 4, at_once: int = 256) -> list[Batch]:
    """Batches of held-out pictures, `rows` in all, that ask for this many steps."""
    task = Chain(seed, held_out=True, words=words, steps=(steps,))
    return [task.batch(min(at_once, rows - begin)) for begin in range(0, rows, at_once)]
