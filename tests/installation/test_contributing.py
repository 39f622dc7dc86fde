"""The code that CONTRIBUTING.md shows: what its steps add is there, and does what they say."""

import re
import sys
import textwrap
import types

import pytest
import torch
import typer
from typer.testing import CliRunner

from llava_patch import FastV, Routing, patch
from llava_patch.cli import measure
from llava_patch.core import registry
from tests.support import models
from tests.support.models import IMAGE
from tests.support.paths import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
KINDS = ("A fusion", "A pruning", "A routing variant", "A measurement", "A host")


def section(title):
    return re.search(rf"^### {title}\n(.*?)(?=^##)", PAGE, re.M | re.S)[1]


@pytest.fixture
def added(monkeypatch):
    """Follows the steps of a section: its file becomes a module, its line an entry of the registry."""

    def add(title):
        text = section(title)
        path, source = re.search(r"`llava_patch/([\w/]+)\.py`.*?```python\n(.*?)```", text, re.S).groups()
        name = "llava_patch." + path.replace("/", ".")
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(textwrap.dedent(source), name, "exec"), module.__dict__)
        table, key, entry = re.search(r'registry\.py`, (\w+): `"(\w+)": "([\w.:]+)",`', text).groups()
        monkeypatch.setitem(getattr(registry, table), key, entry)
        return registry.load(entry)

    return add


@pytest.mark.parametrize("title", KINDS)
def test_everything_is_added_in_at_most_seven_steps(title):
    steps = [int(number) for number in re.findall(r"^(\d+)\. ", section(title), re.M)]
    assert steps == list(range(1, len(steps) + 1)) and 3 <= len(steps) <= 7


@torch.no_grad()
def test_the_fusion_is_patched(added):
    cls = added("A fusion")
    with patch(models.hf_model(), fusion=cls(first=2)) as handle:
        assert [group.blocks for group in handle.taps.groups] == [(2,), (5,), (8,)] and handle.taps.detached == 3


@torch.no_grad()
def test_the_pruning_keeps_every_second_token(added, host):
    cls = added("A pruning")
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)])
    with patch(host.model, routing=Routing(split=3), pruning=cls(layer=2)):
        pruned = host.logits(batch)
    with patch(host.model, routing=Routing(split=3), pruning=FastV(layer=2)) as handle:
        with handle.image_positions(kept=~batch.image | (batch.image.cumsum(1) % 2 == 1)):
            expected = host.logits(batch)
    assert torch.equal(pruned[batch.valid], expected[batch.valid])


def test_the_measurement_is_a_command(added, tmp_path):
    cls = added("A measurement")
    root = typer.Typer()
    root.callback()(lambda: None)
    measure.add(root, "loudness")
    base = ROOT / "tests" / "compatibility" / "written" / "base"
    data = str(base.parent / "data" / "0.png")
    words = [
        "loudness",
        str(base),
        data,
        "--samples",
        "2",
        "--power",
        "1",
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(root, words)
    assert done.exit_code == 0, (done.output, done.exception)
    found = registry.load(cls.result).load(tmp_path / "loudness.json")
    assert found.samples == 1 and found.mean > 0 and (tmp_path / "loudness.png").is_file()
