"""What the handlers put around the hosts' own functions hands on what it was given."""

from types import SimpleNamespace

import pytest
from transformers import Trainer, TrainingArguments

from llava_patch import SkipLinks, patch
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
    undo.wrap(Trainer, "__init__", startup._init_trainer)
    names = ["model", "args", "data_collator", "train_dataset", "eval_dataset"]
    given = dict(zip(names, ["model", "args", "collator", "data", "other data"], strict=True))
    made = Trainer(*list(given.values())[:count], **{name: given[name] for name in names[count:]})
    expected = {**given, "data_collator": "collator with regions", "train_dataset": "data with regions"}
    assert made.given[0] == tuple(expected.values())[:count]
    assert made.given[1] == {name: expected[name] for name in names[count:]}
    assert attached == [made]
    undo.unwind()
    assert Trainer.__init__ is stock


def test_a_model_that_is_patched_after_its_trainer_was_made_gets_its_groups_and_its_warm_up(
    host, tmp_path, monkeypatch, capsys
):
    class LLaVATrainer(Trainer):
        pass

    monkeypatch.setattr(startup.active, "begin_training", lambda: None)
    monkeypatch.setattr(startup, "_mends", lambda: False)
    undo = UndoStack()
    startup._on_llava_trainer(SimpleNamespace(LLaVATrainer=LLaVATrainer), undo)
    trainer = LLaVATrainer(host.model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    settings = {"train_tower": "all", "tower_lr": 1e-4, "unfreeze_after": 0.5}
    handle = patch(host.model, fusion=SkipLinks(stride=2, **settings))
    optimizer = trainer.create_optimizer()
    groups = optimizer.param_groups
    tower, adapter = ({id(p) for p in some} for some in (handle.anatomy.vision_model.parameters(),
                                                         handle.adapter_parameters()))  # fmt: skip
    assert {g["lr"] for g in groups if tower & set(map(id, g["params"]))} == {1e-4}
    assert all(len({id(p) in adapter for p in g["params"]}) == 1 for g in groups)  # the projector is apart
    assert trainer.create_optimizer() is optimizer and optimizer.param_groups == groups  # once
    trainer.state.max_steps = 10
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert capsys.readouterr().out.count("the projector learns alone in 5 of 10 steps") == 1
    undo.unwind()
    assert "create_optimizer" not in vars(LLaVATrainer)
