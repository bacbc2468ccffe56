"""Which class of ours takes the place of which class of NeMo AutoModel.

Classes of NeMo AutoModel are known by their names, so that nothing of it is imported here. One that
takes a place is made when it is first asked for: a subclass of theirs, with our `forward`.
"""

from collections.abc import Callable, Iterator
from functools import cache
from types import new_class
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule

SETTINGS = "nemotron_v3_settings"  # where a module keeps them
_STOOD_HERE = "nemotron_v3_stood_here"  # on a class made by `accelerated_class`: the one it is for

_LAYERS = "nemo_automodel.components.models.nemotron_v3"
_MOE = "nemo_automodel.components.moe"

_Class = TypeVar("_Class", bound=type)


class Accelerated(nn.Module):
    """A module of theirs that `accelerate` has given another `forward`, and its settings."""

    if TYPE_CHECKING:  # of the module that it is a mixin of

        def __getattr__(self, name: str) -> Any: ...

    @property
    def impl(self) -> str:
        """Which form of each op runs."""
        return vars(self)[SETTINGS]


# Their class, by its full name -> the forward that takes the place of theirs.
FORWARDS: dict[str, type[Accelerated]] = {}
# Layers that models of other kinds are built of too: they change inside a Nemotron-H block alone.
SHARED: set[str] = set()
CACHE = f"{_LAYERS}.cache.NemotronHybridCache"
# Such a layer that is not changed itself, and holds some that are.
MIXTURE = f"{_MOE}.layers.MoE"
# Subclasses of theirs that call the forward they inherit, and so call ours.
_CALLS_INHERITED = frozenset({f"{_LAYERS}.mtp.NemotronV3MTPSublayer"})


def takes_place_of(their: str, *, shared: bool = False) -> Callable[[_Class], _Class]:
    """Enter a class into the table, for `their`: a name such as "layers.NemotronV3Block".

    Args:
        their: the name below the package of Nemotron's layers, or of those of mixtures of experts.
        shared: models of other kinds have such layers too.
    """

    def enter(ours: _Class) -> _Class:
        name = f"{_MOE if shared else _LAYERS}.{their}"
        FORWARDS[name] = ours
        if shared:
            SHARED.add(name)
        return ours

    return enter


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def their_name(kind: type) -> str | None:
    """The name in the table of `kind`, or of the class among its bases that is in it."""
    return next((full_name(base) for base in kind.__mro__ if full_name(base) in FORWARDS), None)


def is_theirs(module: nn.Module) -> bool:
    return their_name(type(module)) is not None


def is_cache(value: Any) -> bool:
    """Whether a value is their cache, or of a subclass of it."""
    return any(full_name(base) == CACHE for base in type(value).__mro__)


@cache
def accelerated_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of `kind`, which is theirs or a subclass of it.

    A subclass keeps its methods, its place in `isinstance` and its name; ours comes behind it and
    before the class of theirs.

    Raises:
        TypeError: a subclass that computes something itself, which would be lost; or one that a
            sharder has made.
    """
    if issubclass(kind, Accelerated):
        return kind
    if issubclass(kind, FSDPModule):
        raise TypeError(
            f"a {full_name(kind)} has been sharded (FSDPModule is among its bases): accelerate the "
            "model before, or call nemotron_v3.nemo.enable() before it is built"
        )
    name = their_name(kind)
    if name is None:
        raise TypeError(f"a {full_name(kind)} is no layer of NeMo AutoModel's Nemotron-H")
    if full_name(kind) == name:
        return _made(kind, (FORWARDS[name], kind))
    if full_name(kind) not in _CALLS_INHERITED:
        for base in _computing(kind, name):
            raise TypeError(
                f"a {full_name(kind)} computes something of its own (the forward of "
                f"{full_name(base)}), which would be lost: accelerate the model before it is "
                "patched"
            )
    return _made(kind, (kind, accelerated_class(_base(kind, name))))


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that `kind` took the place of.

    Raises:
        ValueError: a class that something else has put in the place of an accelerated one.
    """
    if _STOOD_HERE in vars(kind):
        return vars(kind)[_STOOD_HERE]
    raise ValueError(
        f"a {full_name(kind)} has been put in the place of an accelerated class (FSDP does that): "
        "undo before sharding or patching"
    )


def is_made(kind: type) -> bool:
    """Whether a class is one that `accelerated_class` made, and nothing was put in its place."""
    return _STOOD_HERE in vars(kind)


def computes_itself(kind: type[nn.Module]) -> bool:
    """Whether a subclass of theirs has a forward of its own (LoRA's experts)."""
    name = their_name(kind)
    own = full_name(kind) in _CALLS_INHERITED or issubclass(kind, Accelerated)
    return name is not None and not own and any(_computing(kind, name))


def _base(kind: type, name: str) -> type[nn.Module]:
    return next(base for base in kind.__mro__ if full_name(base) == name)


def _computing(kind: type, name: str) -> Iterator[type]:
    """The classes before theirs that say what a call computes."""
    for base in kind.__mro__[: kind.__mro__.index(_base(kind, name))]:
        if {"forward", "__call__"} & vars(base).keys():
            yield base


def _made(kind: type[nn.Module], bases: tuple[type, ...]) -> type[nn.Module]:
    own: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce__": lambda self: (_unpickled, (kind,), vars(self)),
        _STOOD_HERE: kind,
    }
    return new_class(kind.__name__, bases, {}, lambda namespace: namespace.update(own))


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    made = accelerated_class(kind)
    return made.__new__(made)
