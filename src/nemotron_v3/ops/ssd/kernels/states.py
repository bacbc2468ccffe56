"""The state before each chunk, and its gradient after each chunk: one sweep, either way.

Letters: D documents, H heads, P head width, N state, Q tokens of a chunk. A program carries SLICE
columns of one document's state of one head, in fp32, over the document's chunks; columns of a state
do not depend on each other.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.ssd.kernels.tiles import decay, load_sum, load_tile


@triton.jit
def sweep_kernel(
    u,
    v,
    steps,
    first,
    states,
    last,
    cu_seqlens,
    document_chunks,
    T,
    H,
    stride_u: tl.constexpr,
    stride_v: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    STARTED: tl.constexpr,
    ENDS: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward: u = x, v = B, `S <- e^a_last S + sum_j e^(a_last - a_j) dt_j x_j B_j^T`.

    REVERSE: u = dy, v = C, chunks from the last, `dS <- e^a_last dS + sum_i e^a_i dy_i C_i^T`.
    Each state is stored before its chunk changes it.
    """
    i_s = tl.program_id(0) % SLICES
    i_n = i_s * SLICE
    i_h = (tl.program_id(0) // SLICES) % H
    i_d = (tl.program_id(0) // SLICES) // H
    i_g = i_h // HEADS_OF_GROUP
    start = tl.load(cu_seqlens + i_d)
    end = tl.load(cu_seqlens + i_d + 1)
    i_c = tl.load(document_chunks + i_d)
    n_c = (tl.load(document_chunks + i_d + 1) - i_c).to(tl.int32)

    o_t = tl.arange(0, Q)
    o_p = tl.arange(0, BLOCK_P)
    o_n = i_n + tl.arange(0, SLICE)
    o_state = o_p[:, None] * N + o_n[None, :]
    m_state = (o_p < P)[:, None] & (o_n < N)[None, :]
    o_edge = (i_d.to(tl.int64) * H + i_h) * (P * N)
    row = i_h.to(tl.int64) * T

    # [BLOCK_P, SLICE]
    b_S = tl.zeros([BLOCK_P, SLICE], tl.float32)
    if STARTED:
        b_S = tl.load(first + o_edge + o_state, mask=m_state, other=0.0).to(tl.float32)
    for i in tl.range(0, n_c, num_stages=STAGES):
        c = n_c - 1 - i if REVERSE else i
        t = start + c * Q
        m_t = t + o_t < end
        p_state = states + ((i_c + c) * H + i_h) * (P * N)
        tl.store(p_state + o_state, b_S.to(states.dtype.element_ty), mask=m_state)
        # [Q, BLOCK_P], [Q, SLICE], [Q]
        b_u = load_tile(u + t * stride_u + i_h * P, stride_u, o_t, m_t, P, BLOCK_P)
        p_v = v + t * stride_v + i_g * N + o_t[:, None] * stride_v + o_n[None, :]
        b_v = tl.load(p_v, mask=m_t[:, None] & (o_n < N)[None, :], other=0.0)
        p_steps = steps + (row + t + o_t)[:, None] * 2 + tl.arange(0, 2)[None, :]
        b_steps = tl.load(p_steps, mask=tl.broadcast_to(m_t[:, None], [Q, 2]), other=0.0)
        b_a, b_dt = tl.split(b_steps)
        a_last = load_sum(steps, row, tl.minimum(t + Q, end) - 1)
        if REVERSE:
            # Masked too, or the compiler leaves u out of its pipeline.
            b_w = tl.where(m_t, decay(b_a), 0.0)
        else:
            b_w = tl.where(m_t, decay(a_last - b_a) * b_dt.to(tl.float32), 0.0)
        b_uw = (tl.trans(b_u).to(tl.float32) * b_w[None, :]).to(u.dtype.element_ty)
        b_S = b_S * decay(a_last)
        b_S = tl.dot(b_uw, b_v, acc=b_S, input_precision=PRECISION)
    if ENDS:
        tl.store(last + o_edge + o_state, b_S.to(last.dtype.element_ty), mask=m_state)
