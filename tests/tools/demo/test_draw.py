"""The demo's pictures and words."""

import numpy as np
import torch

from llava_patch.tools.demo import draw
from llava_patch.tools.demo.compute import Answer

NAN = float("nan")


def answer(runs, attention=None, **more):
    """Four layers and a row of three tokens over a white picture."""
    runs = torch.tensor(runs, dtype=torch.bool).T.reshape(4, 1, 3)
    attention = torch.zeros(4, 1, 3) if attention is None else torch.tensor(attention).reshape(1, 1, 3).expand(4, 1, 3)
    values = {"prefill_ms": 10.0, "decode_ms": 2.0, "tokens": 3} | more
    return Answer("", {}, np.full((14, 42, 3), 255, np.uint8), runs, attention, 3, 9, **values)


def cells(picture):
    """The colour at the middle of each token."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    assert min(height, width) >= draw.SIDE
    return [tuple(map(int, pixels[height // 2, width * (2 * i + 1) // 6])) for i in range(3)]


def test_tokens_that_return_are_blue_and_those_that_leave_dark():
    whole, around, gone = cells(draw.tokens_picture(answer([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 0]])))
    assert whole == (255, 255, 255)
    assert around[2] - around[0] > 60
    assert max(gone) < 120 and len(set(gone)) == 1


def test_attention_is_orange_where_it_is_highest_and_dark_where_there_is_no_token():
    most, half, absent = cells(draw.attention_picture(answer([[1] * 4] * 3, [0.4, 0.2, NAN]), 1))
    assert most[0] > 200 and most[0] - most[2] > 150
    assert most[2] < half[2] < 255 and half[0] - half[2] > 60
    assert max(absent) - min(absent) < 3 and absent[0] < 150
    assert abs(draw.mass(answer([[1] * 4] * 3, [0.4, 0.2, NAN]).attention[0]) - 0.6) < 1e-6
    dark = cells(draw.attention_picture(answer([[1] * 4] * 3, [NAN, NAN, NAN]), 0))
    assert len(set(dark)) == 1


def test_which_layers_tokens_pass_in_words():
    said = draw.tokens_words(answer([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]]))
    assert said == "of 3 image tokens 1: all 4 layers; 2: layers 0, 3 of 4"
    assert draw.tokens_words(answer([[0] * 4, [1, 1, 0, 0], [1, 1, 0, 0]])).endswith("2: layers 0-1 of 4; 1: no layer")


def test_times_side_by_side():
    every = [[1] * 4] * 3
    head, rows = draw.timings(answer(every), answer(every, prefill_ms=5.0, decode_ms=None, tokens=1))
    assert len({len(row) for row in (head, *rows)}) == 1
    assert rows[0][1:] == ["10.0", "5.0", "0.50"] and rows[1][1:] == ["2.0", "-", "-"]
    assert rows[2][1:3] == ["3", "1"]
