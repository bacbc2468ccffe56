"""The public attention of one token of each slot of a fixed batch to a cache of fixed size."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.attention.op import refuse_widths
from nemotron_v3.ops.common.host import refuse_mixed
from nemotron_v3.ops.common.slots import check_out, check_slots, check_workspace
from nemotron_v3.ops.decode_attention import portable, reference
from nemotron_v3.ops.decode_attention.split import workspace_size
from nemotron_v3.ops.registry import Op

MOST_QUERIES = 64  # of a key/value head, which are the rows of one product


def _kernels() -> Callable:
    from nemotron_v3.ops.decode_attention.kernels import decode_attention

    return decode_attention


def _refusal(
    dtypes: Sequence[torch.dtype], share: int, head_dim: int, scale: float | None
) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if share > MOST_QUERIES:
        return f"{share} query heads of a key/value head do not fit into one program"
    return refuse_widths(head_dim, scale) or refuse_mixed(dtypes)


_OP = Op(
    "decode_attention",
    reference=reference.decode_attention,
    portable=portable.decode_attention,
    kernels=_kernels,
    refuse=_refusal,
)


@_OP.public
@torch.no_grad()
def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    active: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Put one key and value a slot into its buffers, and attend to all that the slot then holds.

    `cached_attention` for one token a row in the form that a CUDA graph holds: every slot of the
    batch is there at every step, and which of them move on, and from where, is told by tensors.

    Letters: R slots, H query heads, J key/value heads, P head width, L places.

    Args:
        qkv: `[R, (H + 2 * J) * P]`: the query's heads, the key's, the value's.
        keys, values: `[R, J, L, P]`, contiguous, updated in place where a slot is active: token p
            of a slot stands at place p, and what stands behind its tokens is finite.
        positions: int64 `[R]`, the tokens that each slot held before this one.
        active: bool or integers `[R]`; a slot moves on where it is not 0.
        num_heads, num_kv_heads: H, J; query head h reads key/value head `h // (H / J)`.
        scale: of the scores, by default `P ** -0.5`.
        workspace: fp32, at least `workspace_size(R, H, P, L)` elements, contiguous, whose contents
            do not matter; a new tensor by default.
        out: where to write the result; a new tensor by default.
        impl: see `nemotron_v3.ops`.

    Returns:
        `[R, H * P]` in `qkv`'s dtype; 0 for a slot that is not active, and NaN for one that is and
        has no place left: nothing is written for it.

    Raises:
        ValueError: shapes or dtypes that do not fit, buffers that are not contiguous.
    """
    _check(qkv, keys, values, positions, active, num_heads, num_kv_heads)
    R, _, L, P = keys.shape
    check_workspace(workspace, workspace_size(R, num_heads, P, L), torch.float32)
    shape = (R, num_heads * P)
    out = qkv.new_empty(shape) if out is None else out
    check_out(out, shape, qkv.dtype)
    share = num_heads // num_kv_heads
    run = _OP.pick(impl, (qkv, keys, values), share, P, scale)
    return run(
        qkv,
        keys,
        values,
        positions,
        active,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        scale=scale,
        workspace=workspace,
        out=out,
    )


def _check(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    active: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[1] != num_kv_heads:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must both be (slots, "
            f"{num_kv_heads} heads, places, head width)"
        )
    R, J, L, P = keys.shape
    expected = (R, (num_heads + 2 * J) * P)
    if num_heads % J or tuple(qkv.shape) != expected or not L:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} of {num_heads} query heads does not fit keys "
            f"{tuple(keys.shape)}: {expected}, heads a multiple of {J}, and a place are needed"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values are updated in place and must be contiguous")
    check_slots(R, positions, active)
