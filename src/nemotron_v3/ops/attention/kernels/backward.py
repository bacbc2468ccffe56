"""Backward, in two kernels that add up nothing across programs: gradients are the same in each run.

Letters: T packed tokens, H query heads, J key/value heads, P head width, M queries and N keys of a
tile. With W the weights and `dW = dout v^T`, `dS = W * (dW - delta)` and `delta = <dout, out>`:
then `dv = W^T dout`, `dk = scale dS^T q`, `dq = scale dS k`. W is made again from the scores and
the logarithms of their sums.

Where a query sees few keys, dW and delta nearly cancel. In fp32 delta is therefore the sum of
`W * dW`, which rounds as they do: a lone token's query then has no gradient, exactly.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.attention.kernels.tiles import keys_of, load_rows, place, store_rows
from nemotron_v3.ops.common.jit import kernel


@triton.jit
def _add_dq(
    b_q, b_dout, b_dq, b_log_sum, b_delta, k, v, o_position, keys, low, high, scale,
    STRIDE_k: tl.constexpr, STRIDE_v: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for n in tl.range(low, high, N, num_stages=STAGES):
        o_n = n + tl.arange(0, N)
        m_n = o_n < keys
        b_k = load_rows(k, o_n, m_n, STRIDE_k, P, BLOCK_P, MASKED)
        b_v = load_rows(v, o_n, m_n, STRIDE_v, P, BLOCK_P, MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        b_w = tl.exp2(b_s * scale - b_log_sum[:, None])
        if MASKED:
            b_w = tl.where(o_n[None, :] <= o_position[:, None], b_w, 0.0)
        b_dw = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_w * (b_dw - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit
def _add_delta(
    b_q, b_dout, b_delta, b_log_sum, k, v, o_position, keys, low, high, scale,
    STRIDE_k: tl.constexpr, STRIDE_v: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for n in tl.range(low, high, N, num_stages=1):
        o_n = n + tl.arange(0, N)
        m_n = o_n < keys
        b_k = load_rows(k, o_n, m_n, STRIDE_k, P, BLOCK_P, True)
        b_v = load_rows(v, o_n, m_n, STRIDE_v, P, BLOCK_P, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        b_w = tl.exp2(b_s * scale - b_log_sum[:, None])
        b_w = tl.where(o_n[None, :] <= o_position[:, None], b_w, 0.0)
        b_delta += tl.sum(b_w * tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION), 1)
    return b_delta


@kernel
def dq_kernel(
    q, k, v, out, dout, log_sums, deltas, dq, held, cu_seqlens, tile_document, tile_first,
    T, places, scale, scale_of_scores,
    STRIDE_q: tl.constexpr, HEAD_q: tl.constexpr, STRIDE_k: tl.constexpr, HEAD_k: tl.constexpr,
    STRIDE_v: tl.constexpr, HEAD_v: tl.constexpr, STRIDE_dout: tl.constexpr,
    HEAD_dout: tl.constexpr, H: tl.constexpr, J: tl.constexpr, P: tl.constexpr,
    BLOCK_P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, CACHED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Writes dq and, for the other kernel, `deltas` `[H, T]`."""
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
    p_dout = dout + start * STRIDE_dout + i_h * HEAD_dout
    b_dout = load_rows(p_dout, o_m, m_m, STRIDE_dout, P, BLOCK_P, True)
    o_sums = i_h.to(tl.int64) * T + start + o_m
    b_log_sum = tl.load(log_sums + o_sums, mask=m_m, other=float("inf"))
    o_position = before + o_m
    seen_by_all = (before + first + 1) // N * N
    end = before + tl.minimum(first + M, length)
    if EXACT:
        b_delta = _add_delta(
            b_q, b_dout, tl.zeros([M], tl.float32), b_log_sum, k, v, o_position, end, 0, end, scale,
            STRIDE_k, STRIDE_v, P, BLOCK_P, N, PRECISION,
        )  # fmt: skip
    else:
        b_out = load_rows(out + (start * H + i_h) * P, o_m, m_m, H * P, P, BLOCK_P, True)
        b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    tl.store(deltas + o_sums, b_delta, mask=m_m)

    b_dq = tl.zeros([M, BLOCK_P], tl.float32)
    b_dq = _add_dq(
        b_q, b_dout, b_dq, b_log_sum, b_delta, k, v, o_position, end, 0, seen_by_all, scale,
        STRIDE_k, STRIDE_v, P, BLOCK_P, N, STAGES, PRECISION, False,
    )  # fmt: skip
    b_dq = _add_dq(
        b_q, b_dout, b_dq, b_log_sum, b_delta, k, v, o_position, end, seen_by_all, end, scale,
        STRIDE_k, STRIDE_v, P, BLOCK_P, N, STAGES, PRECISION, True,
    )  # fmt: skip
    b_dq *= scale_of_scores
    store_rows(dq + (start * H + i_h) * P, o_m, m_m, b_dq, H * P, P, BLOCK_P)


@triton.jit
def _add_dkv(
    b_k, b_v, b_dk, b_dv, q, dout, log_sums, deltas, o_key, before, length, low, high, scale,
    STRIDE_q: tl.constexpr, STRIDE_dout: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    M: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries `low` to `high` of one head; rows are keys and columns queries: `[N, M]`."""
    for m in tl.range(low, high, M, num_stages=STAGES):
        o_m = m + tl.arange(0, M)
        m_m = o_m < length
        b_q = load_rows(q, o_m, m_m, STRIDE_q, P, BLOCK_P, True)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_log_sum = tl.load(log_sums + o_m, mask=m_m, other=float("inf"))
        b_w = tl.exp2(b_s * scale - b_log_sum[None, :])
        if MASKED:
            b_w = tl.where(o_key[:, None] <= (before + o_m)[None, :], b_w, 0.0)
        b_dout = load_rows(dout, o_m, m_m, STRIDE_dout, P, BLOCK_P, True)
        b_dv = tl.dot(b_w.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_dw = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_delta = tl.load(deltas + o_m, mask=m_m, other=0.0)
        b_ds = b_w * (b_dw - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@kernel
def dkv_kernel(
    q, k, v, dout, log_sums, deltas, dk, dv, held, cu_seqlens, tile_document, tile_first,
    T, places, places_out, size, scale, scale_of_scores,
    STRIDE_q: tl.constexpr, HEAD_q: tl.constexpr, STRIDE_k: tl.constexpr, HEAD_k: tl.constexpr,
    STRIDE_v: tl.constexpr, HEAD_v: tl.constexpr, STRIDE_dout: tl.constexpr,
    HEAD_dout: tl.constexpr, H: tl.constexpr, J: tl.constexpr, P: tl.constexpr,
    BLOCK_P: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of keys and HEADS of the query heads that read them.

    dk and dv are parts of sums: H / J / HEADS of them, one after the other, each in the shape of k
    with `size` elements and `places_out` places a row.
    """
    PARTS: tl.constexpr = H // J // HEADS
    i_tile, i_part = tl.program_id(0) // (J * PARTS), tl.program_id(0) % (J * PARTS)
    i_j, i_part = i_part // PARTS, i_part % PARTS
    document = tl.load(tile_document + i_tile)
    first = tl.load(tile_first + i_tile).to(tl.int32)
    start, length, before = place(document, cu_seqlens, held, CACHED)
    k = keys_of(k, document, start, i_j, places, J, STRIDE_k, HEAD_k, CACHED)
    v = keys_of(v, document, start, i_j, places, J, STRIDE_v, HEAD_v, CACHED)

    o_n = first + tl.arange(0, N)
    m_n = o_n < before + length
    b_k = load_rows(k, o_n, m_n, STRIDE_k, P, BLOCK_P, True)
    b_v = load_rows(v, o_n, m_n, STRIDE_v, P, BLOCK_P, True)
    b_dk = tl.zeros([N, BLOCK_P], tl.float32)
    b_dv = tl.zeros([N, BLOCK_P], tl.float32)
    # Queries before `low` see none of these keys, those from `high` on see all of them.
    low = tl.maximum(first - before, 0) // M * M
    high = (tl.maximum(first + N - 1 - before, 0) + M - 1) // M * M
    high = tl.minimum(high, length)
    for i in range(HEADS):
        i_h = (i_j * PARTS + i_part) * HEADS + i
        p_q = q + start * STRIDE_q + i_h * HEAD_q
        p_dout = dout + start * STRIDE_dout + i_h * HEAD_dout
        o_sums = i_h.to(tl.int64) * T + start
        b_dk, b_dv = _add_dkv(
            b_k, b_v, b_dk, b_dv, p_q, p_dout, log_sums + o_sums, deltas + o_sums, o_n, before,
            length, low, high, scale,
            STRIDE_q, STRIDE_dout, P, BLOCK_P, M, STAGES, PRECISION, True,
        )  # fmt: skip
        b_dk, b_dv = _add_dkv(
            b_k, b_v, b_dk, b_dv, p_q, p_dout, log_sums + o_sums, deltas + o_sums, o_n, before,
            length, high, length, scale,
            STRIDE_q, STRIDE_dout, P, BLOCK_P, M, STAGES, PRECISION, False,
        )  # fmt: skip
    b_dk *= scale_of_scores
    STEP: tl.constexpr = P if CACHED else J * P
    o_part = i_part.to(tl.int64) * size
    dk = keys_of(dk + o_part, document, start, i_j, places_out, J, STEP, P, CACHED)
    dv = keys_of(dv + o_part, document, start, i_j, places_out, J, STEP, P, CACHED)
    store_rows(dk, o_n, m_n, b_dk, STEP, P, BLOCK_P)
    store_rows(dv, o_n, m_n, b_dv, STEP, P, BLOCK_P)
