"""What torch.compile follows of a patched model, and what runs beside its graphs.

Between the host's modules a patch keeps books over ragged batches: context variables, caches, counts of positions.
A graph would be made for the counts of one batch and made again for the next. So `aside` takes a function out of the
graph with all that it calls, and `follow` hands the modules that do the work (a decoder layer, the vision tower, the
stock decoder) back to the compiler that was at work around it.
"""

import functools
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from types import FunctionType
from typing import Any, TypeVar

import torch

from llava_patch.core.undo import holding

# torch has no public way of these: where it lacks one, what a patch puts between modules is out of the graphs whole.
try:
    from torch._C._dynamo.eval_frame import set_eval_frame
except ImportError:
    set_eval_frame = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])
_compiler: ContextVar[Any] = ContextVar("llava_patch_compiler", default=None)


def aside(function: F) -> F:
    """Decorate a function that compiled code calls: the graph ends before it, and nothing in it is traced."""
    skip = _skip()
    if set_eval_frame is None or skip is None:
        return torch.compiler.disable(function)  # and nothing in it is followed

    @functools.wraps(function)
    def beside(*args: Any, **kwargs: Any) -> Any:
        compiler = set_eval_frame(None)
        if compiler is None:  # nothing is compiled, or one that is aside has called
            return function(*args, **kwargs)
        try:
            with holding(_compiler, compiler):
                return function(*args, **kwargs)
        finally:
            set_eval_frame(compiler)

    # As torch.compiler.disable(), which does not tell what it has switched off.
    return skip(beside)  # type: ignore[no-any-return]


def _skip() -> Any:
    try:
        from torch._dynamo.decorators import skip  # at the first decorator: it takes a second
    except ImportError:
        return None
    return skip


def following() -> bool:
    """Whether compiled code has called the `aside` that is at work, so that what is followed is compiled."""
    return _compiler.get() is not None


def follow(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, compiled as that which called the outermost `aside` is."""
    return follow_as(getattr(function, "__qualname__", None), function, *args, **kwargs)


def follow_as(role: Hashable, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`follow`, where graphs are kept apart by role: torch keeps no more than eight for one piece of code."""
    compiler = _compiler.get()
    if compiler is None:
        return function(*args, **kwargs)
    run = frame(role)
    before = set_eval_frame(compiler)
    try:
        return run(function, args, kwargs)
    finally:
        set_eval_frame(before)


def varies(tensor: Any, *dimensions: int) -> None:
    """Say of a tensor (or of what is none) that these sizes differ from call to call: one graph is enough for all."""
    if following() and isinstance(tensor, torch.Tensor):
        mark = getattr(torch._dynamo, "maybe_mark_dynamic", None)  # without it torch finds out, by a graph or two more
        if mark is not None:
            mark(tensor, dimensions)


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


@functools.cache
def frame(role: Hashable) -> Callable[..., Any]:
    """What calls `function(*args, **kwargs)` when given the three, as code of its own for each role.

    Torch keeps graphs by code: much of transformers stands under one decorator, whose code is one.
    """
    return FunctionType(_call.__code__.replace(co_name=f"call {role}"), globals())


def forget() -> None:
    """Drop all compiled code: torch does not look whether a module's hooks are still those it was compiled with."""
    torch.compiler.reset()


def is_compiled(function: Any) -> bool:
    """Whether torch.compile has made a function (not whether it is a method of a compiled module)."""
    return hasattr(function, "_torchdynamo_orig_callable")
