"""The public attention of new tokens to a cache."""

from collections.abc import Callable, Sequence
from operator import add
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention.op import as_called, refuse_widths
from nemotron_v3.ops.cached_attention import masked, portable, reference
from nemotron_v3.ops.common import long_attention as long
from nemotron_v3.ops.common.host import refuse_mixed
from nemotron_v3.ops.common.precision import without_autocast
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.registry import Op


def _kernels() -> Callable[..., Tensor]:
    from nemotron_v3.ops.attention.kernels import cached_attention

    return cached_attention


def _refusal(
    dtypes: Sequence[torch.dtype], heads: int, kv_heads: int, head_dim: int, scale: float | None
) -> str | None:
    return refuse_widths(head_dim, scale) or refuse_mixed(dtypes)


def _kernels_case(heads: int, kv_heads: int, head_dim: int, scale: float | None) -> Any:
    return as_called((33,) * 3, heads, kv_heads, head_dim)


_OP = Op(
    "cached_attention",
    reference=reference.cached_attention,
    portable=portable.cached_attention,
    kernels=_kernels,
    refuse=_refusal,
    check=Check("batch", cases_of="attention", adapt="of_last_tokens"),
    kernels_case=_kernels_case,
)
_MASKED = Op("masked cached_attention", reference=masked.reference, portable=masked.portable)


@_OP.public
@without_autocast
def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    layout: SequenceLayout,
    starts: tuple[int, ...],
    positions: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Grouped-query attention where each row's new tokens follow what the row already holds.

    New token i of a row sees the row's places 0 to `start + i`. What keys and values hold beyond
    a row's own tokens gets weight 0; it must be finite.

    Letters: T packed new tokens, H query heads, J key/value heads, P head width, L places.

    Args:
        q: `[T, H, P]`; document r of the layout belongs to row r.
        keys, values: `[rows, J, L, P]`, the new tokens included.
        layout: of the new tokens.
        starts: tokens each row held before, on the host.
        positions: int64 `[rows]`, the same on the device.
        mask: `[rows or 1, 1 or H, S, start + S]` where all rows hold `start` tokens and get S, bool
            (True = attend) or additive floats: it alone decides; a query that may attend nothing
            gives 0.
        scale: of the scores, by default `P ** -0.5`.
        impl: see `nemotron_v3.ops`. "auto" takes PyTorch's kernels for one token a row, and in 16
            bits on a GPU for long prompts onto an empty cache, at a few fixed sizes.

    Returns:
        `[T, H, P]` in `q`'s dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    T, H, P = q.shape
    rows, J, L, _ = keys.shape
    n_docs = len(layout.lengths)
    if layout.num_tokens != T or not rows == n_docs == len(starts):
        raise ValueError(
            f"{T} tokens, {rows} rows and {len(starts)} starts do not fit a layout of "
            f"{layout.num_tokens} tokens in {n_docs} documents"
        )
    needed = max(map(add, starts, layout.lengths))
    if keys.shape != values.shape or keys.shape[3] != P or H % J or needed > L:
        raise ValueError(
            f"q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not "
            f"fit: (tokens, heads, width) and twice (rows, key heads, at least {needed}, width)"
        )
    if keys.dtype != q.dtype or values.dtype != q.dtype:
        keys, values = keys.to(q.dtype), values.to(q.dtype)
    if mask is not None:
        masked.check_mask(mask, q, layout, starts)
        run = _MASKED.pick(impl, (q,))
        return run(q, keys, values, mask=mask, layout=layout, scale=scale).to(q.dtype)
    one_token = layout.uniform_length == 1
    form = "portable" if impl == "auto" and one_token else impl
    run = _OP.pick(form, (q, keys, values), H, J, P, scale)
    runs = None
    if not one_token and impl in ("auto", "portable") and long.takes(q) and not any(starts):
        runs = long.runs(layout)
    if runs is None:
        given = {"layout": layout, "starts": starts, "positions": positions}
        return run(q, keys, values, **given, scale=scale).to(q.dtype)
    parts = []
    for r, of_q in zip(runs, q.split([r.layout.num_tokens for r in runs]), strict=True):
        rows = slice(r.first, r.end)
        k, v = keys[rows], values[rows]
        if r.is_long:  # one prompt, and nothing before it
            k, v = (t[0, :, : len(of_q)].transpose(0, 1) for t in (k, v))
            parts.append(long.attend(of_q, k, v, scale))
        else:
            given = {"starts": starts[rows], "positions": positions[rows]}
            parts.append(run(of_q, k, v, layout=r.layout, **given, scale=scale))
    return torch.cat(parts).to(q.dtype)
