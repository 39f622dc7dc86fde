"""Whatever a field of a settings class is given: it is taken as valid, or one error names class and field."""

from __future__ import annotations

import dataclasses
import math

import pytest

from llava_patch.core import errors
from llava_patch.core.errors import SettingError
from llava_patch.settings import checks
from llava_patch.settings import gin_config as config

CLASSES = {**config.METHODS, **config.MEASUREMENTS, "Sweep": config.Sweep}
NEEDED = {"Sweep": {"grid": {"Routing.split": (1, 2)}}}
# What a class must have for a field to be looked at by itself.
BESIDE = {"tower_lr": {"train_tower": "all"}, "layer_decay": {"train_tower": "all"}}
FIELDS = [(name, field) for name, cls in CLASSES.items() for field in dataclasses.fields(cls)]


class Strange:
    """Equal to everything, and without a text of its own."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0

    def __repr__(self):
        raise OSError("no text")


NEVER = [
    10**400, -(10**400), 10**5000, 2**63,
    math.inf, -math.inf, math.nan, 1j, b"x", "a\0b", "\ud800", object(), Strange(),
    {1: Strange()}, (Strange(),),
    (math.inf,), [math.nan, 1], (10**400,), {"a": math.inf}, {"a": (2**63,)}, ("\ud800",), {1, 2},
    (None,), "x" * 100_000, range(3), int, len,
]  # fmt: skip
MAYBE = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    0.5,
    1.5,
    "x",
    "",
    "auto",
    [],
    {},
    (),
    (1, 2),
    [2, 1],
    (1, 1),
    {"a": (1,)},
    ((1,),),
]


def take(name, field, value):
    return CLASSES[name](**{**NEEDED.get(name, {}), **BESIDE.get(field, {}), field: value})


def show(value):
    return errors.shown(value)[:12]


@pytest.mark.parametrize(("name", "field"), [(n, f.name) for n, f in FIELDS], ids=lambda word: word)
def test_every_field_takes_a_value_or_names_itself(name, field):
    for value in [*NEVER, *MAYBE]:
        try:
            made = take(name, field, value)
        except SettingError as error:
            text = str(error)
            assert f"{name}.{field}" in text, text
            assert len(text) < 600 and text.isprintable(), text
        else:
            assert name == "Sweep" or dataclasses.replace(made) == made
            free = (name, field) in {("Drift", "base"), ("FusionAttention", "base")} and isinstance(value, str)
            assert any(value is one for one in MAYBE) or (free and checks.is_text(value)), show(value)


NUMERIC = [(n, f.name) for n, f in FIELDS if "float" in str(f.type)]


def test_the_fields_that_hold_fractions_are_those_that_were_meant():
    assert len(NUMERIC) >= 25 and ("Drift", "store_gb") in NUMERIC and ("DeepStack", "tower_lr") in NUMERIC


@pytest.mark.parametrize(("name", "field"), NUMERIC, ids=lambda word: word)
@pytest.mark.parametrize("text", ["1e999", "-1e999", "9" * 400])
def test_no_number_without_an_end_comes_from_gin(name, field, text):
    with pytest.raises(SettingError, match=rf"^{name}\.{field} = .*: {name}\.{field} = .*expected"):
        config.read([], [f"{name}.{field} = {text}"])


def test_values_are_shown_short():
    assert errors.shown("x" * 5000) == f"'{'x' * 59}...{'x' * 16}'"
    assert errors.shown(10**5000) in ("<int>", errors.short(str(10**500)[:1] + "0" * 5000))
    assert errors.shown(Strange()) == "<Strange>"
    assert errors.shown((1, "a")) == "(1, 'a')"
    assert errors.printable("a\nb\0\ud800") == r"a\nb\x00\ud800" and errors.printable("Maße") == "Maße"


def test_numbers_that_64_bits_hold_are_numbers():
    assert checks.is_number(checks.LARGEST) and not checks.is_number(checks.LARGEST + 1)
    assert checks.is_number(1.5) and not checks.is_number(True) and not checks.is_number("1")
    assert not any(map(checks.is_number, (math.inf, -math.inf, math.nan, 10**400)))
