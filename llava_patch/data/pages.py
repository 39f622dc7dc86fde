"""The probe's embedded data: pages rendered from real English text with real fonts, no network, no files of ours.

The text is Python's own documentation as the standard library carries it (`pydoc_data.topics`), the fonts are those
that matplotlib ships. Both differ a little between versions of Python and matplotlib, so numbers are to be compared
within one environment.
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_patch.core.errors import LlavaPatchError, SettingError
from llava_patch.core.extras import optional
from llava_patch.probe.sample import Box, DrawnSamples, Sample

FONTS = {
    "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    "DejaVu Sans Mono": ("DejaVuSansMono", "DejaVuSansMono-Bold"),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    "STIX": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    "Computer Modern": ("cmr10", "cmb10", "cmss10", "cmtt10"),
}
SPLITS = ("train", "heldout")
HELDOUT_SENTENCES = 0.2  # sentences that no training page shows
SCALE = 2  # pages are rendered at twice the tower's side, so that the resize is part of what is measured
TEXT_HEIGHT = (8.0, 18.0)  # font size in pixels of the processed image, so that letters and patches compare
SMALL_TOWER, LARGE_TEXT = 112, (10.0, 20.0)  # smaller towers get a few large words: they can read no others
TWO_COLUMNS_FROM = 224  # smaller towers have no room for two columns
DARK_EVERY = 20  # light on dark; not by lot, because few dark pages make much of the targets' variance
MARGIN = 0.05  # of the page's side


@functools.lru_cache(maxsize=1)
def sentences() -> tuple[str, ...]:
    """Plain sentences of 4 to 30 words from the standard library's documentation, in its order, without repeats."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped]

    found: dict[str, None] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            # Grammar and code are indented; headings are underlined.
            if paragraph.startswith("    ") or "::=" in paragraph or re.search(r"^[*=\-~^]{3,}", paragraph, re.M):
                continue
            plain = re.sub(r"[\"`*“”]|\[\d+\]", "", " ".join(paragraph.split()))
            for sentence in re.split(r"(?<=[.!?:])\s+", plain):
                holes = "  " in sentence or "()" in sentence  # where a symbol stood
                plain_words = re.fullmatch(r"[A-Z][A-Za-z0-9 ,;.'()\-]+[.!?:]", sentence)
                if plain_words and not holes and 4 <= len(sentence.split()) <= 30:
                    found[sentence] = None
    return tuple(found)


@functools.lru_cache(maxsize=1)
def font_files() -> dict[str, tuple[Path, ...]]:
    """The font files of each family; LlavaPatchError where matplotlib is missing or lacks one of them."""
    matplotlib = optional("matplotlib", "the font of rendered pages")
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = {family: tuple(folder / f"{name}.ttf" for name in names) for family, names in FONTS.items()}
    missing = [str(f) for names in files.values() for f in names if not f.is_file()]
    if missing:
        raise LlavaPatchError(f"matplotlib {matplotlib.__version__} lacks fonts that R-Probe renders with: {missing}")
    return files


@functools.lru_cache(maxsize=512)
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


class Pages(DrawnSamples):
    """Rendered pages of one split, drawn when they are asked for; page i depends on seed, split, side and i alone.

    Pages have twice the side of the tower's input. The splits share no sentence; `seed` draws them too.
    """

    def __init__(self, count: int, tower_size: int, seed: int = 0, split: str = "train", noise: bool = True) -> None:
        if split not in SPLITS:
            raise SettingError(f"Pages: split = {split!r}: expected one of {', '.join(SPLITS)}")
        if tower_size < 28:
            raise SettingError(f"Pages: tower_size = {tower_size}: text cannot be read under 28 pixels")
        self.pages, self.side = count, SCALE * tower_size
        self.text_height = LARGE_TEXT if tower_size < SMALL_TOWER else TEXT_HEIGHT
        self.columns_allowed = tower_size >= TWO_COLUMNS_FROM
        self.seed, self.split, self.noise = seed, split, noise
        corpus = sentences()
        order = np.random.default_rng(seed).permutation(len(corpus))
        cut = int(HELDOUT_SENTENCES * len(corpus))
        chosen = order[:cut] if split == "heldout" else order[cut:]
        self.sentences = tuple(corpus[i] for i in chosen)

    def __len__(self) -> int:
        return self.pages

    def identity(self) -> dict[str, Any]:
        """JSON values that tell these pages from all others, without drawing them all.

        What draws (this file, PIL, fonts, the text) may change with the environment: the first page stands for it.
        """
        first = self.draw(0)
        drawn = hashlib.blake2b(first.open_image().tobytes(), digest_size=16)
        drawn.update(repr((self.sentences, first.text, first.boxes, first.all_boxes)).encode())
        return {
            "name": f"{self.pages} pages of {self.side} px, {self.split}, seed {self.seed}",
            "noise": self.noise,
            "drawn": drawn.hexdigest(),
            "libraries": {name: version(name) for name in ("matplotlib", "pillow", "numpy")},
        }

    def draw(self, index: int) -> Sample:
        """Page number `index`, from 0."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        ink = Image.new("L", (self.side, self.side), 0)
        lines: list[tuple[str, Box]] = []
        two = self.columns_allowed and rng.random() < 0.4
        margin = MARGIN * self.side
        width = (self.side - 2 * margin) if not two else (self.side - 3 * margin) / 2
        family = list(font_files().values())[rng.integers(len(FONTS))]
        while not lines:  # a large font may find no word that fits: draw another
            size = round(SCALE * rng.uniform(*self.text_height))
            font = _font(family[rng.integers(len(family))], size)
            for column in range(2 if two else 1):
                lines += self._column(rng, ink, font, margin + column * (width + margin), margin, width)
        angle = max(-2.0, min(2.0, float(rng.normal(0.0, 0.7)))) if rng.random() < 0.5 else 0.0
        if angle:
            ink = ink.rotate(angle, Image.Resampling.BICUBIC)
        boxes = tuple(rotated_box(box, angle, self.side) for _, box in lines)
        chosen = int(rng.integers(len(lines)))
        return Sample(
            image=self._colour(rng, ink, dark=index % DARK_EVERY == DARK_EVERY - 1),
            text=lines[chosen][0],
            boxes=(boxes[chosen],),
            all_boxes=boxes,
            all_texts=tuple(text for text, _ in lines),
            id=f"page-{self.split}-{self.seed}-{index}",
        )

    def _words(self, rng: np.random.Generator) -> Iterator[str]:
        skip = int(rng.integers(12))  # columns open anywhere in a sentence, as pages do
        while True:
            yield from self.sentences[rng.integers(len(self.sentences))].split()[skip:]
            skip = 0

    def _column(
        self, rng: np.random.Generator, ink: Image.Image, font: ImageFont.FreeTypeFont, x: float, y: float, width: float
    ) -> list[tuple[str, Box]]:
        """Write lines down one column; returns each line's text and ink box."""
        draw = ImageDraw.Draw(ink)
        step = font.size * rng.uniform(1.15, 1.6)
        last = self.side - y - 1.1 * font.size
        last = min(last, y + (last - y) * rng.uniform(0.7, 1.3))  # some pages are not full
        y += rng.uniform(0.0, 0.5) * font.size
        indent = rng.uniform(0.0, 0.15) * width
        x, width = x + indent, width - indent
        words = self._words(rng)
        lines: list[tuple[str, Box]] = []
        word = next(words)
        while y <= last:
            text = ""
            for _ in range(30):
                longer = f"{text} {word}".strip()
                if font.getlength(longer) <= width:
                    text = longer
                elif text:
                    break  # the word opens the next line
                word = next(words)  # taken, or too long for any line of this column
                if text.endswith(".") and rng.random() < 0.3:
                    break  # a paragraph ends here
            if text:
                draw.text((x, y), text, fill=255, font=font, anchor="la")
                lines.append((text, draw.textbbox((x, y), text, font=font, anchor="la")))
            y += step * (1.5 if text.endswith(".") and rng.random() < 0.3 else 1.0)
        return lines

    def _colour(self, rng: np.random.Generator, ink: Image.Image, dark: bool) -> Image.Image:
        """Ink and paper in contrasting colours, lit unevenly, with pixel noise."""
        paper = rng.uniform(200, 255) + rng.uniform(-20, 20, 3)
        text = rng.uniform(0, 90) + rng.uniform(-30, 30, 3)
        if dark:
            paper, text = text, paper
        alpha = np.asarray(ink, np.float32)[..., None] / 255
        page = paper.astype(np.float32) * (1 - alpha) + text.astype(np.float32) * alpha
        if self.noise:
            slope = rng.uniform(-12, 12, 2)
            ramp = np.linspace(-1, 1, self.side, dtype=np.float32)
            page += (slope[0] * ramp[:, None] + slope[1] * ramp[None, :])[..., None]
            page += rng.standard_normal((self.side, self.side, 1), dtype=np.float32) * rng.uniform(0, 8)
        return Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))


def rotated_box(box: Box, angle: float, side: int) -> Box:
    """Upright box (pixels, cut at the border) around a box that was turned with its square page.

    The angle is in degrees, counter-clockwise as seen, about the page's centre (PIL's `rotate`).
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    centre = side / 2
    corners = [(x - centre, y - centre) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [centre + x * cos + y * sin for x, y in corners]
    ys = [centre - x * sin + y * cos for x, y in corners]
    return max(min(xs), 0.0), max(min(ys), 0.0), min(max(xs), float(side)), min(max(ys), float(side))
