"""The public attention of new tokens to a cache."""

from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._dispatch import pick, without_autocast
from nemotron_v3.ops.cached_attention import masked, portable, reference


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
        impl: see `nemotron_v3.ops`.

    Returns:
        `[T, H, P]` in `q`'s dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    T, H, P = q.shape
    rows, J, L, _ = keys.shape
    needed = max(a + n for a, n in zip(starts, layout.lengths, strict=True))
    if keys.shape != values.shape or keys.shape[3] != P or H % J or needed > L:
        raise ValueError(
            f"q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not "
            f"fit: (tokens, heads, width) and twice (rows, key heads, at least {needed}, width)"
        )
    if layout.num_tokens != T or rows != layout.num_documents:
        raise ValueError(
            f"{T} tokens and {rows} rows do not fit a layout of {layout.num_tokens} tokens in "
            f"{layout.num_documents} documents"
        )
    if mask is not None:
        masked.check_mask(mask, q, layout, starts)
        run = pick(
            "masked cached_attention", impl, reference=masked.reference, portable=masked.portable
        )
        kind = {"mask": mask, "layout": layout, "scale": scale}
        return run(q, keys.to(q.dtype), values.to(q.dtype), **kind).to(q.dtype)
    run = pick(
        "cached_attention",
        impl,
        reference=reference.cached_attention,
        portable=portable.cached_attention,
    )
    y = run(
        q,
        keys.to(q.dtype),
        values.to(q.dtype),
        layout=layout,
        starts=starts,
        positions=positions,
        scale=scale,
    )
    return y.to(q.dtype)
