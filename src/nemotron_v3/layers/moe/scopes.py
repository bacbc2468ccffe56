"""What one caller does with a router's calls, while other callers use the same model.

A scope belongs to the context (PEP 567) that it was entered in: a thread has its own, and so has an
async task, which begins with what its maker had. A call sees the scopes of its own context alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(eq=False)
class Scope:
    """From its entry until it is left, wherever that happens."""

    open: bool = True


@dataclass(eq=False, frozen=True)
class Scoped:
    """What is done with the calls of one router in a scope.

    Attributes:
        scope: where it holds.
        watcher: called with a `Routing` at every call, or None.
        forced: a function of the number of tokens that returns the experts `[T, K]`, or None.
    """

    scope: Scope
    watcher: Callable[[Any], None] | None = None
    forced: Callable[[int], Tensor] | None = None


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("nemotron_v3 routing", default=())


class HasScopes(Protocol):
    """A router, which keeps what is done with its calls."""

    scoped: list[Scoped]


def of_caller(scoped: list[Scoped]) -> tuple[Scoped, ...]:
    """Those that hold for who calls now."""
    here = _scopes.get()
    return tuple(each for each in tuple(scoped) if each.scope.open and each.scope in here)


@contextmanager
def scoped(make: Callable[[Scope], list[tuple[HasScopes, Scoped]]]) -> Iterator[None]:
    """Within it, in the caller's context, what `make` gives each router holds.

    It may be left in another context or thread, as where a generator is closed by the collector,
    and in another order than others were entered: it is over everywhere then.
    """
    scope = Scope()
    added = make(scope)
    try:
        for router, each in added:
            router.scoped.append(each)
        _scopes.set((*_open(), scope))
        yield
    finally:
        scope.open = False
        for router, each in added:
            if each in router.scoped:
                router.scoped.remove(each)
        _scopes.set(_open())


def _open() -> tuple[Scope, ...]:
    return tuple(scope for scope in _scopes.get() if scope.open)
