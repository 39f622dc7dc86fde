"""The definition that docs/routing.md begins with is the one that the tests hold the package to."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

from llava_patch import Routing
from llava_patch.routing import reference
from llava_patch.routing.schedule import LayerMode, make_schedule
from llava_patch.settings.routing import VARIANTS
from tests.support.routings import VARIANTS as CASES

DOCS = Path(__file__).parents[2] / "docs" / "routing.md"


def test_the_documented_definition_is_the_definition():
    shown = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    assert textwrap.indent(shown, "    ").strip() in inspect.getsource(reference.final_states)


PICTURES = {
    "lf": "..ooooo*", "lf-k2": "..oooo**", "lf-sparse": ".o*o*ooo", "pc": "..rrrrrr", "kv": "..kkkkkk",
    "ideal": "..oooooo", "vtw": "..oooooo",
}  # fmt: skip
SIGNS = {".": LayerMode.STOCK, "o": LayerMode.TEXT, "*": LayerMode.FUSE, "r": LayerMode.RESET, "k": LayerMode.KEYS}


@pytest.mark.parametrize("case", PICTURES)
def test_what_each_layer_does(case):
    modes = make_schedule(CASES[case]["routing"], None, 8).modes
    assert modes == tuple(SIGNS[sign] for sign in PICTURES[case])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_split_behind_the_last_layer_is_stock(variant):
    schedule = make_schedule(Routing(variant=variant, split=6), None, 6)
    assert schedule.modes == (LayerMode.STOCK,) * 6 and not schedule.does_something
