"""What takes part in a Trainer's runs: which points it comes to, in what order, and what is left of it afterwards."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llava_patch.integrations.training.extension import TrainerExtension, extend

METHODS = {
    "create_optimizer", "_load_optimizer_and_scheduler", "_load_best_model", "_save_checkpoint", "training_step", "log",
}  # fmt: skip


class Model(torch.nn.Module):
    """One weight that wants to be 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight - 1) ** 2).mean()}


def _trainer(folder, **more):
    values = {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "report_to": "none", "use_cpu": True,
              "disable_tqdm": True, "learning_rate": 0.1, **more}  # fmt: skip
    data = [{"x": torch.zeros(1), "labels": torch.zeros(1)}] * 8
    return Trainer(Model(), TrainingArguments(str(folder), **values), train_dataset=data)


class Noting(TrainerExtension):
    """Notes every point, under its name."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def _note(self, point, *about):
        self.notes.append((self.name, point, *about))

    def arrange(self, optimizer):
        self._note("arrange", len(optimizer.param_groups))

    def load(self, folder):
        self._note("load", folder.name)

    def resume(self, folder):
        self._note("resume", folder and folder.name)

    def begin(self, state):
        self._note("begin", state.global_step)

    def begin_step(self, state, optimizer):
        self._note("begin_step", state.global_step, optimizer is not None)

    def training_step(self, step, *args, **kwargs):
        self._note("training_step")
        return step(*args, **kwargs)

    def end_step(self, state):
        self._note("end_step", state.global_step)

    def log(self, logs):
        return {**logs, self.name: 1.0, "order": logs.get("order", "") + self.name}

    def save(self, state, folder):
        self._note("save", folder.name, [path.name for path in folder.iterdir()])

    def end(self, state):
        self._note("end", state.global_step)


def test_every_point_comes_once_in_the_order_of_the_extensions(tmp_path):
    trainer, notes = _trainer(tmp_path), []
    one, two = Noting("a", notes), Noting("b", notes)
    extend(trainer, one)
    extend(trainer, two)
    assert one.trainer is two.trainer is trainer
    assert sum(type(c).__module__.startswith("llava_patch") for c in trainer.callback_handler.callbacks) == 1
    trainer.train()
    assert [note[1:] for note in notes if note[0] == "a"] == [
        ("arrange", 2), ("resume", None), ("begin", 0),
        ("begin_step", 0, True), ("training_step",), ("end_step", 1),
        ("begin_step", 1, True), ("training_step",), ("end_step", 2),
        ("save", "checkpoint-2", []), ("end", 2),
    ]  # fmt: skip
    points = [note[:2] for note in notes if note[1] != "training_step"]
    assert points[::2] == [("a", point) for _, point in points[1::2]]  # a first, b next
    assert [entry["order"] for entry in trainer.state.log_history] == ["ab"] * 3
    assert not {"training_step", "log"} & set(vars(trainer))
    notes.clear()
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = [(name, "load", "checkpoint-2") for name in "ab"] + [(name, "resume", "checkpoint-2") for name in "ab"]
    assert [note for note in notes if note[1] in ("load", "resume")] == resumed and (
        "b",
        "begin_step",
        2,
        True,
    ) in notes
    assert notes.count(("a", "end_step", 3)) == 1


def test_an_optimizer_of_the_callers_is_left_alone(tmp_path):
    trainer, notes = _trainer(tmp_path), []
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    extend(trainer, Noting("a", notes))
    trainer.create_optimizer()
    assert not notes


def test_only_what_has_something_to_do_replaces_anything(tmp_path):
    class Rates(TrainerExtension):
        def arrange(self, optimizer):
            """Nothing to change."""

    trainer = _trainer(tmp_path)
    extend(trainer, TrainerExtension())
    assert not METHODS & set(vars(trainer))
    extend(trainer, Rates())
    assert METHODS & set(vars(trainer)) == {"create_optimizer"}
    weight = _trainer(tmp_path)
    weight.train()
    trainer.train()
    assert torch.equal(trainer.model.weight, weight.model.weight) and trainer.model.weight > 0


def test_a_run_that_broke_off_leaves_nothing_to_the_next(tmp_path):
    class Breaking(Noting):
        broken = True

        def end_step(self, state):
            if self.broken:
                raise RuntimeError("as a full disk would")

    trainer, notes = _trainer(tmp_path), []
    extension = Breaking("a", notes)
    extend(trainer, extension)
    with pytest.raises(RuntimeError, match="full disk"):
        trainer.train()
    extension.broken = False
    notes.clear()
    trainer.train()
    assert [note[1] for note in notes].count("training_step") == 2  # not once more for each run
    assert not {"training_step", "log"} & set(vars(trainer))
