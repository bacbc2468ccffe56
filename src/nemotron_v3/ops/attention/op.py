"""The public causal attention."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention import flex, portable, reference
from nemotron_v3.ops.attention.cases import FIXED_SIZE, Case
from nemotron_v3.ops.common import long_attention as long
from nemotron_v3.ops.common.host import refuse_mixed
from nemotron_v3.ops.common.no_tokens import of_no_tokens
from nemotron_v3.ops.common.precision import without_autocast
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.registry import Op

WIDEST = 256  # columns of a head that the kernels take


def _kernels() -> Callable[..., Tensor]:
    from nemotron_v3.ops.attention.kernels import attention

    return attention


def _refusal(
    dtypes: Sequence[torch.dtype],
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float | None,
    dropout_p: float,
    masked: bool,
) -> str | None:
    if masked:
        return "a 4-D attention_mask decides what is seen"
    if dropout_p:
        return f"attention_dropout is {dropout_p}"
    return refuse_widths(head_dim, scale) or refuse_mixed(dtypes)


def refuse_widths(head_dim: int, scale: float | None) -> str | None:
    if head_dim > WIDEST:
        return f"a head of {head_dim} columns does not fit into one program (at most {WIDEST})"
    if scale is not None and not scale > 0:
        return f"the scale of the scores is {scale}, and not above 0"
    return None


def as_called(lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int) -> Case:
    """Small documents of a call's widths, to check kernels with."""
    return Case("as-called", lengths, heads, kv_heads, head_dim)


def _kernels_case(heads: int, kv_heads: int, head_dim: int, *_: object) -> Case:
    return as_called((1, 0, 5, 1, 40, 3), heads, kv_heads, head_dim)


_OP = Op(
    "attention",
    reference=reference.attention,
    portable=portable.attention,
    kernels=_kernels,
    refuse=_refusal,
    check=Check("pack"),
    kernels_case=_kernels_case,
    special={"flex": flex.attention},
)


@_OP.public
@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023), causal inside each document, no position term.

    Letters: T packed tokens, H query heads, J key/value heads, P head width; B, S the grid.

    Args:
        q: `[T, H, P]`. k, v: `[T, J, P]`; query head h reads key/value head `h // (H / J)`.
        layout: where the documents start.
        mask: `[B or 1, 1 or H, S, S]` on the layout's grid: bool (True = attend) or additive
            floats. It replaces the causal rule and the document borders; a query that may attend
            nothing gives 0.
        scale: of the scores, by default `P ** -0.5`.
        dropout_p: probability of dropping an attention weight.
        impl: see `nemotron_v3.ops`; also `"flex"`, PyTorch's flex attention: without a mask or
            dropout, and on a CPU without gradients. In 16 bits on a GPU, "auto" and "portable"
            take PyTorch's kernel for long documents, at a few fixed sizes, unless
            `torch.use_deterministic_algorithms` asks for the same gradients in each run.

    Returns:
        `[T, H, P]` in `q`'s dtype.

    Raises:
        ValueError: shapes that do not fit, a mask that does not cover the grid, or one that flex
            attention does not take.
        RuntimeError: flex attention with gradients on a CPU.
    """
    T, H, P = q.shape
    if layout.num_tokens != T or k.shape != v.shape or k.shape[::2] != (T, P) or H % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit "
            f"{layout.num_tokens} tokens: (tokens, heads, width), heads a multiple of k's and v's"
        )
    if mask is not None:
        _check_mask(mask, layout, H)
    if not T:
        return of_no_tokens(q, k, v)
    options = {"mask": mask, "scale": scale, "dropout_p": dropout_p}
    runs = None
    if impl in ("auto", "portable") and mask is None and long.takes(q):
        runs = long.runs(layout)
    if runs is not None and len(runs) == 1:
        return _at_fixed_size(q)(q, k, v, layout=layout, **options)
    sizes = (H, k.shape[1], P, scale, dropout_p, mask is not None)
    run = _OP.pick(impl, (q, k, v), *sizes)
    if runs is None:
        return run(q, k, v, layout=layout, **options).to(q.dtype)
    parts = zip(*(t.split([r.layout.num_tokens for r in runs]) for t in (q, k, v)), strict=True)
    ys = [
        (_at_fixed_size(q) if r.is_long else run)(*part, layout=r.layout, **options)
        for r, part in zip(runs, parts, strict=True)
    ]
    return torch.cat(ys)


def _at_fixed_size(q: Tensor) -> Callable[..., Tensor]:
    _OP.has_passed("fixed-size", long.attention, q, FIXED_SIZE)
    return long.attention


def _check_mask(mask: Tensor, layout: SequenceLayout, heads: int) -> None:
    B, S = layout.shape if len(layout.shape) == 2 else (1, *layout.shape)
    fits = (
        mask.dim() == 4
        and mask.shape[0] in (1, B)
        and mask.shape[1] in (1, heads)
        and tuple(mask.shape[2:]) == (S, S)
    )
    if not fits:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: a 4-D mask is ({B}, 1, {S}, {S}) here, "
            "a padding mask (batch, seq_len)"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"a 4-D attention_mask is bool (True = attend) or additive floats, got {mask.dtype}"
        )
