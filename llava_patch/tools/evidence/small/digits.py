"""Strings of digits: images that a small model learns to read within minutes, and what it is asked about them.

An image is 56 px wide and high, which a tower with patches of 14 px cuts into 4 x 4 tokens. It shows three digits at a
random place, in one of matplotlib's own fonts. One string in ten is never trained on: those whose weighted sum of
digits ends in 0, so that every digit is equally frequent in every place on both sides.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from llava_patch.core.extras import optional

SIDE, CELL = 56, 14  # px of an image, and of a patch
GRID = SIDE // CELL
TOKENS = GRID * GRID
LENGTH = 3  # digits of a string
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
SIZES = range(18, 23)  # px
PAPER, INK = (105, 130), (0, 20)  # gray; paper near CLIP's mean colour is near 0 once normalised
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's

PAD, BOS, EOS, IMAGE, UNKNOWN = range(5)
QUESTIONS = ("read", "largest", "place", "font")
"""The string; its largest digit; the token under its middle; the number of its font."""
READ = 5  # token of the first question
DIGIT = READ + len(QUESTIONS)
CELLS = DIGIT + 10
FACES = CELLS + TOKENS
VOCABULARY = 40
BLANK = 10  # a patch's class where no digit is
IGNORED = -100


@functools.cache
def face(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships."""
    folder = Path(optional("matplotlib", "the fonts of rendered digits").get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


def is_held_out(digits: Tensor) -> Tensor:
    """Which strings are never trained on, bool [...]; `digits` is int64 [..., 3]."""
    return (digits * torch.tensor([1, 3, 7])).sum(-1) % 10 == 0


def strings(held_out: bool) -> Tensor:
    """Every string of one side of the split, int64 [strings, 3]."""
    every = torch.cartesian_prod(*[torch.arange(10)] * LENGTH)
    return every[is_held_out(every) == held_out]


@dataclass(frozen=True)
class Drawn:
    """Images and what is known of them.

    Attributes:
        pixels: uint8 [images, 56, 56], gray.
        digits: int64 [images, 3].
        boxes: int64 [images, 4]: left, top, right, bottom of the whole string's ink, in px.
        middles: float32 [images, 3], the horizontal middle of each digit, in px.
        fonts: int64 [images], index into `FONTS`.
    """

    pixels: Tensor
    digits: Tensor
    boxes: Tensor
    middles: Tensor
    fonts: Tensor

    def __len__(self) -> int:
        return len(self.digits)

    def picture(self, index: int) -> Image.Image:
        """One image in RGB."""
        return Image.fromarray(self.pixels[index].numpy()).convert("RGB")

    def batch(
        self,
        index: Tensor,
        question: str = "read",
        wrong: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Any]:
        """Keyword arguments of the model's forward: image, question, answer and end, with labels on the last two.

        Args:
            index: int64 [batch], which images.
            question: one of `QUESTIONS`, the same for all.
            wrong: share of the rows whose answer is a random one; they are drawn from `generator`.
            generator: for `wrong`.
            device: of the tensors.
        """
        answers = self.answers(index, question)
        if wrong:
            other = self.answers(torch.randint(len(self), (len(index),), generator=generator), question)
            answers = torch.where(torch.rand(len(index), 1, generator=generator) < wrong, other, answers)
        count = len(index)
        head = torch.tensor([BOS, *[IMAGE] * TOKENS, READ + QUESTIONS.index(question)]).expand(count, -1)
        ids = torch.cat([head, answers, torch.full((count, 1), EOS)], 1)
        labels = ids.clone()
        labels[:, : head.shape[1]] = IGNORED
        tensors = {"input_ids": ids, "labels": labels, "pixel_values": normalised(self.pixels[index])}
        return {**{name: value.to(device) for name, value in tensors.items()}, "use_cache": False}

    def answers(self, index: Tensor, question: str) -> Tensor:
        """Tokens of the right answers, int64 [batch, answer tokens]; all answers to one question are equally long."""
        if question == "read":
            return self.digits[index] + DIGIT
        if question == "largest":
            return self.digits[index].amax(1, keepdim=True) + DIGIT
        if question == "font":
            return self.fonts[index, None] + FACES
        left, top, right, bottom = self.boxes[index].unbind(1)
        cell = (top + bottom) // 2 // CELL * GRID + (left + right) // 2 // CELL
        return cell[:, None] + CELLS

    def patch_labels(self) -> Tensor:
        """What the left and the right half of each patch show, int64 [images, 16, 4].

        In order: the digit in the left half and in the right one (`BLANK`: none), and the places of these digits in
        the string, counted from 1 (0: none). Halves, because digits are narrower than a patch: of three beside each
        other the middle one may be the nearest of no patch. A patch whose middle lies a little above or below the ink
        still holds part of it.
        """
        left, top, right, bottom = self.boxes.float().unbind(1)
        columns, rows = (torch.arange(2 * GRID) + 0.5) * CELL / 2, (torch.arange(GRID) + 0.5) * CELL
        distance = (columns[None, :, None] - self.middles[:, None, :]).abs()  # [images, half columns, digits]
        in_column = distance.amin(-1) <= 0.6 * (right - left)[:, None] / LENGTH
        in_row = (rows >= top[:, None] - 0.3 * CELL) & (rows <= bottom[:, None] + 0.3 * CELL)
        inked = in_row[:, :, None] & in_column[:, None, :]  # [images, rows, half columns]
        nearest = distance.argmin(-1)
        digit, place = self.digits.gather(1, nearest)[:, None], nearest[:, None] + 1
        shown = torch.where(inked, digit, BLANK), torch.where(inked, place, 0)
        return torch.cat([one.unflatten(2, (GRID, 2)).flatten(1, 2) for one in shown], -1)


def normalised(pixels: Tensor) -> Tensor:
    """What CLIP's image processor makes of gray images of the tower's size: float32 [batch, 3, 56, 56]."""
    mean, spread = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, SPREAD))
    return ((pixels[:, None].float() / 255) - mean) / spread


def draw(count: int, seed: int, held_out: bool) -> Drawn:
    """Draw images of strings of one side of the split; the same arguments give the same images."""
    rng = np.random.default_rng([seed, int(held_out)])
    digits = strings(held_out)
    digits = digits[torch.from_numpy(rng.integers(len(digits), size=count))]
    pixels, boxes = np.empty((count, SIDE, SIDE), np.uint8), np.empty((count, 4), np.int64)
    middles, fonts = np.empty((count, LENGTH), np.float32), rng.integers(len(FONTS), size=count)
    for row, string in enumerate(digits.tolist()):
        text, size = "".join(map(str, string)), int(rng.choice(SIZES))
        font = face(FONTS[fonts[row]], size)
        while font.getlength(text) > SIDE - 2:  # three bold digits of the largest size do not fit
            size -= 1
            font = face(FONTS[fonts[row]], size)
        left, top, right, bottom = (round(v) for v in font.getbbox(text))
        x, y = int(rng.integers(SIDE - (right - left) + 1)), int(rng.integers(SIDE - (bottom - top) + 1))
        paper, ink = (int(rng.integers(low, high + 1)) for low, high in (PAPER, INK))
        canvas = Image.new("L", (SIDE, SIDE), paper)
        ImageDraw.Draw(canvas).text((x - left, y - top), text, fill=ink, font=font)
        pixels[row] = np.asarray(canvas)
        boxes[row] = x, y, x + right - left, y + bottom - top
        ends = [font.getlength(text[: n + 1]) for n in range(LENGTH)]
        middles[row] = [x - left + (a + b) / 2 for a, b in zip([0.0, *ends], ends, strict=False)]
    rest = torch.from_numpy(boxes), torch.from_numpy(middles), torch.from_numpy(fonts)
    return Drawn(torch.from_numpy(pixels), digits, *rest)


@dataclass(frozen=True)
class Score:
    """Of a model on images: mean loss of the answers' tokens, and which answers are right, bool [images]."""

    loss: float
    right: Tensor

    @property
    def exact(self) -> float:
        """Share of right answers."""
        return self.right.float().mean().item()


@torch.no_grad()
def evaluate(model: nn.Module, drawn: Drawn, question: str = "read", size: int = 256) -> Score:
    """Loss and right answers, greedily decoded; the model's training mode stays as it was.

    A greedy answer is right exactly if every token is the likeliest one after the right ones before it, so one forward
    pass says it.
    """
    training = model.training
    model.eval()
    losses, right = [], []
    device = next(model.parameters()).device
    for index in torch.arange(len(drawn)).split(size):
        batch = drawn.batch(index, question, device=device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        asked = labels != IGNORED
        losses.append(nn.functional.cross_entropy(logits[asked], labels[asked], reduction="none").cpu())
        right.append(((logits.argmax(-1) == labels) | ~asked).all(1).cpu())
    model.train(training)
    return Score(torch.cat(losses).mean().item(), torch.cat(right))
