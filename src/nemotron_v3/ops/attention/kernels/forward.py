"""Forward: a program keeps a tile of queries and walks over the keys that they see.

Letters: T packed tokens, H query heads, J key/value heads, P head width, M queries and N keys of a
tile. The softmax is by powers of two, and is rescaled as its maximum grows (arXiv 2205.14135).
"""

import triton
import triton.language as tl

from nemotron_v3.ops.attention.kernels.tiles import keys_of, load_rows, place, store_rows
from nemotron_v3.ops.common.jit import kernel


@triton.jit
def _attend(
    b_q, b_out, b_sum, b_max, k, v, o_position, keys, low, high, scale,
    STRIDE_k: tl.constexpr, STRIDE_v: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys `low` to `high`; only where MASKED do some queries not see some of them."""
    for n in tl.range(low, high, N, num_stages=STAGES):
        o_n = n + tl.arange(0, N)
        m_n = o_n < keys
        b_k = load_rows(k, o_n, m_n, STRIDE_k, P, BLOCK_P, MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        if MASKED:
            b_s = tl.where(o_n[None, :] <= o_position[:, None], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_w = tl.exp2(b_s * scale - b_new[:, None])
        b_less = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_less + tl.sum(b_w, 1)
        b_out = b_out * b_less[:, None]
        b_v = load_rows(v, o_n, m_n, STRIDE_v, P, BLOCK_P, MASKED)
        b_out = tl.dot(b_w.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        b_max = b_new
    return b_out, b_sum, b_max


@kernel
def forward_kernel(
    q, k, v, out, log_sums, held, cu_seqlens, tile_document, tile_first,
    T, places, scale,
    STRIDE_q: tl.constexpr, HEAD_q: tl.constexpr, STRIDE_k: tl.constexpr, HEAD_k: tl.constexpr,
    STRIDE_v: tl.constexpr, HEAD_v: tl.constexpr, H: tl.constexpr, J: tl.constexpr,
    P: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """`scale` is that of the scores, times log2(e). `log_sums` `[H, T]` is to base 2."""
    # Heads that read the same keys run side by side.
    i_tile, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_j = i_h // (H // J)
    document = tl.load(tile_document + i_tile)
    first = tl.load(tile_first + i_tile).to(tl.int32)
    start, length, before = place(document, cu_seqlens, held, CACHED)
    k = keys_of(k, document, start, i_j, places, J, STRIDE_k, HEAD_k, CACHED)
    v = keys_of(v, document, start, i_j, places, J, STRIDE_v, HEAD_v, CACHED)

    o_m = first + tl.arange(0, M)
    m_m = o_m < length
    b_q = load_rows(q + start * STRIDE_q + i_h * HEAD_q, o_m, m_m, STRIDE_q, P, BLOCK_P, True)
    b_out = tl.zeros([M, BLOCK_P], tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_max = tl.full([M], float("-inf"), tl.float32)
    o_position = before + o_m
    seen_by_all = (before + first + 1) // N * N
    end = before + tl.minimum(first + M, length)
    b_out, b_sum, b_max = _attend(
        b_q, b_out, b_sum, b_max, k, v, o_position, end, 0, seen_by_all, scale,
        STRIDE_k, STRIDE_v, P, BLOCK_P, N, STAGES, PRECISION, False,
    )  # fmt: skip
    b_out, b_sum, b_max = _attend(
        b_q, b_out, b_sum, b_max, k, v, o_position, end, seen_by_all, end, scale,
        STRIDE_k, STRIDE_v, P, BLOCK_P, N, STAGES, PRECISION, True,
    )  # fmt: skip
    b_out = b_out / b_sum[:, None]
    store_rows(out + (start * H + i_h) * P, o_m, m_m, b_out, H * P, P, BLOCK_P)
    tl.store(log_sums + i_h.to(tl.int64) * T + start + o_m, b_max + tl.log2(b_sum), mask=m_m)
