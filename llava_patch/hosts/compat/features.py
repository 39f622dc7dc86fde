"""What functions of transformers take, by which its versions are told apart."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


@functools.cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Names that a function takes."""
    return frozenset(inspect.signature(function).parameters)
