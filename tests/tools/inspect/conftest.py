import pytest

from tests.support.release import write_fileset

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return write_fileset(tmp_path_factory.mktemp("inspected"), vision=VISION, text=TEXT, vocab_size=512)


@pytest.fixture(params=["hf", "llava"])
def stock(request, files):
    return str(files.hf if request.param == "hf" else files.llava)
