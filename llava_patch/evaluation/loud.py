"""Makes failures of a patched model, and of our tasks, end an evaluation with a message and a non-zero exit status.

Left alone, lmms-eval hides them twice: its `llava_hf` model catches every exception of `generate`, answers with an
empty string and so scores a full table of zeros; and its command line prints the traceback of any other exception but
exits with status 0. Evaluations of unpatched models on stock tasks stay exactly as lmms-eval runs them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from llava_patch.errors import LlavaPatchError

_MARK = "_llava_patch_loud"
_PACKAGE = Path(__file__).resolve().parents[1]
_OURS = (Path(__file__).resolve(), Path(__file__).resolve().with_name("register.py"))


class EvaluationFailure(LlavaPatchError):
    """An evaluation that llava_patch takes part in failed; the cause is chained."""


class _Escape(BaseException):
    """Carries an exception out of a patched model through `except Exception` in lmms-eval's model classes."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def install() -> None:
    """Wrap lmms-eval's `evaluate` and `simple_evaluate`; does nothing when that is done or it is not loaded."""
    evaluator: Any = sys.modules.get("lmms_eval.evaluator")
    for name, wrap in (("evaluate", _loud_evaluate), ("simple_evaluate", _loud_simple_evaluate)):
        function = getattr(evaluator, name, None)
        if function is not None and not getattr(function, _MARK, False):
            wrapped = functools.wraps(function)(wrap(function))
            setattr(wrapped, _MARK, True)
            setattr(evaluator, name, wrapped)


def _loud_evaluate(original: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        from llava_patch.evaluation import cache

        error: Exception
        lm = kwargs.get("lm", args[0] if args else None)
        tasks = kwargs.get("task_dict", args[1] if len(args) > 1 else {})
        model = model_of(lm)
        patch_name = _fingerprint(model)
        if not patch_name and _patch_is_configured():
            error = EvaluationFailure(
                f"a patch is configured, but {type(model).__name__} was loaded without it: this kind of model is not "
                "one that llava_patch knows (unset LLAVA_PATCH_GIN_FILE and LLAVA_PATCH_GIN_PARAM to evaluate it)"
            )
            _fail(error, "a model that should have been patched", kwargs.get("cli_args"))
        if not patch_name and not has_our_task(tasks):
            return original(*args, **kwargs)
        try:
            if patch_name:
                cache.mark(kwargs.get("response_cache"), patch_name)
            with _guarded(model if patch_name else None):
                # lm.clean() deletes the model before scoring; a name for it here would keep its memory
                del model
                return original(*args, **kwargs)
        except _Escape as escape:
            error = escape.error
        except Exception as caught:  # whatever it is, it is reported and raised again
            error = caught
        what = f"the patched model ({patch_name})" if patch_name else "a llava_patch task"
        _fail(error, what, kwargs.get("cli_args"))

    return evaluate


def _loud_simple_evaluate(original: Callable[..., Any]) -> Callable[..., Any]:
    def simple_evaluate(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except EvaluationFailure:
            raise
        except Exception as error:
            if not concerns_us(error):
                raise
            _fail(error, "llava_patch, before the first request", kwargs.get("cli_args"))

    return simple_evaluate


def _patch_is_configured() -> bool:
    from llava_patch import startup

    asked = startup.configuration()
    return asked is not None and bool(asked.lasting())


def _fail(error: Exception, what: str, cli_args: Any) -> None:
    message = f"llava_patch: the evaluation of {what} failed: {type(error).__name__}: {error}"
    if cli_args is None:  # called from Python: an exception is loud enough
        raise EvaluationFailure(message) from error
    traceback.print_exception(error, file=sys.stderr)
    print(f"{message}\nNo results were written.", file=sys.stderr, flush=True)
    raise SystemExit(1)  # the command line swallows any Exception and exits with 0


def concerns_us(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, is ours or passed through our code."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, LlavaPatchError):
            return True
        for frame, _ in traceback.walk_tb(link.__traceback__):
            path = Path(frame.f_code.co_filename).resolve()
            if _PACKAGE in path.parents and path not in _OURS and path.name not in ("startup.py", "loading.py"):
                return True
        link = link.__cause__ or link.__context__
    return False


def model_of(lm: Any) -> nn.Module | None:
    """The torch model inside an lmms-eval model; None for those that have none (served models)."""
    for name in ("model", "_model"):
        model = getattr(lm, name, None)
        if isinstance(model, nn.Module):
            return model
    return None


def _fingerprint(model: nn.Module | None) -> str:
    from llava_patch.handle import fingerprint

    return "" if model is None else fingerprint(model)


def has_our_task(task_dict: Any) -> bool:
    """Whether a (nested) dictionary of lmms-eval tasks holds one of ours."""
    tasks = sys.modules.get("llava_patch.evaluation.tasks")
    if tasks is None:  # no task of ours was ever loaded
        return False
    for item in task_dict.values():
        if isinstance(item, dict):
            if has_our_task(item):
                return True
        elif isinstance(item[1] if isinstance(item, tuple) else item, tasks.MeasurementTask):
            return True
    return False


@contextlib.contextmanager
def _guarded(model: nn.Module | None) -> Iterator[None]:
    """Let exceptions of a model's `generate` and `forward` escape while the block runs."""
    if model is None:
        yield
        return
    missing = object()
    old = {name: vars(model).get(name, missing) for name in ("generate", "forward")}
    for name in old:
        setattr(model, name, _escaping(getattr(model, name)))
    reference = weakref.ref(model)
    del model
    try:
        yield
    finally:
        owner = reference()
        if owner is not None:
            for name, value in old.items():
                if value is missing:
                    vars(owner).pop(name, None)
                else:
                    vars(owner)[name] = value


def _escaping(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            raise _Escape(error) from error

    return guarded
