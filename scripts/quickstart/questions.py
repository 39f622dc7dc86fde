"""What is asked about an image and what the right answer is: one sample is one image and one question.

The wording is that of the benchmarks: POPE asks "Is there a … in the image?", MME "Is there a … in this image?",
and both are followed by LLaVA's short-answer instruction.
"""

from dataclasses import dataclass, field

import numpy as np

from . import english, render

READ_QUESTION = "What is the number in the image?"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

# Share of each kind of sample in training. Reading is what the demo measures, so the others stay small.
DEFAULT_SHARES = {"read": 0.86, "digit": 0.05, "ocr": 0.01, "compare": 0.01, "photo": 0.05, "text": 0.02}

# Digits that are easily taken for one another: POPE's "adversarial" objects, for digits.
LOOKALIKE = {"0": "8", "1": "7", "2": "7", "3": "8", "4": "9", "5": "6", "6": "8", "7": "1", "8": "3", "9": "4"}


@dataclass(frozen=True)
class Sample:
    """One image (or none) and one question about it.

    Attributes:
        kind: a key of `DEFAULT_SHARES`.
        question: without the image placeholder.
        answer: the whole right answer.
        pixels: uint8 [size, size, 3], or None for a text-only sample.
        text_image: where the characters are, if the image shows digits.
        photo: the object word, if the image is a photograph.
    """

    kind: str
    question: str
    answer: str
    pixels: np.ndarray | None = field(default=None, repr=False)
    text_image: render.TextImage | None = field(default=None, repr=False)
    photo: str | None = None

    @property
    def caption(self) -> str:
        """What the image shows, in the words of a stage-1 caption; empty without an image."""
        if self.photo is not None:
            return f"a photo of {with_article(self.photo)}"
        return f"the number {self.text_image.text}" if self.text_image is not None else ""


def with_article(noun: str) -> str:
    """`noun` with its indefinite article: "an 8", "a cat"."""
    return f"{'an' if noun[0] in 'aeiou8' else 'a'} {noun}"


def existence_question(noun: str, this: bool = False) -> str:
    """POPE's question, or MME's with `this`, for a digit or an object word."""
    return f"Is there {with_article(noun)} in {'this' if this else 'the'} image?"


def ocr_question(string: str) -> str:
    """An MME "OCR" question about the number shown."""
    return f"Is the number in the image {string}?"


def compare_question(less: bool = False) -> str:
    """An MME "numerical_calculation" question about the number shown; with `less`, its opposite."""
    return "Is the number in the image less than 500?" if less else "Is the number in the image greater than 499?"


def yes_no(truth: bool) -> str:
    """The answer as LLaVA's instruction data spells it."""
    return "Yes" if truth else "No"


def near_miss(string: str, rng: np.random.Generator) -> str:
    """`string` with one digit, at a random place, replaced by another."""
    place = int(rng.integers(len(string)))
    digit = str((int(string[place]) + int(rng.integers(1, 10))) % 10)
    return string[:place] + digit + string[place + 1 :]


class Sampler:
    """Draws samples of all kinds.

    Half of what is asked for and is absent is of the other sort: an object on an image of digits, a digit on a
    photograph. Those absences are easy to tell, as POPE's random objects are.

    Args:
        rng: source of all randomness.
        shares: kind -> share; None for `DEFAULT_SHARES`. Need not sum to 1.
        held_out: which strings images show, see `render.TextRenderer`.
        image_size: side of the images, in pixels.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        shares: dict[str, float] | None = None,
        held_out: bool | None = False,
        image_size: int = render.IMAGE_SIZE,
    ):
        shares = DEFAULT_SHARES if shares is None else shares
        unknown = set(shares) - set(DEFAULT_SHARES)
        if unknown or not any(shares.values()):
            raise ValueError(f"shares: {sorted(unknown) or 'all zero'}; the kinds are {sorted(DEFAULT_SHARES)}")
        self.rng, self.image_size = rng, image_size
        self.kinds = sorted(shares)
        weights = np.asarray([shares[k] for k in self.kinds], dtype=float)
        self.weights = weights / weights.sum()
        self.renderer = render.TextRenderer(rng, image_size, held_out=held_out)
        self.photo_words = sorted(render.photographs())

    def draw(self, kind: str | None = None) -> Sample:
        """A sample of `kind`, or of a random kind by share."""
        kind = str(self.rng.choice(self.kinds, p=self.weights)) if kind is None else kind
        makers = {"read": self._read, "digit": self._digit, "ocr": self._ocr, "compare": self._compare}
        makers |= {"photo": self._photo, "text": self._text}
        if kind not in makers:
            raise ValueError(f"kind must be one of {sorted(makers)}, not {kind!r}")
        return makers[kind]()

    def draw_image(self, photo: bool) -> Sample:
        """A sample whose image is a photograph or digits; what it asks does not matter."""
        if not photo:
            return self._read()
        word = str(self.rng.choice(self.photo_words))
        return self._on_photo("photo", word, this=False, word=word)

    def _on_digits(self, kind: str, image: render.TextImage, question: str, answer: str) -> Sample:
        return Sample(kind, question, answer, image.pixels, text_image=image)

    def _read(self) -> Sample:
        image = self.renderer.draw()
        return self._on_digits("read", image, READ_QUESTION, image.text)

    def _digit(self) -> Sample:
        truth = bool(self.rng.integers(2))
        this = bool(self.rng.integers(2))
        if not truth and self.rng.integers(2):
            return self._on_photo("digit", str(self.rng.integers(10)), this)
        image = self.renderer.draw()
        absent = sorted(set("0123456789") - set(image.text))
        digit = str(self.rng.choice(sorted(set(image.text)) if truth else absent))
        question = existence_question(digit, this) + SHORT_ANSWER
        return self._on_digits("digit", image, question, yes_no(truth))

    def _on_photo(self, kind: str, asked: str, this: bool, word: str | None = None) -> Sample:
        """Is `asked` in a photograph of `word`, or of a random object."""
        word = str(self.rng.choice(self.photo_words)) if word is None else word
        question = existence_question(asked, this) + SHORT_ANSWER
        pixels = render.photo_crop(word, self.rng, self.image_size)
        return Sample(kind, question, yes_no(asked == word), pixels, photo=word)

    def _ocr(self) -> Sample:
        image = self.renderer.draw()
        truth = bool(self.rng.integers(2))
        asked = image.text
        # A held-out string must not turn up in a training question either.
        while not truth and (asked == image.text or (self.renderer.held_out is False and render.is_held_out(asked))):
            asked = near_miss(image.text, self.rng)
        return self._on_digits("ocr", image, ocr_question(asked) + SHORT_ANSWER, yes_no(truth))

    def _compare(self) -> Sample:
        image = self.renderer.draw()
        less = bool(self.rng.integers(2))
        truth = (int(image.text) < 500) == less
        return self._on_digits("compare", image, compare_question(less) + SHORT_ANSWER, yes_no(truth))

    def _photo(self) -> Sample:
        truth = bool(self.rng.integers(2))
        this = bool(self.rng.integers(2))
        word = str(self.rng.choice(self.photo_words))
        if not truth and self.rng.integers(2):
            image = self.renderer.draw()
            return self._on_digits("photo", image, existence_question(word, this) + SHORT_ANSWER, yes_no(False))
        others = [other for other in self.photo_words if other != word]
        return self._on_photo("photo", word if truth else str(self.rng.choice(others)), this, word)

    def _text(self) -> Sample:
        words = english.random_line(self.rng)
        return Sample("text", f"What is the last word of this line?\n{' '.join(words)}", words[-1])
