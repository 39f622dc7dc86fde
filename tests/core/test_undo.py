"""Changes of a patch, and how they are taken back."""

import inspect

import torch

from llava_patch.core.undo import UndoStack


class Thing:
    """Something with a method."""

    def double(self, number: int = 1) -> int:
        """Twice the number."""
        return 2 * number


def test_a_wrapped_method_is_called_through_and_comes_back():
    thing, other = Thing(), Thing()
    with UndoStack() as undo:
        undo.wrap(thing, "double", lambda original, *args, **kwargs: original(*args, **kwargs) + 1)
        assert (thing.double(3), thing.double(number=4), other.double(3)) == (7, 9, 6)
        assert list(inspect.signature(thing.double).parameters) == ["number"]
        assert thing.double.__qualname__ == "Thing.double"
    assert thing.double(3) == 6 and "double" not in vars(thing)


def test_a_method_of_a_class_gets_its_instance():
    with UndoStack() as undo:
        undo.wrap(Thing, "double", lambda original, self, number: original(self, number) + 1)
        assert Thing().double(3) == 7
    assert Thing().double(3) == 6


def test_a_hook_that_holds_its_forward_runs_ours():
    """As accelerate's up to 0.21, which does not look up again what it has moved aside."""
    module, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    stock = module(x)
    old_forward = module._old_forward = module.forward

    def new_forward(*args, **kwargs):
        return old_forward(*args, **kwargs)

    module.forward = new_forward
    undo = UndoStack()
    undo.wrap(module, "forward", lambda original, *args: original(*args) + 1)
    assert torch.equal(module(x), stock + 1)
    undo.unwind()
    assert torch.equal(module(x), stock)
