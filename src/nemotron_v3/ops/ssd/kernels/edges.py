"""What the gradient of the log-decay takes from the states at a document's edges, exact.

Letters: D documents, H heads, P head width, N state. The other kernels round states to 16
bits. Over many chunks that averages out, but not where a document is short or where a given state
outweighs the others: the gradient of A would be up to twice as far off as the accuracy rule allows.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.ssd.kernels.loads import decay, load_sum, load_tile


@kernel
def edges_kernel(
    x,
    B,
    C,
    dy,
    steps,
    first,
    before,
    last,
    after,
    through,
    from_state,
    to_state,
    chunk_start,
    chunk_end,
    document_chunks,
    T,
    H,
    stride_x: tl.constexpr,
    stride_B: tl.constexpr,
    stride_C: tl.constexpr,
    stride_dy: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Corrects `through`, `from_state` and `to_state` of scan_backward.py in a document's first and
    last chunk, for the state `first` before it and the gradient `last` of the state behind it.
    """
    i_d = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_g = i_h // HEADS_OF_GROUP
    dtype = x.dtype.element_ty  # that products round a state to
    c_first = tl.load(document_chunks + i_d)
    c_last = tl.load(document_chunks + i_d + 1) - 1
    o_p = tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    o = o_p[:, None] * N + o_n[None, :]
    m = (o_p < P)[:, None] & (o_n < N)[None, :]
    edge = (i_d * H + i_h) * (P * N) + o
    row = i_h.to(tl.int64) * T
    for i in tl.static_range(2):
        c = c_first if i == 0 else c_last
        if c_first <= c_last:
            start = tl.load(chunk_start + c)
            length = (tl.load(chunk_end + c) - start).to(tl.int32)
            a_last = load_sum(steps, row + start, length - 1)
            # [BLOCK_P, BLOCK_N]: S before the chunk and dS behind it, as they are stored
            chunk = (c * H + i_h) * (P * N) + o
            b_S = tl.load(before + chunk, mask=m, other=0.0).to(tl.float32)
            b_dS = tl.load(after + chunk, mask=m, other=0.0).to(tl.float32)
            t = row + start
            if first is not None and c == c_first:
                b_exact = tl.load(first + edge, mask=m, other=0.0).to(tl.float32)
                b_left = b_exact - b_S.to(dtype).to(tl.float32)
                b_S = b_exact
                if i == 0:
                    u = dy + start * stride_dy + i_h * P
                    v = C + start * stride_C + i_g * N
                    _add(
                        *(from_state + t, u, v, b_left, steps + t * 2, 0.0, 1.0, length),
                        *(stride_dy, stride_C, P, N, TILE, BLOCK_P, BLOCK_N),
                    )
            if last is not None and c == c_last:
                b_exact = tl.load(last + edge, mask=m, other=0.0).to(tl.float32)
                b_left = b_exact - b_dS.to(dtype).to(tl.float32)
                b_dS = b_exact
                if i == 1:
                    u = x + start * stride_x + i_h * P
                    v = B + start * stride_B + i_g * N
                    _add(
                        *(to_state + t, u, v, b_left, steps + t * 2, a_last, -1.0, length),
                        *(stride_x, stride_B, P, N, TILE, BLOCK_P, BLOCK_N),
                    )
            b_through = tl.sum(b_S * b_dS, 1) * decay(a_last)
            tl.store(through + (c * H + i_h) * BLOCK_P + o_p, b_through)


@triton.jit
def _add(
    weights,
    u,
    v,
    b_S,
    steps,
    offset,
    sign,
    length,
    stride_u: tl.constexpr,
    stride_v: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add `e^(offset + sign a_t) u_t . (S v_t)` to the weight of each token t of a chunk."""
    for i_m in tl.static_range(2):
        o_t = i_m * TILE + tl.arange(0, TILE)
        m = o_t < length
        b_u = load_tile(u, stride_u, o_t, m, P, BLOCK_P)
        b_v = load_tile(v, stride_v, o_t, m, N, BLOCK_N)
        b = tl.dot(b_v, tl.trans(b_S.to(b_v.dtype)))
        b_a = tl.load(steps + tl.minimum(o_t, length - 1) * 2)
        b = tl.sum(b * b_u.to(tl.float32), 1) * decay(offset + sign * b_a)
        tl.store(weights + o_t, tl.load(weights + o_t, mask=m, other=0.0) + b, mask=m)
