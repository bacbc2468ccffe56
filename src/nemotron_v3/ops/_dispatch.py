"""Which form of an op runs: the choice by value, and the guards all forms share."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "portable", "triton")

_log = logging.getLogger("nemotron_v3")


def pick(op: str, impl: str, *, reference: Callable, portable: Callable) -> Callable:
    """The function that computes `op` for this `impl`.

    Raises:
        ValueError: an unknown `impl`.
        RuntimeError: `impl="triton"` for an op that has no Triton form.
    """
    if impl in ("auto", "portable"):
        if impl == "auto":
            _say_once(op, "portable")
        return portable
    if impl == "reference":
        return reference
    if impl == "triton":
        raise RuntimeError(f"{op} has no Triton form: use impl='auto' or impl='portable'")
    raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")


@functools.cache
def _say_once(op: str, form: str) -> None:
    _log.info("%s: impl='auto' takes the %s form", op, form)


def without_autocast(function: Callable) -> Callable:
    """Run an op's own arithmetic in the dtypes it states, whatever `torch.autocast` says.

    Under autocast a matmul inside a scan or a router would be rounded to 16 bits; the op decides
    its precision itself.
    """

    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run


def autocast_matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul over `x` runs in: autocast's where it is on, else `x`'s own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where the input already is: the dtype of statistics, decays and states."""
    return torch.promote_types(dtype, torch.float32)
