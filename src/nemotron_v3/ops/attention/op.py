"""The public causal attention."""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._dispatch import pick, without_autocast
from nemotron_v3.ops._empty import of_no_tokens
from nemotron_v3.ops.attention import flex, portable, reference


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
            dropout, and on a CPU without gradients.

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
    run = pick(
        "attention",
        impl,
        reference=reference.attention,
        portable=portable.attention,
        flex=flex.attention,
    )
    y = run(q, k, v, layout=layout, mask=mask, scale=scale, dropout_p=dropout_p)
    return y.to(q.dtype)


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
