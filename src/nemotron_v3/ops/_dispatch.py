"""Which form of an op runs: the choice by value, and the guards all forms share."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.ops._selfcheck import CASES, SelfChecked

IMPLS = ("auto", "reference", "portable", "triton")

_log = logging.getLogger("nemotron_v3")


def pick(
    op: str, impl: str, *, reference: Callable, portable: Callable, **special: Callable
) -> Callable:
    """The function that computes `op` for this `impl`.

    Args:
        special: forms that only some ops have, by the `impl` that asks for them.

    Raises:
        ValueError: an unknown `impl`.
        RuntimeError: `impl="triton"` for an op that has no Triton form.
    """
    form, _ = choose(op, impl, tuple(special))
    function = {"reference": reference, "portable": portable, **special}[form]
    if torch.compiler.is_compiling():
        return function
    if impl == "auto":
        _say_once(op, form)
    return function if form == "reference" else _checked(op, form, function, reference)


def choose(op: str, impl: str, special: tuple[str, ...] = ()) -> tuple[str, str]:
    """The form of `op` that `impl` means, and why.

    Raises:
        ValueError, RuntimeError: see `pick`.
    """
    if impl in ("reference", "portable", *special):
        return impl, f"impl={impl!r}"
    if impl == "auto":
        return "portable", "impl='auto', and there is no other form"
    if impl == "triton":
        raise RuntimeError(f"{op} has no Triton form: use impl='auto' or impl='portable'")
    raise ValueError(f"impl must be one of {', '.join((*IMPLS, *special))}, got {impl!r}")


@functools.cache
def _say_once(op: str, form: str) -> None:
    _log.info("%s: impl='auto' takes the %s form", op, form)


@functools.cache
def _checked(op: str, form: str, function: Callable, reference: Callable) -> Callable:
    """`function`, checked at its first use on a device where there is a case to check it with."""
    return SelfChecked(op, form, function, reference) if op in CASES else function


def without_autocast(function: Callable) -> Callable:
    """Run an op's own arithmetic in the dtypes it states, whatever `torch.autocast` says.

    Under autocast a matmul inside a scan or a router would be rounded to 16 bits; the op decides
    its precision itself.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        kind = first.device.type
        # Entering the context costs as much as a small op, which a decode step is made of.
        if not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul over `x` runs in: autocast's where it is on, else `x`'s own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where the input already is: the dtype of statistics, decays and states."""
    return torch.promote_types(dtype, torch.float32)
