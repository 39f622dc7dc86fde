"""Failures of patched models and of our tasks are told; what llava_patch takes no part in is left alone."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from llava_patch import Routing, patch
from llava_patch.integrations.lmms_eval import command, loud
from tests.support import fileset


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
        run = command._current = command.Command("lmms-eval", ["--tasks", "pope"])
        with pytest.raises(loud.EvaluationFailure):
            loud._loud_simple_evaluate(wrapped)(SwallowingLm(model), {}, cli_args=SimpleNamespace())
        assert run.ours and "patched model" in str(run.why_failed())
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
    from llava_patch.integrations.lmms_eval.tasks import MeasurementTask

    def failing(lm: Any, task_dict: Any, cli_args: Any = None) -> None:
        raise ValueError("inside")

    wrapped = loud._loud_evaluate(failing)
    ours = {"group": {"mine": object.__new__(MeasurementTask)}}
    for tasks, told in (({"stock": object()}, False), (ours, True)):
        run = command._current = command.Command("lmms-eval", ["--tasks", "pope"])
        with pytest.raises(ValueError, match="inside"):
            loud._loud_simple_evaluate(wrapped)(SimpleNamespace(), tasks, cli_args=SimpleNamespace())
        assert (run.failure() is not None) is told and run.why_failed() == "ValueError: inside"


def test_another_program_that_is_told_by_an_exception_is_not_ended_later() -> None:
    from llava_patch.integrations.lmms_eval.tasks import MeasurementTask

    def failing(lm: Any, task_dict: Any, cli_args: Any = None) -> None:
        raise ValueError("inside")

    wrapped = loud._loud_simple_evaluate(loud._loud_evaluate(failing))
    with pytest.raises(ValueError, match="inside"):
        wrapped(SimpleNamespace(), {"mine": object.__new__(MeasurementTask)}, cli_args=SimpleNamespace())
    assert command._current is None


def test_what_is_not_as_we_know_it_is_evaluated_as_ever_while_nothing_is_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Odd:
        @property
        def model(self) -> Any:
            raise RuntimeError("not loaded yet")

    from llava_patch.integrations.lmms_eval import tasks  # noqa: F401

    run = command._current = command.Command("lmms-eval", ["--tasks", "pope"])
    wrapped = loud._loud_evaluate(lambda lm, task_dict: "answer")
    assert wrapped(Odd(), {}) == wrapped(SimpleNamespace(), [("not", "a dictionary")]) == "answer"
    assert run.doubt is not None
    monkeypatch.setattr(loud, "_patch_is_configured", lambda: True)
    with pytest.raises(RuntimeError, match="not loaded yet"):
        wrapped(Odd(), {})


@pytest.mark.parametrize("task", ["pope", "rprobe"])
def test_what_fails_outside_our_code_is_told_where_the_command_asks_for_us(task: str) -> None:
    def failing(cli_args: Any = None) -> None:
        raise OSError("no such checkpoint")

    run = command._current = command.Command("lmms-eval", ["--tasks", task])
    with pytest.raises(OSError, match="no such checkpoint"):
        loud._loud_simple_evaluate(failing)(cli_args=SimpleNamespace())
    assert (run.failure() is not None) is (task == "rprobe")


def test_a_program_of_ones_own_is_told_what_lmms_eval_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def cli_evaluate(args: Any = None) -> str:
        def failing(cli_args: Any) -> None:
            raise OSError("no such checkpoint")

        with contextlib.suppress(OSError):
            loud._loud_simple_evaluate(failing)(cli_args=args)
        return "printed"

    main = SimpleNamespace(cli_evaluate=cli_evaluate)
    monkeypatch.setitem(loud.sys.modules, "lmms_eval.__main__", main)
    for asked in (SimpleNamespace(tasks="rprobe"), SimpleNamespace(tasks="pope")):
        monkeypatch.setattr(sys, "argv", ["script.py"])
        loud.install()
        if asked.tasks == "pope":
            assert main.cli_evaluate(asked) == "printed"
        else:
            with pytest.raises(loud.EvaluationFailure, match="OSError: no such checkpoint"):
                main.cli_evaluate(asked)
        assert command._current is None


def test_an_evaluation_is_finished_when_its_table_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"results": {"rprobe": {"rprobe_mse,none": 1.0}}, "configs": {"rprobe": {}}}
    run = command._current = command.Command("lmms-eval", ["--tasks", "rprobe"])
    main = SimpleNamespace(cli_evaluate=None, make_table=lambda results, column="results": "|Tasks|")
    monkeypatch.setitem(loud.sys.modules, "lmms_eval.__main__", main)
    loud.install()
    assert loud._loud_simple_evaluate(lambda: results)() is results and "no table" in str(run.why_failed())
    assert main.make_table(results) == main.make_table(results, "groups") == "|Tasks|"
    assert run.why_failed() is None
    monkeypatch.setenv("RANK", "1")
    loud._loud_simple_evaluate(lambda: None)()
    assert run.why_failed() is None
    monkeypatch.setenv("RANK", "0")  # the first rank is given results, or has failed
    loud._loud_simple_evaluate(lambda: None)()
    assert "no table" in str(run.why_failed())
    del main.make_table  # a version that prints otherwise: what it returns has to do
    loud._loud_simple_evaluate(lambda: results)()
    assert run.why_failed() is None


def test_install_wraps_once() -> None:
    import lmms_eval.evaluator as evaluator

    loud.install()
    first = (evaluator.evaluate, evaluator.simple_evaluate)
    loud.install()
    assert (evaluator.evaluate, evaluator.simple_evaluate) == first
    assert all(getattr(f, loud._MARK) for f in first)
