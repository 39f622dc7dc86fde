"""A small stock checkpoint of both hosts, and a picture."""

import numpy as np
import pytest
from PIL import Image

from tests.support import models
from tests.support.release import write_fileset

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
LAYERS, SIDE = 6, 4


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    models.needs_hf()
    return write_fileset(tmp_path_factory.mktemp("shown"), vision=VISION, text=TEXT, vocab_size=512)


@pytest.fixture(scope="session")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
