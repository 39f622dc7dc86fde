"""Failures of patched models and of our tasks are told; what llava_patch takes no part in is left alone."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from llava_patch import Routing, patch
from llava_patch.evaluation import command, loud

from . import fileset


class SwallowingLm:
    """As lmms-eval's llava_hf: every exception of generate becomes an empty answer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for request in requests:
            try:
                answers.append(self.model.generate(**request))
            except Exception:
                answers.append("")
        return answers

    def clean(self) -> None:
        del self.model


def evaluate(lm: Any, task_dict: dict[str, Any], cli_args: Any = None, **kwargs: Any) -> list[Any]:
    return lm.generate_until([{"bad": "argument"}])


@pytest.fixture(autouse=True)
def no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told here is not to end the tests' own process."""
    monkeypatch.setattr(command, "_current", None)
    monkeypatch.setattr(command.atexit, "register", lambda function: None)


def test_swallowed_failures_of_a_patched_model_get_out() -> None:
    model = fileset.hf_model()
    wrapped = loud._loud_evaluate(evaluate)
    assert wrapped(SwallowingLm(model), {}) == [""]  # stock behaviour of an unpatched model
    with patch(model, routing=Routing(split=2)):
        before = dict(vars(model))
        with pytest.raises(loud.EvaluationFailure, match=r"patched model .* failed: .*bad") as caught:
            wrapped(lm=SwallowingLm(model), task_dict={})
        assert caught.value.__cause__ is not None and command._current is None  # from Python: loud enough
        with pytest.raises(loud.EvaluationFailure):
            wrapped(SwallowingLm(model), {}, cli_args=SimpleNamespace())
        assert command._current is not None and "patched model" in str(command._current.why_failed())
        assert {k: v for k, v in vars(model).items()} == before


def test_swallowed_failures_of_a_stock_model_get_out_where_the_command_asks_for_us() -> None:
    wrapped, model = loud._loud_evaluate(evaluate), fileset.hf_model()
    command._current = command.Command("lmms-eval", ["--tasks", "pope"])
    assert wrapped(SwallowingLm(model), {}) == [""]
    command._current = command.Command("lmms-eval", ["--tasks", "pope,rprobe"])
    with pytest.raises(loud.EvaluationFailure, match=r"the model failed: .*bad"):
        wrapped(SwallowingLm(model), {})


def test_answers_pass_and_the_model_is_freed_when_lmms_eval_lets_go() -> None:
    class Model(nn.Module):
        def generate(self, **kwargs: Any) -> str:
            return "fine"

    seen = {}

    def letting_go(lm: Any, task_dict: Any) -> list[str]:
        answers = lm.generate_until([{}])
        seen["model"] = weakref.ref(lm.model)
        lm.clean()
        gc.collect()
        seen["alive"] = seen["model"]() is not None
        return answers

    wrapped, original = loud._loud_evaluate(letting_go), loud._fingerprint
    loud._fingerprint = lambda model: "abc"
    lm = SwallowingLm(Model())  # no name for the model itself: pytest's assert would keep it alive
    try:
        answers = wrapped(lm, {})
    finally:
        loud._fingerprint = original
    assert answers == ["fine"] and not seen["alive"]


def test_our_tasks_failures_are_told_on_any_model() -> None:
    from llava_patch.evaluation.tasks import MeasurementTask

    def failing(lm: Any, task_dict: Any, cli_args: Any = None) -> None:
        raise ValueError("inside")

    wrapped = loud._loud_evaluate(failing)
    ours = {"group": {"mine": object.__new__(MeasurementTask)}}
    for tasks, told in (({"stock": object()}, False), (ours, True)):
        with pytest.raises(ValueError, match="inside"):
            wrapped(SimpleNamespace(), tasks, cli_args=SimpleNamespace())
        assert (command._current is not None) is told
    assert command._current is not None and command._current.why_failed() == "ValueError: inside"


@pytest.mark.parametrize("task", ["pope", "rprobe"])
def test_what_fails_outside_our_code_is_told_where_the_command_asks_for_us(task: str) -> None:
    def failing(cli_args: Any = None) -> None:
        raise OSError("no such checkpoint")

    run = command._current = command.Command("lmms-eval", ["--tasks", task])
    with pytest.raises(OSError, match="no such checkpoint"):
        loud._loud_simple_evaluate(failing)(cli_args=SimpleNamespace())
    assert (run.error is not None) is (task == "rprobe")


def test_an_evaluation_is_finished_when_its_table_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"results": {"rprobe": {"rprobe_mse,none": 1.0}}, "configs": {"rprobe": {}}}
    run = command._current = command.Command("lmms-eval", ["--tasks", "rprobe"])
    main = SimpleNamespace(cli_evaluate=None, make_table=lambda results, column="results": "|Tasks|")
    monkeypatch.setitem(loud.sys.modules, "lmms_eval.__main__", main)
    loud.install()
    assert loud._loud_simple_evaluate(lambda: results)() is results and run.results == []
    assert main.make_table(results) == main.make_table(results, "groups") == "|Tasks|"
    assert run.results == [results] and run.why_failed() is None
    run.results = []
    monkeypatch.setenv("RANK", "1")
    loud._loud_simple_evaluate(lambda: None)()
    assert run.results == [None]
    monkeypatch.setenv("RANK", "0")  # the first rank is given results, or has failed
    run.results = []
    loud._loud_simple_evaluate(lambda: None)()
    assert run.results == []
    del main.make_table  # a version that prints otherwise: what it returns has to do
    loud._loud_simple_evaluate(lambda: results)()
    assert run.results == [results]


def test_install_wraps_once() -> None:
    import lmms_eval.evaluator as evaluator

    loud.install()
    first = (evaluator.evaluate, evaluator.simple_evaluate)
    loud.install()
    assert (evaluator.evaluate, evaluator.simple_evaluate) == first
    assert all(getattr(f, loud._MARK) for f in first)
