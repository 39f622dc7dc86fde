"""A small patched checkpoint, its base, and one report of it that several tests look at."""

import pytest
from typer.testing import CliRunner

from llava_patch import Routing, SkipLinks, patch
from llava_patch.cli.main import app
from tests.support.release import write_fileset

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
FEW = "Report.samples = 2\nReport.maps = 2\nReport.gradient_steps = 4\nReach.samples = 1\n"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return write_fileset(tmp_path_factory.mktemp("reported"), vision=VISION, text=TEXT, vocab_size=512)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("gin") / "few.gin"
    path.write_text(FEW)
    return str(path)


@pytest.fixture(scope="session")
def checkpoint(files):
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(files.hf)
    folder = files.hf.parent / "patched <b>&"  # a name that a page must escape
    patch(model, fusion=SkipLinks(stride=2), routing=Routing(split=2)).save(folder, "full")
    return folder


@pytest.fixture(scope="session")
def report(files, few, checkpoint, tmp_path_factory):
    """(folder, screen) of a report with every section that needs nothing but the checkpoint and its base."""
    folder = tmp_path_factory.mktemp("report")
    arguments = [str(checkpoint), "--base", str(files.hf), "--output", str(folder), "--gin-file", few]
    done = CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder, done.output, arguments
