"""The state before each chunk, and its gradient after each chunk: one sweep, either way.

Letters: D documents, H heads, P head width, N state, Q tokens of a chunk. A program carries SLICE
columns of one document's state of one head, in fp32, over the document's chunks; columns of a state
do not depend on each other.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.ssd.kernels.loads import decay


@kernel
def sweep_kernel(
    x,
    B,
    steps,
    first,
    states,
    last,
    cu_seqlens,
    document_chunks,
    T,
    H,
    stride_x: tl.constexpr,
    stride_B: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The states alone."""
    sweep(
        tl.program_id(0),
        x,
        B,
        steps,
        first,
        states,
        last,
        cu_seqlens,
        document_chunks,
        T,
        H,
        stride_x,
        stride_B,
        P,
        N,
        HEADS_OF_GROUP,
        Q,
        BLOCK_P,
        SLICE,
        False,
        STAGES,
        PRECISION,
    )


@triton.jit
def sweep(
    program,
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
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward: u = x, v = B, `S <- e^a_last S + sum_j e^(a_last - a_j) dt_j x_j B_j^T`.

    REVERSE: u = dy, v = C, chunks from the last, `dS <- e^a_last dS + sum_i e^a_i dy_i C_i^T`.
    Each state is stored before its chunk changes it.
    """
    SLICES: tl.constexpr = (N + SLICE - 1) // SLICE
    i_n = (program % SLICES) * SLICE
    i_h = (program // SLICES) % H
    i_d = (program // SLICES) // H
    i_g = i_h // HEADS_OF_GROUP
    start = tl.load(cu_seqlens + i_d)
    length = (tl.load(cu_seqlens + i_d + 1) - start).to(tl.int32)
    i_c = tl.load(document_chunks + i_d)
    n_full = length // Q
    rest = length % Q

    o_p = tl.arange(0, BLOCK_P)
    o_n = i_n + tl.arange(0, SLICE)
    o_state = o_p[:, None] * N + o_n[None, :]
    m_state = (o_p < P)[:, None] & (o_n < N)[None, :]
    o_edge = (i_d.to(tl.int64) * H + i_h) * (P * N)
    u += start * stride_u + i_h * P
    v += start * stride_v + i_g * N + i_n
    steps += (i_h.to(tl.int64) * T + start) * 2
    states += (i_c * H + i_h) * (P * N) + i_n

    # [BLOCK_P, SLICE]
    b_S = tl.zeros([BLOCK_P, SLICE], tl.float32)
    if first is not None:
        b_S = tl.load(first + o_edge + o_state, mask=m_state, other=0.0).to(tl.float32)
    if REVERSE and rest > 0:
        b_S = _pass_chunk(
            *(b_S, n_full, rest, u, v, steps, states, i_n, H, stride_u, stride_v, P, N, Q),
            *(BLOCK_P, SLICE, False, REVERSE, PRECISION),
        )
    for i in tl.range(0, n_full, num_stages=STAGES):
        c = n_full - 1 - i if REVERSE else i
        b_S = _pass_chunk(
            *(b_S, c, Q, u, v, steps, states, i_n, H, stride_u, stride_v, P, N, Q),
            *(BLOCK_P, SLICE, True, REVERSE, PRECISION),
        )
    if not REVERSE and rest > 0:
        b_S = _pass_chunk(
            *(b_S, n_full, rest, u, v, steps, states, i_n, H, stride_u, stride_v, P, N, Q),
            *(BLOCK_P, SLICE, False, REVERSE, PRECISION),
        )
    if last is not None:
        tl.store(last + o_edge + o_state, b_S.to(last.dtype.element_ty), mask=m_state)


@triton.jit
def _pass_chunk(
    b_S,
    c,
    length,
    u,
    v,
    steps,
    states,
    i_n,
    H,
    stride_u: tl.constexpr,
    stride_v: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
    FULL: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state behind chunk `c` of a document, of `length` tokens; FULL: of all Q."""
    o_t = tl.arange(0, Q)
    # In 64 bits, or the distance of two rows is not a constant of an instruction.
    o_row = o_t.to(tl.int64)[:, None]
    o_p = tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, SLICE)
    t = c.to(tl.int64) * Q
    p_state = states + c.to(tl.int64) * H * (P * N) + (o_p[:, None] * N + o_n[None, :])
    p_u = u + t * stride_u + o_row * stride_u + o_p[None, :]
    p_v = v + t * stride_v + o_row * stride_v + o_n[None, :]
    p_steps = steps + t * 2 + o_t[:, None] * 2 + tl.arange(0, 2)[None, :]
    b_stored = b_S.to(states.dtype.element_ty)
    # [Q, BLOCK_P], [Q, SLICE], [Q]
    if FULL and P == BLOCK_P and N % SLICE == 0:
        tl.store(p_state, b_stored)
        b_u = tl.load(p_u)
        b_v = tl.load(p_v)
        b_steps = tl.load(p_steps)
    else:
        m_t = (o_t < length)[:, None]
        m_n = i_n + o_n < N
        tl.store(p_state, b_stored, mask=(o_p < P)[:, None] & m_n[None, :])
        b_u = tl.load(p_u, mask=m_t & (o_p < P)[None, :], other=0.0)
        b_v = tl.load(p_v, mask=m_t & m_n[None, :], other=0.0)
        b_steps = tl.load(p_steps, mask=tl.broadcast_to(m_t, [Q, 2]), other=0.0)
    b_a, b_dt = tl.split(b_steps)
    a_last = tl.load(steps + (t + length - 1) * 2)
    # Behind a short chunk the difference would be above 0.
    b_a = b_a if REVERSE else tl.minimum(a_last - b_a, 0.0)
    b_w = decay(b_a) if REVERSE else decay(b_a) * b_dt.to(tl.float32)
    b_uw = (tl.trans(b_u).to(tl.float32) * b_w[None, :]).to(u.dtype.element_ty)
    b_S = b_S * decay(a_last)
    return tl.dot(b_uw, b_v, acc=b_S, input_precision=PRECISION)
