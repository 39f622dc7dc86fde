"""How changes are taken back: one undo stack for everything that a patch changes, and values for one block."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

_MISSING = object()
_ASIDE = "_old_forward"
T = TypeVar("T")


def _place(owner: Any, name: str) -> str:
    """Where an attribute of an object is: accelerate's hooks (device_map) move a module's `forward` aside."""
    return _ASIDE if name == "forward" and not isinstance(owner, type) and _ASIDE in vars(owner) else name


def _look_up_forward(module: Any) -> None:
    """Have accelerate's hook run the `forward` that now lies aside; up to 0.2x it runs the one it was made with."""
    hooked = vars(module).get("forward")
    names = getattr(getattr(hooked, "__code__", None), "co_freevars", ())
    if _ASIDE in vars(module) and "old_forward" in names:
        cell = hooked.__closure__[names.index("old_forward")]  # type: ignore[union-attr]
        cell.cell_contents = lambda *args, **kwargs: getattr(module, _ASIDE)(*args, **kwargs)


def inner(owner: Any, name: str) -> Any:
    """An attribute, and of a module its own `forward`, inside accelerate's hook: where ours goes."""
    return getattr(owner, _place(owner, name))


@contextlib.contextmanager
def meanwhile(owner: Any, **values: Any) -> Iterator[None]:
    """Inside the block, an object or a module has these attributes."""
    before = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(before)


@contextlib.contextmanager
def holding(variable: ContextVar[Any], value: T) -> Iterator[T]:
    """Inside the block, a context variable holds this value, which is what `with` gives."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


class UndoStack:
    """Applies changes and remembers how to take each back; `unwind` runs in reverse order and can run twice."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def push(self, step: Callable[[], None]) -> None:
        """Remember a step that takes back what the caller has just done."""
        self._steps.append(step)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute; undo restores the owner's own dictionary, not what a class gives an instance.

        A module's `forward` is set inside accelerate's hook, which may come and go while it is there.
        """
        old = vars(owner).get(_place(owner, name), _MISSING)
        setattr(owner, _place(owner, name), value)
        _look_up_forward(owner)

        def restore() -> None:
            place = _place(owner, name)
            if old is _MISSING and place == name:
                vars(owner).pop(name, None)
            else:
                stock = getattr(type(owner), name).__get__(owner) if old is _MISSING else old
                vars(owner)[place] = stock
            _look_up_forward(owner)

        if isinstance(owner, type):  # its dictionary is read-only
            self.push(lambda: delattr(owner, name) if old is _MISSING else setattr(owner, name, old))
        else:
            self.push(restore)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Have calls of an object's or a class's method go to `around(original, *arguments)`."""
        original = inner(owner, name)
        called: Callable[..., Any] = functools.partial(around, original)
        # Without its own attributes: by those of a compiled method torch.compile would find the way past `around`.
        wraps = functools.wraps(original, updated=())
        if isinstance(owner, type):  # which binds functions only
            self.set_attribute(owner, name, wraps(lambda *args, **kwargs: called(*args, **kwargs)))
        else:
            self.set_attribute(owner, name, wraps(called))

    def replace_module(
        self, parent: "nn.Module", name: str, module: "nn.Module", original: "Callable[[], nn.Module] | None" = None
    ) -> None:
        """Put another module in a child's place; `original` builds what undo puts back, by default the replaced one."""
        old = getattr(parent, name)
        setattr(parent, name, module)
        self.push(lambda: setattr(parent, name, old if original is None else original()))

    def add_module(self, parent: "nn.Module", name: str, module: "nn.Module") -> None:
        """Add a child module that was not there."""
        if hasattr(parent, name):
            raise AttributeError(f"{type(parent).__name__} already has an attribute {name!r}")
        parent.add_module(name, module)
        self.push(lambda: delattr(parent, name))

    def __len__(self) -> int:
        return len(self._steps)

    def __enter__(self) -> "UndoStack":
        return self

    def __exit__(self, *error: object) -> None:
        self.unwind()

    def unwind(self, to: int = 0) -> None:
        """Take changes back, last one first; a step that fails does not keep the others from running."""
        errors: list[BaseException] = []
        while len(self._steps) > to:
            try:
                self._steps.pop()()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]
