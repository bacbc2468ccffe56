"""The first use of a form of an op on a device computes something known, and raises if it is wrong.

A kernel can be miscompiled, a library built for another processor, a driver broken: the numbers are
then wrong without a word. So each (op, form, device, dtype) runs once a process on a small input,
forward and backward, and is compared with the op's step-by-step reference in fp64 on the CPU.
Triton forms are compiled for each width, so that a check on other widths would double the time of
the first call: those among them that are checked are so on the call's own.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nemotron_v3.ops import compat

SEED = 335  # with it no two experts' scores are closer than rounding to tf32 could swap

# A wrong term is an error of tens of percent, or NaN. In full precision a result has passed through
# some dozens of roundings; where products are rounded to a narrow format, the sums are fp32, and
# what is rounded are a few operands and the result.
FULL_ROUNDINGS, NARROW_ROUNDINGS = 64, 8


@dataclass(frozen=True)
class Check:
    """What an op is checked with.

    Attributes:
        case: the name of a case: ragged documents, states, more than one chunk.
        cases_of: the op whose `cases.py` has it; None for the op's own. Where it is another's, the
            op is one for decoding and has no gradient.
        adapt: the name of a function of that `cases.py` that turns an implementation into one of
            the case's arguments and of results that can be compared; None where it is one.
    """

    case: str
    cases_of: str | None = None
    adapt: str | None = None


class Checkable(Protocol):
    """What a check asks of an op: see `ops.registry.Op`."""

    @property
    def name(self) -> str: ...

    @property
    def reference(self) -> Callable[..., Any]: ...

    @property
    def check(self) -> Check | None: ...


def check(
    op: Checkable,
    form: str,
    function: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    case: Any = None,
) -> None:
    """Raises RuntimeError where `function` is further from the reference than rounding explains."""
    # A thread of its own starts from PyTorch's defaults: no autocast, inference mode, saved-tensor
    # hooks or default device of the caller takes part.
    with ThreadPoolExecutor(max_workers=1) as thread:
        errors = thread.submit(measure, op, form, function, device, dtype, case).result()
    allowed = explained_by_rounding(dtype, device)
    wrong = {name: error for name, error in errors.items() if not error <= allowed}  # NaN is wrong
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise RuntimeError(
            f"{op.name}: the {form} form computes wrong numbers on {device} in {dtype}: {listed} "
            f"(relative; rounding explains {allowed:.1e}). It is not used. The build of PyTorch or "
            f"Triton, or the device, is at fault: take another, or impl='portable' on the CPU"
        )


def measure(
    op: Checkable,
    form: str,
    function: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    case: Any = None,
) -> dict[str, float]:
    """Relative error of every output and every gradient, in the Frobenius norm.

    Args:
        case: of the op's `cases.py`; None is that of the op's `Check`.
    """
    with_what = op.check
    assert with_what is not None
    cases = import_module(f"nemotron_v3.ops.{with_what.cases_of or op.name}.cases")
    case = case or next(case for case in cases.CASES if case.name == with_what.case)
    # Decoding has no gradient, flex attention none on a CPU.
    backward = with_what.cases_of is None and not (form == "flex" and device.type == "cpu")

    def draw(where: torch.device) -> Any:
        return cases.make_inputs(case, dtype, where, torch.Generator().manual_seed(SEED))

    def adapted(implementation: Callable[..., Any]) -> Callable[..., Any]:
        adapt = with_what.adapt
        return implementation if adapt is None else getattr(cases, adapt)(implementation)

    with _current(device):
        measured = _run(adapted(function), draw(device), None, backward)
    true = _run(adapted(op.reference), draw(torch.device("cpu")), torch.float64, backward)
    return {name: _relative_error(measured[name].cpu(), value) for name, value in true.items()}


def explained_by_rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The relative error a right form may have in `dtype`."""
    roundoff = torch.finfo(dtype).eps / 2
    if dtype in (torch.float16, torch.bfloat16):
        return NARROW_ROUNDINGS * roundoff
    allowed = FULL_ROUNDINGS * roundoff
    if dtype == torch.float32:
        # "high" products have tf32 operands, "medium" ones bf16; kernels may use tf32 by choice.
        narrow = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}
        narrow = narrow[torch.get_float32_matmul_precision()]
        narrow = narrow if device.type == "cpu" else max(narrow, 2.0**-11)
        allowed = max(allowed, NARROW_ROUNDINGS * narrow)
    return allowed


def can_check(x: Tensor) -> bool:
    """Whether there is something to measure, and a place to do it.

    There is not on tensors without storage, inside a dispatch mode (which would see the check's own
    operations), or while a CUDA graph is captured.
    """
    return (
        type(x) in (Tensor, nn.Parameter)  # no fake, distributed or otherwise wrapped tensor
        and not x.is_meta
        and not compat.dispatch_modes()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _current(device: torch.device) -> Any:
    """Kernels are launched on the current device, which a new thread has not chosen yet."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.device("cpu")


def _run(
    function: Callable, inputs: Any, dtype: torch.dtype | None, backward: bool
) -> dict[str, Tensor]:
    """Outputs by number, gradients by name; cotangents are the same whatever runs."""
    tensors = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(backward)
        for name, t in inputs.tensors.items()
    }
    outputs = function(**tensors, **inputs.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output for i, output in enumerate(outputs) if output is not None}
    leaves = {name: t for name, t in tensors.items() if t is not None}
    if backward:
        generator = torch.Generator().manual_seed(SEED)
        cotangents = [
            torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            for output in results.values()
        ]
        gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), cotangents)
        results |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {name: result.detach() for name, result in results.items()}


def _relative_error(measured: Tensor, true: Tensor) -> float:
    difference, size = float((measured.double() - true.double()).norm()), float(true.norm())
    return difference / size if size else difference
