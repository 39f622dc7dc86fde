"""Lets failures of a patched model, and of our tasks, out of an evaluation.

Left alone, lmms-eval hides them twice: its `llava_hf` model catches every exception of `generate`, answers with an
empty string and so scores a full table of zeros; and its command line prints any other exception but exits with status
0, see `command`. Evaluations that llava_patch takes no part in stay exactly as lmms-eval runs them.
"""

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from llava_patch.core.errors import HostError
from llava_patch.integrations.lmms_eval import command
from llava_patch.integrations.lmms_eval.command import EvaluationFailure
from llava_patch.settings import active

_MARK = "_llava_patch_fails_fast"
_CACHE_KEY = "_model_fingerprint_hash"  # of lmms-eval's ResponseCache
_MAIN = ("lmms_eval.__main__", "__main__")  # `python -m lmms_eval` runs it under the second name, in some versions


class _Escape(BaseException):
    """Carries an exception out of a model through `except Exception` in lmms-eval's model classes."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def install() -> None:
    """Wrap lmms-eval's command, what it evaluates and what it prints tables with, where loaded and not yet wrapped."""
    _wrap("lmms_eval.evaluator", evaluate=_checked_evaluate, simple_evaluate=_checked_simple_evaluate)
    for name in _MAIN:
        if hasattr(sys.modules.get(name), "cli_evaluate"):
            _wrap(name, cli_evaluate=_checked_command, make_table=_noted_table)


def _wrap(module_name: str, **wrappers: Callable[..., Any]) -> None:
    module: Any = sys.modules.get(module_name)
    for name, wrap in wrappers.items():
        function = getattr(module, name, None)
        if function is not None and not getattr(function, _MARK, False):
            wrapped = wrap(function)
            setattr(wrapped, _MARK, True)
            setattr(module, name, wrapped)


def _wrapping(call: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a decorator of what is to be called, with the decorated function first, instead of it."""
    return lambda original: functools.wraps(original)(functools.partial(call, original))


@_wrapping
def _checked_evaluate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = command.current()
    lm = kwargs.get("lm", args[0] if args else None)
    tasks = kwargs.get("task_dict", args[1] if len(args) > 1 else {})
    configured = _patch_is_configured()
    try:
        model = model_of(lm)
        patch_name = _fingerprint(model)
        ours = bool(patch_name) or configured or has_our_task(tasks)
    except Exception as unknown:  # not a model, or not tasks, as we know them
        if configured:
            raise
        run.doubt = unknown
        return original(*args, **kwargs)
    if ours:
        run.ours = True
    elif not run.involves_us():
        return original(*args, **kwargs)
    try:
        if configured and not patch_name:
            raise EvaluationFailure(
                f"a patch is configured, but {type(model).__name__} was loaded without it: this kind of model is not "
                "one that llava_patch knows (unset LLAVA_PATCH_GIN_FILE and LLAVA_PATCH_GIN_PARAM to evaluate it)"
            )
        if patch_name:
            mark_cache(kwargs.get("response_cache"), patch_name)
        with _guarded(model):
            # lm.clean() deletes the model before scoring; a name for it here would keep its memory
            del model
            return original(*args, **kwargs)
    except _Escape as escape:
        what, error = f"the patched model ({patch_name})" if patch_name else "the model", escape.error
        raise EvaluationFailure(f"{what} failed: {type(error).__name__}: {error}") from error


@_wrapping
def _checked_simple_evaluate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run, arguments = command.current(), kwargs.get("cli_args")
    run.began(arguments)
    try:
        results = original(*args, **kwargs)
    except Exception as error:
        run.ended(arguments, error)
        raise
    # Results are complete when lmms-eval has come to printing them; ranks above the first are given none.
    noted = any(getattr(getattr(sys.modules.get(name), "make_table", None), _MARK, False) for name in _MAIN)
    run.ended(arguments, results, os.environ.get("RANK", "0") != "0" if results is None else not noted)
    return results


@_wrapping
def _checked_command(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with command.called(kwargs.get("args", args[0] if args else None)):
        return original(*args, **kwargs)


@_wrapping
def _noted_table(original: Callable[..., Any], result_dict: Any, *args: Any, **kwargs: Any) -> Any:
    table = original(result_dict, *args, **kwargs)
    command.current().printed(result_dict)
    return table


@_wrapping
def _escaping(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return original(*args, **kwargs)
    except Exception as error:
        raise _Escape(error) from error


def _patch_is_configured() -> bool:
    asked = active.configuration()
    return asked is not None and bool(asked.lasting())


def model_of(lm: Any) -> nn.Module | None:
    """The torch model inside an lmms-eval model; None for those that have none (served models)."""
    found = (getattr(lm, name, None) for name in ("model", "_model"))
    return next((model for model in found if isinstance(model, nn.Module)), None)


def _fingerprint(model: nn.Module | None) -> str:
    from llava_patch.patching.keys import patch_name

    return "" if model is None else patch_name(model)


def has_our_task(task_dict: Any) -> bool:
    """Whether a (nested) dictionary of lmms-eval tasks holds one of ours."""
    tasks = sys.modules.get("llava_patch.integrations.lmms_eval.tasks")
    if tasks is None:  # no task of ours was ever loaded
        return False
    found = [item[1] if isinstance(item, tuple) else item for item in task_dict.values()]
    return any(has_our_task(one) if isinstance(one, dict) else isinstance(one, tasks.MeasurementTask) for one in found)


@contextlib.contextmanager
def _guarded(model: nn.Module | None) -> Iterator[None]:
    """Let exceptions of a model's `generate` and `forward` escape while the block runs."""
    if model is None:
        yield
        return
    methods = ("generate", "forward")
    old = {name: vars(model)[name] for name in methods if name in vars(model)}
    for name in methods:
        setattr(model, name, _escaping(getattr(model, name)))
    reference = weakref.ref(model)
    del model
    try:
        yield
    finally:
        owner = reference()
        if owner is not None:
            for name in methods:
                vars(owner).pop(name, None)
            vars(owner).update(old)


def mark_cache(response_cache: Any, patch_name: str) -> None:
    """Put a patch's fingerprint into what the cache (None without `--use_cache`) keys on, beside the model's arguments.

    Entries of another fingerprint, or none, are not found any more, but stay. HostError: the cache has no place for it.
    """
    if response_cache is None:
        return
    current = getattr(response_cache, _CACHE_KEY, None)
    if not isinstance(current, str):
        raise HostError(
            "the response cache of this lmms-eval cannot be told about patches and would serve answers of another "
            "model: run without --use_cache"
        )
    if not current.endswith(patch_name):
        setattr(response_cache, _CACHE_KEY, f"{current}+llava_patch:{patch_name}")
