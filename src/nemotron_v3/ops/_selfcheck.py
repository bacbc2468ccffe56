"""The first use of a form of an op on a device computes something known, and raises if it is wrong.

A kernel can be miscompiled, a library built for another processor, a driver broken: the numbers are
then wrong without a word. So each (op, form, device, dtype) runs once a process on a small input,
forward and backward, and is compared with the op's step-by-step reference in fp64 on the CPU.
Triton forms are compiled for each width, so that a check on other widths would double the time of
the first call: those among them that are checked are so on the call's own.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from nemotron_v3.layout import SequenceLayout

CASES = {  # op -> whose cases.py, and the case: ragged documents, states, more than one chunk
    "attention": ("attention", "pack"),
    "cached_attention": ("attention", "batch"),
    "causal_conv1d": ("causal_conv1d", "pack"),
    "cross_entropy": ("cross_entropy", "some-ignored"),
    "experts": ("experts", "idle-experts"),
    "gated_rms_norm": ("gated_rms_norm", "odd-groups"),
    "grouped_low_rank": ("grouped_low_rank", "idle-experts"),
    "linear_cross_entropy": ("linear_cross_entropy", "some-ignored"),
    "mamba2": ("mamba2", "pack"),
    "mamba2_step": ("mamba2", "one-token"),
    "rms_norm": ("rms_norm", "odd-width"),
    "router": ("router", "grouped-negative"),
    "ssd": ("ssd", "small-chunks"),
}
SEED = 335  # with it no two experts' scores are closer than rounding to tf32 could swap

# A wrong term is an error of tens of percent, or NaN. In full precision a result has passed through
# some dozens of roundings; where products are rounded to a narrow format, the sums are fp32, and
# what is rounded are a few operands and the result.
FULL_ROUNDINGS, NARROW_ROUNDINGS = 64, 8


class SelfChecked:
    """A form of an op that is checked at its first call on a device and dtype.

    The check is left for a later call where there is nothing to measure or no place to do it: on
    tensors without storage, inside a dispatch mode (which would see the check's own operations),
    while a CUDA graph is captured. A form that fails raises at every call.
    """

    def __init__(
        self, op: str, form: str, function: Callable, reference: Callable, case: Any = None
    ):
        self.op, self.form, self.function, self.reference = op, form, function, reference
        self.case = case
        self.passed: set[tuple[torch.device, torch.dtype]] = set()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (x.device, x.dtype) not in self.passed and _can_check(x):
            forms = (self.op, self.form, self.function, self.reference)
            check(*forms, x.device, x.dtype, self.case)
            self.passed.add((x.device, x.dtype))
        return self.function(x, *args, **kwargs)


def check(
    op: str,
    form: str,
    function: Callable,
    reference: Callable,
    device: torch.device,
    dtype: torch.dtype,
    case: Any = None,
) -> None:
    """Raises RuntimeError where `function` is further from `reference` than rounding explains."""
    # A thread of its own starts from PyTorch's defaults: no autocast, inference mode, saved-tensor
    # hooks or default device of the caller takes part.
    with ThreadPoolExecutor(max_workers=1) as thread:
        forms = (op, form, function, reference)
        errors = thread.submit(measure, *forms, device, dtype, case).result()
    allowed = explained_by_rounding(dtype, device)
    wrong = {name: error for name, error in errors.items() if not error <= allowed}  # NaN is wrong
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise RuntimeError(
            f"{op}: the {form} form computes wrong numbers on {device} in {dtype}: {listed} "
            f"(relative; rounding explains {allowed:.1e}). It is not used. The build of PyTorch or "
            f"Triton, or the device, is at fault: take another, or impl='portable' on the CPU"
        )


def measure(
    op: str,
    form: str,
    function: Callable,
    reference: Callable,
    device: torch.device,
    dtype: torch.dtype,
    case: Any = None,
) -> dict[str, float]:
    """Relative error of every output and every gradient, in the Frobenius norm.

    Args:
        case: of the op's `cases.py`; None is that of `CASES`.
    """
    of, name = CASES[op]
    cases = import_module(f"nemotron_v3.ops.{of}.cases")
    case = case or next(case for case in cases.CASES if case.name == name)
    # Decoding has no gradient, flex attention none on a CPU.
    backward = op == of and not (form == "flex" and device.type == "cpu")

    def draw(where: torch.device) -> Any:
        return cases.make_inputs(case, dtype, where, torch.Generator().manual_seed(SEED))

    adapt = _ADAPTERS.get(op, lambda form: form)
    with _current(device):
        measured = _run(adapt(function), draw(device), None, backward)
    true = _run(adapt(reference), draw(torch.device("cpu")), torch.float64, backward)
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


def _can_check(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)  # no fake, distributed or otherwise wrapped tensor
        and not x.is_meta
        and not is_in_torch_dispatch_mode()
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


def _dense(router: Callable) -> Callable:
    """A router's weights as `[T, E]`: its choices come in no particular order."""

    def run(*, weight: Tensor, **arguments: Any) -> Tensor:
        weights, indices = router(weight=weight, **arguments)
        return weights.new_zeros(len(weights), len(weight)).scatter(1, indices, weights)

    return run


def _of_one_token(step: Callable) -> Callable:
    """`mamba2`'s arguments and results for `mamba2_step`, which updates its states in place."""

    def run(
        *, conv_states: Tensor, ssm_states: Tensor, layout: Any, chunk_size: int, **arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = {"conv_state": conv_states.clone(), "ssm_state": ssm_states.clone()}
        return step(**arguments, **states), *states.values()

    return run


def _of_last_tokens(cached_attention: Callable) -> Callable:
    """`attention`'s arguments for `cached_attention`: all but three tokens are in the cache."""

    def run(*, q: Tensor, k: Tensor, v: Tensor, layout: Any, mask: None, scale: None) -> Tensor:
        rows, held, new = layout.num_documents, layout.uniform_length - 3, 3
        return cached_attention(
            q.unflatten(0, (rows, -1))[:, held:].flatten(0, 1),
            *(t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (k, v)),
            layout=SequenceLayout.plain(rows, new, q.device),
            starts=(held,) * rows,
            positions=torch.full((rows,), held, device=q.device),
        )

    return run


_ADAPTERS = {
    "router": _dense,
    "mamba2_step": _of_one_token,
    "cached_attention": _of_last_tokens,
}


def _relative_error(measured: Tensor, true: Tensor) -> float:
    difference, size = float((measured.double() - true.double()).norm()), float(true.norm())
    return difference / size if size else difference
