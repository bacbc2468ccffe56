"""Which form of an op runs: the choice by value, and the guards all forms share."""

import functools
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.ops import _triton
from nemotron_v3.ops._selfcheck import CASES, SelfChecked

IMPLS = ("auto", "reference", "portable", "triton")

_log = logging.getLogger("nemotron_v3")


@dataclass(frozen=True)
class Kernels:
    """The Triton form of an op, for one call.

    Attributes:
        load: imports it.
        device: where the call's tensors are.
        refusal: why it cannot take them, or None.
        check: the case (of the op's `cases.py`) to check it with at its first use, of the call's
            own widths so that nothing is compiled for the check alone; None for no check.
    """

    load: Callable[[], Callable]
    device: torch.device
    refusal: str | None
    check: Hashable = None


def pick(
    op: str,
    impl: str,
    *,
    reference: Callable,
    portable: Callable,
    triton: Kernels | None = None,
    **special: Callable,
) -> Callable:
    """The function that computes `op` for this `impl`.

    Args:
        triton: the Triton form, which "auto" takes on a GPU; where it refuses, "auto" says so once.
        special: forms that only some ops have, by the `impl` that asks for them.

    Raises:
        ValueError: an unknown `impl`.
        RuntimeError: `impl="triton"` for an op that has no Triton form, or where it cannot run; a
            form that is asked for by name inside a transform of torch.func that cannot reach it.
    """
    if not torch.compiler.is_compiling() and _transformed():
        impl = _under_transforms(op, impl)
    if triton is not None and _takes_kernels(op, impl, triton):
        if torch.compiler.is_compiling():
            return triton.load()
        if impl == "auto":
            _say_once(op, "triton")
        function = triton.load()
        if triton.check is None:
            return function
        return checked(op, "triton", function, reference, triton.check)
    form, _ = choose(op, impl, tuple(special))
    function = {"reference": reference, "portable": portable, **special}[form]
    if torch.compiler.is_compiling():
        return function
    if impl == "auto":
        _say_once(op, form)
    return function if form == "reference" else checked(op, form, function, reference)


def _transformed() -> bool:
    """Whether torch.func asks for derivatives or batches.

    The forms with a backward pass of their own give it to autograd alone.
    """
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is None:
        return False
    kinds = functorch.TransformType
    transforms = (kinds.Grad, kinds.Jvp, kinds.Vmap)
    return any(layer.key() in transforms for layer in functorch.get_interpreter_stack())


def _under_transforms(op: str, impl: str) -> str:
    """The form inside a transform of torch.func: the reference, or an error if another is named."""
    if impl == "auto":
        _say_reference_once(op)
    elif impl != "reference":
        raise RuntimeError(
            f"{op}: torch.func (grad, vjp, jvp, vmap) cannot transform impl={impl!r}: use "
            "torch.autograd.grad instead, or impl='reference'"
        )
    return "reference"


@functools.cache
def _say_reference_once(op: str) -> None:
    _log.warning(
        "%s: the step-by-step reference runs, which is slow: torch.func can transform no other "
        "form; torch.autograd.grad takes the fast ones",
        op,
    )


# The ops that have a Triton form.
TRITON_FORMS = (
    *("attention", "cached_attention"),
    *("rms_norm", "gated_rms_norm", "relu2", "causal_conv1d", "router", "experts"),
    *("grouped_low_rank", "linear_cross_entropy", "ssd", "mamba2"),
    *("decode_attention", "decode_experts", "decode_mamba2", "sampling", "skinny_linear"),
)


def choose(
    op: str, impl: str, special: tuple[str, ...] = (), like: Tensor | None = None
) -> tuple[str, str]:
    """The form of `op` that `impl` means, and why; for tensors such as `like` where it is given.

    Raises:
        ValueError, RuntimeError: see `pick`.
    """
    if impl in ("reference", "portable", *special):
        return impl, f"impl={impl!r}"
    if like is not None and op in TRITON_FORMS and impl in ("auto", "triton"):
        if impl == "triton" or (like.is_cuda and _triton.can_launch(like.device)):
            return "triton", f"impl={impl!r}, on a GPU"
        why = "triton is not installed" if like.is_cuda else "not on a GPU"
        return "portable", f"impl='auto': {why}"
    if impl == "auto":
        return "portable", "impl='auto', and there is no other form"
    if impl == "triton":
        raise RuntimeError(f"{op} has no Triton form: use impl='auto' or impl='portable'")
    raise ValueError(f"impl must be one of {', '.join((*IMPLS, *special))}, got {impl!r}")


def _takes_kernels(op: str, impl: str, triton: Kernels) -> bool:
    if impl not in ("auto", "triton") or (impl == "auto" and triton.device.type != "cuda"):
        return False
    refusal = triton.refusal
    if not _triton.can_launch(triton.device):
        refusal = f"it needs a GPU and the package triton, the tensors are on {triton.device}"
    if refusal is None:
        return True
    if impl == "triton":
        raise RuntimeError(
            f"{op}: the Triton form cannot run here: {refusal}; use impl='auto' or impl='portable'"
        )
    if not torch.compiler.is_compiling():
        _warn_once(op, refusal)
    return False


@functools.cache
def _warn_once(op: str, refusal: str) -> None:
    _log.warning("%s: the slower portable form runs, not the Triton form: %s", op, refusal)


@functools.cache
def _say_once(op: str, form: str) -> None:
    _log.info("%s: impl='auto' takes the %s form", op, form)


@functools.cache
def checked(
    op: str, form: str, function: Callable, reference: Callable, case: Hashable = None
) -> Callable:
    """`function`, checked at its first use on a device where there is a case to check it with."""
    if case is None and op not in CASES:
        return function
    return SelfChecked(op, form, function, reference, case)


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
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run


def as_promised(results: tuple[Tensor | None, ...], *dtypes: torch.dtype) -> tuple[Any, ...]:
    """Results in the dtypes that an op states: the reference computes in fp64 and returns that."""
    pairs = zip(results, dtypes, strict=True)
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t, dtype in pairs)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul over `x` runs in: autocast's where it is on, else `x`'s own."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where the input already is: the dtype of statistics, decays and states."""
    return torch.promote_types(dtype, torch.float32)
