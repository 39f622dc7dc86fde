"""What the handlers put around the hosts' own functions hands on what it was given."""

import pytest

from llava_patch.core.undo import UndoStack
from llava_patch.integrations import startup
from llava_patch.integrations.training import llava


@pytest.mark.parametrize("count", range(6))
def test_a_trainer_is_made_with_the_data_that_carry_regions_however_they_are_given(count, monkeypatch):
    class Trainer:
        def __init__(self, *args, **kwargs):
            self.given = args, kwargs

    def prepare_run(given):
        for name in ("data_collator", "train_dataset"):
            given[name] += " with regions"
        return attached.append

    attached: list = []
    monkeypatch.setattr(llava, "prepare_run", prepare_run)
    monkeypatch.setattr(startup.active, "configuration", lambda: "something")
    undo, stock = UndoStack(), Trainer.__init__
    startup._wrap_trainer_init(Trainer, undo)
    names = ["model", "args", "data_collator", "train_dataset", "eval_dataset"]
    given = dict(zip(names, ["model", "args", "collator", "data", "other data"], strict=True))
    made = Trainer(*list(given.values())[:count], **{name: given[name] for name in names[count:]})
    expected = {**given, "data_collator": "collator with regions", "train_dataset": "data with regions"}
    assert made.given[0] == tuple(expected.values())[:count]
    assert made.given[1] == {name: expected[name] for name in names[count:]}
    assert attached == [made]
    undo.unwind()
    assert Trainer.__init__ is stock
