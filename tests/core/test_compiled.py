"""What runs beside torch.compile's graphs, and what is followed in there."""

import functools
import threading

import pytest
import torch

from llava_patch.core import compiled as compiled_code
from llava_patch.core.compiled import aside, follow
from llava_patch.core.undo import UndoStack


class Counting:
    """A backend that runs graphs as they are and counts their operations."""

    def __init__(self):
        self.operations = []

    def __call__(self, graph, inputs):
        self.operations += [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
        return graph.forward


@pytest.fixture(autouse=True)
def no_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _inner(x):
    return torch.sin(x)


@aside
def _bookkeeping(x):
    for i in range(int(x.numel())):
        x = torch.cos(x) + i
    return follow(_inner, x)


def _outer(x):
    return torch.exp(_bookkeeping(torch.tanh(x)))


def test_only_what_is_followed_is_compiled():
    backend = Counting()
    compiled = torch.compile(_outer, backend=backend)
    for size in (3, 4, 5, 6):
        x = torch.arange(float(size))
        assert torch.equal(compiled(x), _outer(x))
    assert set(backend.operations) == {"tanh", "sin", "exp"} and len(backend.operations) == 6  # twice: sizes vary


@pytest.mark.parametrize("lacks", ["set_eval_frame", "_skip"])
def test_a_torch_without_the_private_names_compiles_around_it(monkeypatch, lacks):
    expected = [_outer(torch.ones(size)) for size in (3, 4, 5)]
    monkeypatch.setattr(compiled_code, lacks, {"set_eval_frame": None, "_skip": lambda: None}[lacks])
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", None)
    backend, beside = Counting(), aside(_bookkeeping.__wrapped__)
    compiled = torch.compile(lambda x: torch.exp(beside(torch.tanh(x))), backend=backend)
    for x in expected:
        assert torch.equal(compiled(torch.ones(len(x))), x)
    assert set(backend.operations) == {"tanh", "exp"}


def test_nothing_is_followed_outside_of_a_compiled_call():
    backend = Counting()
    torch.compile(_outer, backend=backend)(torch.ones(2))
    before = len(backend.operations)
    _outer(torch.ones(7))
    thread = threading.Thread(target=_outer, args=(torch.ones(9),))
    thread.start()
    thread.join()
    assert len(backend.operations) == before


def test_an_exception_leaves_the_compiler_at_work():
    @aside
    def fails(x):
        raise ValueError("ours")

    def outer(x):
        try:
            fails(x)
        except ValueError:
            pass
        return _inner(x)

    backend = Counting()
    torch.compile(outer, backend=backend)(torch.ones(2))
    assert "sin" in backend.operations


def test_a_method_that_was_compiled_before_it_was_wrapped_is_not_bypassed():
    """torch.compile looks for what a compiled function was made of, and would find the one under the wrapper."""
    module = torch.nn.Linear(2, 2)
    module.forward = torch.compile(module.forward, backend="eager")
    with UndoStack() as undo:
        undo.wrap(module, "forward", lambda forward, x: forward(x) + 1)
        again = torch.compile(module.forward, backend="eager")
        x = torch.ones(1, 2)
        assert torch.equal(again(x), functools.partial(torch.nn.Linear.forward, module)(x) + 1)
