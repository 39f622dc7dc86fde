"""SparseVLM's raters, a sample at a time and in a ragged batch."""

import pytest
import torch

from llava_patch import SparseVLM
from llava_patch.measurements.flops import shape as shapes
from llava_patch.measurements.flops.count import Mode, Prompt, count_flops, program_of
from llava_patch.routing.reference import raters


@pytest.mark.parametrize("padding", ["left", "right"])
def test_raters_are_the_text_that_the_image_is_more_like_than_the_mean(padding):
    samples = ["tiiittt", "iittiitttttt", "ttiii", "tit", "tttt"]  # an image last, one word behind it, no image
    width = max(map(len, samples))
    rows = [s.rjust(width) if padding == "left" else s.ljust(width) for s in samples]
    image = torch.tensor([[c == "i" for c in row] for row in rows])
    text = torch.tensor([[c == "t" for c in row] for row in rows])
    embeds = torch.randn(len(rows), width, 8, generator=torch.Generator().manual_seed(0))
    found = SparseVLM().raters(embeds, image, text)
    for i, row in enumerate(rows):
        there = image[i] | text[i]
        expected = torch.zeros(int(there.sum()), dtype=torch.bool)
        if "it" in row.replace(" ", "") and row.strip() != "tit":
            expected[raters(embeds[i][there], image[i][there])] = True
        assert torch.equal(found[i][there], expected) and not found[i][~there].any(), row
    assert found[:2].any(1).all() and not found[2:].any()  # for the others it is the last token that rates


def test_flops_count_all_text_as_raters():
    shape, prompt = shapes.named("7b"), Prompt(text=64, image=576)
    found = count_flops(shape, program_of(shape, None, SparseVLM()), prompt, Mode.PREFILL)
    rows, hidden = 64, 4096
    stages = sum(2 * (rows * hidden * hidden + rows * hidden * (64 + n)) for n in (576, 300, 200))
    assert found.pruning == stages + 2 * 576 * 64 * hidden
