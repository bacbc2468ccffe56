"""The public choice of one token of each slot of a fixed batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.common.slots import check_slots, check_workspace
from nemotron_v3.ops.registry import Op
from nemotron_v3.ops.sampling import portable, reference
from nemotron_v3.ops.sampling.reference import NO_TOKEN
from nemotron_v3.ops.sampling.sizes import workspace_size

__all__ = ["NO_TOKEN", "sample", "workspace_size"]


def _kernels() -> Callable:
    from nemotron_v3.ops.sampling.kernels import sample

    return sample


def _refusal(dtypes: Sequence[torch.dtype], V: int, contiguous: bool) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if V >= 1 << 24:
        return f"a vocabulary of {V} is not below 2^24"
    return refuse_dtypes(dtypes) if contiguous else "seen is not contiguous"


_OP = Op(
    "sample",
    reference=reference.sample,
    portable=portable.sample,
    kernels=_kernels,
    refuse=_refusal,
)


@_OP.public
@torch.no_grad()
def sample(
    logits: Tensor,
    uniform: Tensor,
    drawn: Tensor,
    active: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    penalty: Tensor | None = None,
    seen: Tensor | None = None,
    logprobs: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One token of each slot from its logits, in the form that a CUDA graph holds.

    Every number that differs from slot to slot or from step to step is in a tensor; None says that
    no slot asks for it. The likeliest token, or a draw that inverts the cumulated probabilities at
    one uniform number: of all tokens in their order, or, where `top_k` or `top_p` cut them, of the
    kept ones from the likeliest on (of equally likely ones the first token first).

    Letters: R slots, V vocabulary, n uniform numbers a slot.

    Args:
        logits: `[R, V]`, neighbouring columns.
        uniform: fp64 `[n, R]`, in [0, 1). Slot r's i-th draw takes `uniform[i % n, r]`.
        drawn: int64 `[R]`, the draws of each slot so far; goes up by one where a slot draws.
        active: bool or integers `[R]`; nothing of a slot changes where it is 0.
        temperature: `[R]`, what logits are divided by; 0 is the likeliest token, without a draw, as
            it is of all slots where this is None.
        top_k: int64 `[R]`, the so many likeliest; 0 for all.
        top_p: `[R]`, of these the fewest likeliest with at least this part of their sum; 1 for all.
        min_p: `[R]`, of these those at least so many times as likely as the likeliest; 0 for all.
        penalty, seen: `[R]` and bool `[R, V]`: a token that is seen has its logit divided by the
            penalty, or multiplied by it where it is below 0. The token chosen is then seen.
        logprobs: `[R]`, fp32 or wider, for the token's log-probability under the logits themselves.
        workspace: fp64, at least `workspace_size(R, V)` elements (fewer where it is told what is
            not given), contiguous, whose contents do not matter; a new tensor by default.
        out: int64 `[R]`, for the tokens; by default new, of zeros.
        impl: see `nemotron_v3.ops`.

    Returns:
        Tokens int64 `[R]`: `NO_TOKEN` where an active slot's logits have NaN or +inf among them or
        are all -inf; what stood in `out` where a slot is not active.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    R, V = logits.shape
    if out is None:
        out = drawn.new_zeros(R)
    numbers = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "penalty": penalty}
    _check(logits, uniform, numbers | {"logprobs": logprobs})
    for name, tensor in {"drawn": drawn, "top_k": top_k, "out": out}.items():
        if tensor is not None and (tensor.shape != (R,) or tensor.dtype != torch.int64):
            raise ValueError(f"{name} {tuple(tensor.shape)} in {tensor.dtype}: int64 ({R},) needed")
    check_slots(R, None, active)
    if seen is not None and (seen.shape != (R, V) or seen.dtype != torch.bool):
        raise ValueError(f"seen {tuple(seen.shape)} in {seen.dtype}: bool ({R}, {V}) is needed")
    if (seen is None) != (penalty is None):
        raise ValueError("penalty and seen belong together: give both or none")
    cuts = top_k is not None or top_p is not None
    needed = workspace_size(R, V, draws=temperature is not None, cuts=cuts)
    check_workspace(workspace, needed, torch.float64)
    run = _OP.pick(impl, (logits,), V, seen is None or seen.is_contiguous())
    return run(
        logits,
        uniform,
        drawn,
        active,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        penalty=penalty,
        seen=seen,
        logprobs=logprobs,
        workspace=workspace,
        out=out,
    )


def _check(logits: Tensor, uniform: Tensor, numbers: dict[str, Tensor | None]) -> None:
    R = len(logits)
    if uniform.dim() != 2 or uniform.shape[1] != R or uniform.dtype != torch.float64:
        raise ValueError(
            f"uniform {tuple(uniform.shape)} in {uniform.dtype}: torch.float64 (numbers, {R}) is "
            "needed"
        )
    for name, tensor in numbers.items():
        if tensor is not None and (tensor.shape != (R,) or tensor.dtype not in WIDE.values()):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} in {tensor.dtype}: fp32 or wider ({R},) is needed"
            )
