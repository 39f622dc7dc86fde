"""Failures of patched models and of our tasks; unpatched models on stock tasks are left alone."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from llava_patch import Routing, patch
from llava_patch.errors import SettingError
from llava_patch.evaluation import loud

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


def test_swallowed_failures_of_a_patched_model_get_out(capsys: pytest.CaptureFixture[str]) -> None:
    model = fileset.hf_model()
    wrapped = loud._loud_evaluate(evaluate)
    assert wrapped(SwallowingLm(model), {}) == [""]  # stock behaviour of an unpatched model
    with patch(model, routing=Routing(split=2)):
        before = dict(vars(model))
        with pytest.raises(loud.EvaluationFailure, match=r"patched model .* failed: .*bad") as caught:
            wrapped(lm=SwallowingLm(model), task_dict={})
        assert caught.value.__cause__ is not None
        with pytest.raises(SystemExit) as ended:
            wrapped(SwallowingLm(model), {}, cli_args=SimpleNamespace())
        assert ended.value.code == 1
        assert {k: v for k, v in vars(model).items()} == before
    err = capsys.readouterr().err
    assert "Traceback" in err and "llava_patch: the evaluation of the patched model" in err


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


def test_our_tasks_failures_are_loud_on_any_model() -> None:
    from llava_patch.evaluation.tasks import MeasurementTask

    def failing(lm: Any, task_dict: Any, cli_args: Any = None) -> None:
        raise ValueError("inside")

    wrapped = loud._loud_evaluate(failing)
    ours = {"group": {"mine": object.__new__(MeasurementTask)}}
    with pytest.raises(SystemExit):
        wrapped(SimpleNamespace(), ours, cli_args=SimpleNamespace())
    with pytest.raises(ValueError, match="inside"):  # none of ours: as lmms-eval does it
        wrapped(SimpleNamespace(), {"stock": object()}, cli_args=SimpleNamespace())


def test_failures_while_loading_are_ours_only_when_our_code_is_in_them() -> None:
    def ours(cli_args: Any = None) -> None:
        Routing(split=-1)

    def stock(cli_args: Any = None) -> None:
        raise OSError("no such checkpoint")

    def hidden(cli_args: Any = None) -> None:
        try:
            ours()
        except SettingError as error:
            raise TypeError("re-raised by the host") from error

    for function in (ours, hidden):
        with pytest.raises(SystemExit):
            loud._loud_simple_evaluate(function)(cli_args=SimpleNamespace())
        with pytest.raises(loud.EvaluationFailure, match="before the first request"):
            loud._loud_simple_evaluate(function)()
    with pytest.raises(OSError, match="no such checkpoint"):
        loud._loud_simple_evaluate(stock)(cli_args=SimpleNamespace())


def test_install_wraps_once() -> None:
    import lmms_eval.evaluator as evaluator

    loud.install()
    first = (evaluator.evaluate, evaluator.simple_evaluate)
    loud.install()
    assert (evaluator.evaluate, evaluator.simple_evaluate) == first
    assert all(getattr(f, loud._MARK) for f in first)
