"""Small RGB images to ask questions about: digits in real fonts, and crops of real photographs.

Fonts are the DejaVu files that matplotlib ships, photographs are those that scikit-image and scikit-learn ship
inside their wheels. Nothing is downloaded and no system font is used.
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 56
NUM_DIGITS = 3
FONT_SIZES = range(16, 23)
FONT_FILES = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf")

# Gray levels from 0 (black) to 255 (white), each drawn from its range. Paper is about CLIP's mean, so that it is near
# zero once normalised: blank patches then carry no signal that the tower has to learn to ignore.
PAPER = (105, 130)
INK = (0, 20)

# Object word -> (package, file inside it). Each shows its object in most of the frame, so that a crop still does.
PHOTOGRAPH_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "cup": ("skimage", "data/coffee.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


def is_held_out(string: str) -> bool:
    """True for the one string of digits in seven that no training image may show.

    Args:
        string: decimal digits, e.g. "417".
    """
    return int(string) % 7 == 3


@dataclass(frozen=True)
class TextImage:
    """A rendered string and where it is, all positions in pixels from the top left corner.

    Attributes:
        pixels: uint8 array [size, size, 3].
        text: the string shown.
        box: (left, top, right, bottom) of the whole string.
        centres: float array [len(text), 2], the (x, y) centre of every character.
    """

    pixels: np.ndarray
    text: str
    box: tuple[int, int, int, int]
    centres: np.ndarray


@cache
def font_paths() -> tuple[Path, ...]:
    """Paths of the fonts used, from matplotlib's own data folder."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = tuple(folder / name for name in FONT_FILES)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"matplotlib's font {path} is missing; reinstall matplotlib")
    return paths


@cache
def _digit_glyphs(font: Path, font_size: int) -> tuple[np.ndarray, ...]:
    """Ink coverage (0 to 1) of the ten digits in one font, cut to a common height; each [height, advance]."""
    face = ImageFont.truetype(str(font), font_size)
    glyphs = []
    for digit in "0123456789":
        canvas = Image.new("L", (math.ceil(face.getlength(digit)), 2 * font_size), 0)
        ImageDraw.Draw(canvas).text((0, 0), digit, fill=255, font=face)
        glyphs.append(np.asarray(canvas, dtype=np.float32) / 255)
    inked_rows = np.flatnonzero(np.max([glyph.max(axis=1) for glyph in glyphs], axis=0))
    return tuple(glyph[inked_rows[0] : inked_rows[-1] + 1] for glyph in glyphs)


class TextRenderer:
    """Draws strings of digits at a random place, in a random font and size, black on gray.

    Args:
        rng: source of all randomness.
        image_size: side of the square image, in pixels.
        num_digits: characters per string.
        held_out: False draws only training strings, True only held-out ones, None any.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        image_size: int = IMAGE_SIZE,
        num_digits: int = NUM_DIGITS,
        held_out: bool | None = False,
    ):
        self.rng, self.image_size, self.num_digits, self.held_out = rng, image_size, num_digits, held_out
        widest = max(g.shape[1] for f in font_paths() for g in _digit_glyphs(f, FONT_SIZES[0]))
        if widest * num_digits > image_size:
            raise ValueError(f"num_digits={num_digits} do not fit into image_size={image_size} at {FONT_SIZES[0]} px")

    def random_string(self) -> str:
        """A string from the side of the split that `held_out` names."""
        while True:
            string = "".join(str(d) for d in self.rng.integers(0, 10, self.num_digits))
            if self.held_out is None or is_held_out(string) == self.held_out:
                return string

    def draw(self, string: str | None = None) -> TextImage:
        """Renders `string`, or a random one.

        Args:
            string: decimal digits; None for `random_string()`.
        """
        string = self.random_string() if string is None else string
        if not string.isdecimal() or not string.isascii():
            raise ValueError(f"only the digits 0 to 9 can be rendered, not {string!r}")
        while True:
            font = font_paths()[self.rng.integers(len(font_paths()))]
            glyphs = _digit_glyphs(font, int(self.rng.integers(FONT_SIZES.start, FONT_SIZES.stop)))
            row = np.concatenate([glyphs[int(c)] for c in string], axis=1)
            height, width = row.shape
            if max(height, width) <= self.image_size:
                break
        left = int(self.rng.integers(0, self.image_size - width + 1))
        top = int(self.rng.integers(0, self.image_size - height + 1))
        coverage = np.zeros((self.image_size, self.image_size), np.float32)
        coverage[top : top + height, left : left + width] = row
        paper, ink = self.rng.uniform(PAPER[0], PAPER[1]), self.rng.uniform(INK[0], INK[1])
        gray = np.rint(paper + (ink - paper) * coverage).astype(np.uint8)
        advances = [glyphs[int(c)].shape[1] for c in string]
        centres = [(left + sum(advances[:i]) + a / 2, top + height / 2) for i, a in enumerate(advances)]
        pixels = np.repeat(gray[:, :, None], 3, axis=2)
        return TextImage(pixels, string, (left, top, left + width, top + height), np.asarray(centres, np.float32))


@cache
def photographs() -> dict[str, Image.Image]:
    """Object word -> photograph (RGB), for those that the installed wheels contain.

    Raises:
        FileNotFoundError: fewer than two are there, so that no question about them could have two answers.
    """
    found = {}
    for word, (package, file) in PHOTOGRAPH_FILES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        path = Path(spec.submodule_search_locations[0]) / file
        if path.is_file():
            found[word] = Image.open(path).convert("RGB")
    if len(found) < 2:
        raise FileNotFoundError("photographs need scikit-image or scikit-learn; install one of them")
    return found


def photo_crop(word: str, rng: np.random.Generator, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """A random square crop of the photograph of `word`, half to all of its shorter side, scaled down.

    Args:
        word: a key of `photographs()`.
        rng: source of randomness.
        image_size: side of the result, in pixels.

    Returns:
        uint8 array [image_size, image_size, 3].
    """
    photo = photographs().get(word)
    if photo is None:
        raise KeyError(f"no photograph of {word!r}; there are {sorted(photographs())}")
    side = int(min(photo.size) * rng.uniform(0.5, 1.0))
    left = int(rng.integers(0, photo.width - side + 1))
    top = int(rng.integers(0, photo.height - side + 1))
    box = (left, top, left + side, top + side)
    return np.asarray(photo.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))
