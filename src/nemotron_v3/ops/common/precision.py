"""Dtypes and guards that the implementations of all ops share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# fp32, or fp64 where the input already is: the dtype of statistics, decays and states.
WIDE = {
    dtype: torch.promote_types(dtype, torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def without_autocast(function: Callable) -> Callable:
    """Run an op's own arithmetic in the dtypes it states, whatever `torch.autocast` says.

    Under autocast a matmul inside a scan or a router would be rounded to 16 bits; the op decides
    its precision itself. What `Op.pick` gives runs so; a public function is decorated where it
    multiplies something beside that.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        kind = first.device.type
        # Entering the context costs as much as a small op, which a decode step is made of.
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run


def as_promised(results: tuple[Tensor | None, ...], *dtypes: torch.dtype) -> tuple[Any, ...]:
    """Results in the dtypes that an op states: the reference computes in fp64 and returns that."""
    promised = []
    for result, dtype in zip(results, dtypes, strict=True):
        promised.append(result if result is None or result.dtype == dtype else result.to(dtype))
    return tuple(promised)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see what is computed from these."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def autocast_matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul over `x` runs in: autocast's where it is on, else `x`'s own."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype
