"""The public causal depthwise convolution."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d import portable, reference
from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.common.precision import as_promised
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.registry import Op


def _kernels() -> Callable[..., tuple[Tensor, Tensor | None]]:
    from nemotron_v3.ops.causal_conv1d.kernels import causal_conv1d

    return causal_conv1d


def _refusal(dtypes: Sequence[torch.dtype | None], taps: int) -> str | None:
    if not 2 <= taps <= 8:
        return f"it is made for 2 to 8 taps, and {taps} are given"
    return refuse_dtypes(dtypes)


_OP = Op(
    "causal_conv1d",
    reference=reference.causal_conv1d,
    portable=portable.causal_conv1d,
    kernels=_kernels,
    refuse=_refusal,
    check=Check("pack"),
)


@_OP.public
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: SequenceLayout,
    activation: str | None = "silu",
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`y_t = act(bias + sum_j weight[:, j] * x_{t-W+1+j})` inside each document (Mamba-2).

    Letters: T packed tokens, n_docs documents, C channels, W taps.

    Args:
        x: `[T, C]`.
        weight: `[C, W]`; the last tap is the current token's.
        bias: `[C]` or None.
        layout: where the documents start; inputs before a document are its initial state.
        activation: `"silu"` or None.
        initial_states: `[n_docs, C, W]`, the last W inputs before each document, before activation,
            newest last; zeros by default.
        return_final_states: also return the states after each document.
        impl: see `nemotron_v3.ops`.

    Returns:
        `y` `[T, C]` in `x`'s dtype (sums in fp32 or wider), and the final states `[n_docs, C, W]`
        in `x`'s dtype, or None. Both are differentiable, also in the initial states.

    Raises:
        ValueError: shapes that do not fit, or an unknown activation.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    channels, width = weight.shape
    if x.dim() != 2 or x.shape[1] != channels or x.shape[0] != layout.num_tokens:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: {layout.num_tokens} tokens of {channels} channels are "
            "needed"
        )
    expected = (layout.num_documents, channels, width)
    if initial_states is not None and tuple(initial_states.shape) != expected:
        raise ValueError(
            f"initial_states has shape {tuple(initial_states.shape)}, needed is (documents, "
            f"channels, taps) = {expected}"
        )
    run = _OP.pick(impl, (x, weight, bias, initial_states), width)
    results = run(
        x,
        weight,
        bias,
        layout=layout,
        activation=activation,
        initial_states=initial_states,
        return_final_states=return_final_states,
    )
    return as_promised(results, x.dtype, x.dtype)
