"""Lines of real English: the text of Python's own language reference, which every installation carries."""

import re
from functools import cache
from pydoc_data.topics import topics

import numpy as np

WORDS_PER_LINE = 6


@cache
def sentences() -> tuple[str, ...]:
    """Sentences of plain words (letters, commas, full stop) in a fixed order."""
    text = "\n\n".join(topics[key] for key in sorted(topics))
    found = re.findall(r"\b[A-Z][a-z]*(?:,? [a-z]+){5,30}\.", re.sub(r"(?<!\n)\n(?!\n) *", " ", text))
    return tuple(dict.fromkeys(found))


def random_line(rng: np.random.Generator, num_words: int = WORDS_PER_LINE) -> list[str]:
    """The first words of a random sentence, without punctuation.

    Args:
        rng: source of randomness.
        num_words: how many words, at most 6.
    """
    if not 1 <= num_words <= WORDS_PER_LINE:
        raise ValueError(f"num_words must be 1 to {WORDS_PER_LINE}, not {num_words}")
    sentence = sentences()[rng.integers(len(sentences()))]
    return re.findall(r"[A-Za-z]+", sentence)[:num_words]
