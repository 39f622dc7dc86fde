"""Pages for R-Probe whose region is decided by its text, wholly or but for the ink; and what reads them.

A page is 56 px wide and high, of one gray, with one line of digits in its second row of tokens. Whether the text can
tell what the region looks like depends on what else varies from page to page, and on how small the digits are.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from llava_patch.probe.sample import Sample
from llava_patch.tools.evidence.small import digits

ROW = 1  # of tokens
PAPER = 120
FONT = "DejaVuSansMono"


@dataclass(frozen=True)
class Kind:
    """What a page shows.

    Attributes:
        per_token: digits in one token.
        size: of the font in px.
        ink: lowest and highest gray of the line's ink, which the text does not tell.
    """

    per_token: int
    size: int
    ink: tuple[int, int]


KINDS = {
    # As large as what the tower was taught to read, and the text decides every pixel.
    "fixed": Kind(1, 15, (10, 10)),
    # Too small for that tower, so that text helps where the region is seen as well; the ink only the image tells.
    "small_ink": Kind(2, 10, (0, 100)),
}


def pages(kind: str, count: int, seed: int) -> list[Sample]:
    """Pages of a kind, a key of `KINDS`; the same arguments give the same ones."""
    chosen, rng = KINDS[kind], np.random.default_rng(seed)
    font, step = digits.face(FONT, chosen.size), digits.CELL / chosen.per_token
    top, samples = ROW * digits.CELL, []
    for number in range(count):
        text = "".join(map(str, rng.integers(10, size=digits.GRID * chosen.per_token)))
        image = Image.new("L", (digits.SIDE, digits.SIDE), PAPER)
        ink, pen = int(rng.integers(chosen.ink[0], chosen.ink[1] + 1)), ImageDraw.Draw(image)
        for place, digit in enumerate(text):
            pen.text((step * (place + 0.5), top + digits.CELL / 2), digit, fill=ink, font=font, anchor="mm")
        box = (0.0, float(top), float(digits.SIDE), float(top + digits.CELL))
        samples.append(Sample(image.convert("RGB"), text, (box,), (box,), id=f"{kind}-{seed}-{number}"))
    return samples


def strings(drawn: digits.Drawn) -> list[Sample]:
    """Images of strings as samples: the region is the string's ink."""
    samples = []
    for number, (string, box) in enumerate(zip(drawn.digits.tolist(), drawn.boxes.tolist(), strict=True)):
        left, top, right, bottom = map(float, box)
        region = (left, top, right, bottom)
        text = "".join(map(str, string))
        samples.append(Sample(drawn.picture(number), text, (region,), (region,), id=f"string-{number}"))
    return samples


def tokenizer() -> Any:
    """One token a digit, with the ids of `digits`; everything else is unknown."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "<pad>": digits.PAD,
        "<s>": digits.BOS,
        "</s>": digits.EOS,
        "<image>": digits.IMAGE,
        "<unk>": digits.UNKNOWN,
    }
    words = {**special, **{str(digit): digits.DIGIT + digit for digit in range(10)}}
    words |= {f"<{number}>": number for number in {*range(digits.VOCABULARY)} - {*words.values()}}  # no text has them
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def image_processor() -> Any:
    """CLIP's for images of 56 px: what `digits.normalised` does."""
    from transformers import CLIPImageProcessor

    side = {"height": digits.SIDE, "width": digits.SIDE}
    return CLIPImageProcessor(size={"shortest_edge": digits.SIDE}, crop_size=side)
