"""Which class of ours takes the place of which class of transformers."""

from collections.abc import Callable, Iterator
from functools import cache
from types import new_class
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.hf.settings import Accelerated

_Class = TypeVar("_Class", bound=type[nn.Module])

# transformers' class -> ours, and back.
CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_BACK: dict[type[nn.Module], type[nn.Module]] = {}
_STOOD_HERE = "nemotron_v3_stood_here"  # on a class made by `_mixed`: the one it takes the place of


def takes_place_of(their: type[nn.Module]) -> Callable[[_Class], _Class]:
    """Enter a class into the table, as the one that takes the place of transformers' `their`."""

    def enter(ours: _Class) -> _Class:
        CLASSES[their], _BACK[ours] = ours, their
        return ours

    return enter


def is_theirs(module: nn.Module) -> bool:
    return isinstance(module, tuple(CLASSES))


def accelerated_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of `kind`, which is transformers' or a subclass of it.

    A subclass keeps its methods, its place in `isinstance` and its name; ours comes behind it and
    before transformers' class.

    Raises:
        TypeError: a subclass that computes something itself, which would be lost.
    """
    if kind in CLASSES:
        return CLASSES[kind]
    _refuse_fsdp(kind)
    if issubclass(kind, Accelerated):
        return kind
    message = (
        f"a {kind.__module__}.{kind.__qualname__} is a subclass of transformers' own class, and "
    )
    for base, name in _own_computation(kind):
        raise TypeError(
            f"{message}what the {name} of {base.__module__}.{base.__qualname__} computes would be "
            "lost: accelerate the model before it is patched"
        )
    return _mixed(kind)


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that `kind` took the place of.

    Raises:
        ValueError: a class that something else has put in the place of an accelerated one.
    """
    if kind in _BACK:
        return _BACK[kind]
    if _STOOD_HERE in vars(kind):
        return vars(kind)[_STOOD_HERE]
    raise ValueError(
        f"a {kind.__module__}.{kind.__qualname__} has been put in the place of an accelerated "
        "class (FSDP does that): undo before sharding or patching"
    )


def _theirs_in(kind: type[nn.Module]) -> type[nn.Module]:
    return next(base for base in kind.__mro__ if base in CLASSES)


def _refuse_fsdp(kind: type[nn.Module]) -> None:
    if issubclass(kind, FSDPModule):
        raise TypeError(
            f"a {kind.__module__}.{kind.__qualname__} has {FSDPModule.__module__}."
            "FSDPModule among its bases: accelerate the model before it is sharded"
        )


def _own_computation(kind: type[nn.Module]) -> Iterator[tuple[type, str]]:
    """The methods that stand before transformers' and that ours would not call."""
    their = _theirs_in(kind)
    replaced = {"forward", "__call__"}
    if not issubclass(their, PreTrainedModel):  # a layer's other methods are steps of its forward
        replaced |= {name for name, value in vars(their).items() if callable(value)} - {"__init__"}
    for base in kind.__mro__[: kind.__mro__.index(their)]:
        for name in sorted(replaced & vars(base).keys()):
            if _core(vars(base)[name]) is not _core(getattr(their, name, None)):
                yield base, name


def _core(function: Any) -> Any:
    """A forward without the wrapper that transformers puts on that of every class of blocks, those
    that inherit it included."""
    wrapper = vars(theirs.NemotronHBlock)["forward"].__code__
    while getattr(function, "__code__", None) is wrapper and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@cache
def _mixed(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with our class between it and transformers'."""
    ours = CLASSES[_theirs_in(kind)]
    own = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce__": lambda self: (_unpickled, (kind,), vars(self)),
        "forward": ours.forward,  # a block inherits a wrapper of transformers' otherwise
        _STOOD_HERE: kind,
    }
    return new_class(kind.__name__, (kind, ours), {}, lambda namespace: namespace.update(own))


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    mixed = accelerated_class(kind)
    return mixed.__new__(mixed)
