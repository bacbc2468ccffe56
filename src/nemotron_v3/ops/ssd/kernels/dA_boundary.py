"""What the gradient of the log-decay takes from the states at a document's ends, exact.

Letters: n_docs documents, H heads, P head width, N state. The other kernels round states to 16
bits. Over many chunks that averages out, but not where a document is short or where a given state
outweighs the others: the gradient of A would be up to twice as far off as the accuracy rule allows.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.ssd.kernels.loads import decay, load_cumsum, load_group, load_head


@kernel
def dA_boundary_kernel(
    x,
    B,
    C,
    dy,
    dA_cumsum,
    initial_states,
    prev_states,
    dfinal_states,
    dstates,
    ddA_through,
    ddA_from_states,
    ddA_to_states,
    chunk_start,
    chunk_end,
    document_chunks,
    T,
    H,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Correct `ddA_through`, `ddA_from_states` and `ddA_to_states` of chunk_scan_bwd.py.

    That is in a document's first and last chunk, for the state `initial_states` before it and the
    gradient `dfinal_states` of the state behind it.
    """
    i_d = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_g = i_h // SIZES.HEADS_OF_GROUP
    dtype = x.dtype.element_ty  # that products round a state to
    c_first = tl.load(document_chunks + i_d)
    c_last = tl.load(document_chunks + i_d + 1) - 1
    o_p = tl.arange(0, SIZES.BLOCK_P)
    o_n = tl.arange(0, SIZES.BLOCK_N)
    o = o_p[:, None] * SIZES.N + o_n[None, :]
    m = (o_p < SIZES.P)[:, None] & (o_n < SIZES.N)[None, :]
    edge = (i_d * H + i_h) * (SIZES.P * SIZES.N) + o
    row = i_h.to(tl.int64) * T
    for i in tl.static_range(2):
        c = c_first if i == 0 else c_last
        if c_first <= c_last:
            start = tl.load(chunk_start + c)
            length = (tl.load(chunk_end + c) - start).to(tl.int32)
            a_last = load_cumsum(dA_cumsum, row + start, length - 1)
            # [BLOCK_P, BLOCK_N]: S before the chunk and dS behind it, as they are stored
            chunk = (c * H + i_h) * (SIZES.P * SIZES.N) + o
            b_S = tl.load(prev_states + chunk, mask=m, other=0.0).to(tl.float32)
            b_dS = tl.load(dstates + chunk, mask=m, other=0.0).to(tl.float32)
            t = row + start
            if initial_states is not None and c == c_first:
                b_exact = tl.load(initial_states + edge, mask=m, other=0.0).to(tl.float32)
                b_left = b_exact - b_S.to(dtype).to(tl.float32)
                b_S = b_exact
                if i == 0:
                    u = dy + start * STRIDES.dy + i_h * SIZES.P
                    v = C + start * STRIDES.C + i_g * SIZES.N
                    _add(
                        *(ddA_from_states + t, u, v, b_left, dA_cumsum + t * 2, 0.0, 1.0, length),
                        *(STRIDES.dy, STRIDES.C, SIZES),
                    )
            if dfinal_states is not None and c == c_last:
                b_exact = tl.load(dfinal_states + edge, mask=m, other=0.0).to(tl.float32)
                b_left = b_exact - b_dS.to(dtype).to(tl.float32)
                b_dS = b_exact
                if i == 1:
                    u = x + start * STRIDES.x + i_h * SIZES.P
                    v = B + start * STRIDES.B + i_g * SIZES.N
                    _add(
                        *(ddA_to_states + t, u, v, b_left, dA_cumsum + t * 2, a_last, -1.0, length),
                        *(STRIDES.x, STRIDES.B, SIZES),
                    )
            b_through = tl.sum(b_S * b_dS, 1) * decay(a_last)
            tl.store(ddA_through + (c * H + i_h) * SIZES.BLOCK_P + o_p, b_through)


@triton.jit
def _add(
    weights,
    u,
    v,
    b_S,
    dA_cumsum,
    offset,
    sign,
    length,
    STRIDE_u: tl.constexpr,
    STRIDE_v: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Add `e^(offset + sign a_t) u_t . (S v_t)` to the weight of each token t of a chunk."""
    for i_m in tl.static_range(2):
        o_t = i_m * SIZES.TILE + tl.arange(0, SIZES.TILE)
        m = o_t < length
        b_u = load_head(u, STRIDE_u, o_t, m, SIZES)
        b_v = load_group(v, STRIDE_v, o_t, m, SIZES)
        b = tl.dot(b_v, tl.trans(b_S.to(b_v.dtype)))
        b_a = tl.load(dA_cumsum + tl.minimum(o_t, length - 1) * 2)
        b = tl.sum(b * b_u.to(tl.float32), 1) * decay(offset + sign * b_a)
        tl.store(weights + o_t, tl.load(weights + o_t, mask=m, other=0.0) + b, mask=m)
