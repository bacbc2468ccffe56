"""The public linear layer with a low-rank update."""

from torch import Tensor

from nemotron_v3.ops.common.precision import autocast_matmul_dtype
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.low_rank_linear import portable, reference
from nemotron_v3.ops.registry import Op

_OP = Op(
    "low_rank_linear",
    reference=reference.low_rank_linear,
    portable=portable.low_rank_linear,
    check=Check("bias"),
)


@_OP.public
def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """`x` through a linear layer of the weight `weight + scale b a`, which is never made.

    The update (LoRA, Hu et al. 2021, arXiv 2106.09685) acts beside the weight, which stays as it is
    and needs no gradient.

    Letters: I inputs, O outputs, r rank.

    Args:
        x: `[..., I]`; under autocast it and all matrices take part in the autocast dtype.
        weight: `[O, I]`.
        a: `[r, I]`.
        b: `[O, r]`.
        bias: `[O]`, or None.
        scale: of the update (alpha / r, in LoRA's words).
        impl: see `nemotron_v3.ops`.

    Returns:
        `[..., O]` in the matmuls' dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    outputs, inputs = weight.shape
    fits = x.dim() and x.shape[-1] == inputs and a.shape == (a.shape[0], inputs)
    fits = fits and b.shape == (outputs, a.shape[0])
    if not fits or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, a {tuple(a.shape)}, b "
            f"{tuple(b.shape)} and bias {None if bias is None else tuple(bias.shape)} do not fit: "
            "(..., I), (O, I), (rank, I), (O, rank), (O,) or None"
        )
    dtype = autocast_matmul_dtype(x)
    x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
    bias = None if bias is None else bias.to(dtype)
    run = _OP.pick(impl, (x, weight))
    return run(x, weight, a, b, bias, scale=scale).to(dtype)
