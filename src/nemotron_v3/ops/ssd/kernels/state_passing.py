"""The state before each chunk, and its gradient after each chunk: one kernel, either way.

Letters: n_docs documents, H heads, P head width, N state, Q tokens of a chunk. A program carries
SLICE columns of one document's state of one head, in fp32, over the document's chunks; columns of a
state do not depend on each other.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.ssd.kernels.loads import decay


class Passed(NamedTuple):
    """What `pass_states` reads and writes."""

    u: Any
    v: Any
    dA_cumsum: Any
    initial: Any
    states: Any
    final: Any


@kernel
def state_passing_kernel(
    x,
    B,
    dA_cumsum,
    initial_states,
    prev_states,
    final_states,
    cu_seqlens,
    document_chunks,
    T,
    H,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    PASSING: tl.constexpr,
):
    """The states alone."""
    tensors = Passed(x, B, dA_cumsum, initial_states, prev_states, final_states)
    pass_states(
        *(tl.program_id(0), tensors, cu_seqlens, document_chunks, T, H),
        *(STRIDES.x, STRIDES.B, SIZES, PASSING, False),
    )


@triton.jit
def pass_states(
    program,
    tensors,
    cu_seqlens,
    document_chunks,
    T,
    H,
    STRIDE_u: tl.constexpr,
    STRIDE_v: tl.constexpr,
    SIZES: tl.constexpr,
    PASSING: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Forward: u = x, v = B, `S <- e^a_last S + sum_j e^(a_last - a_j) dt_j x_j B_j^T`.

    REVERSE: u = dy, v = C, chunks from the last, `dS <- e^a_last dS + sum_i e^a_i dy_i C_i^T`.
    Each state is stored before its chunk changes it.
    """
    SLICES: tl.constexpr = (SIZES.N + PASSING.slice - 1) // PASSING.slice
    i_n = (program % SLICES) * PASSING.slice
    i_h = (program // SLICES) % H
    i_d = (program // SLICES) // H
    i_g = i_h // SIZES.HEADS_OF_GROUP
    start = tl.load(cu_seqlens + i_d)
    length = (tl.load(cu_seqlens + i_d + 1) - start).to(tl.int32)
    i_c = tl.load(document_chunks + i_d)
    n_full = length // SIZES.Q
    rest = length % SIZES.Q

    o_p = tl.arange(0, SIZES.BLOCK_P)
    o_n = i_n + tl.arange(0, PASSING.slice)
    o_state = o_p[:, None] * SIZES.N + o_n[None, :]
    m_state = (o_p < SIZES.P)[:, None] & (o_n < SIZES.N)[None, :]
    o_edge = (i_d.to(tl.int64) * H + i_h) * (SIZES.P * SIZES.N)
    u = tensors.u + (start * STRIDE_u + i_h * SIZES.P)
    v = tensors.v + (start * STRIDE_v + i_g * SIZES.N + i_n)
    dA_cumsum = tensors.dA_cumsum + (i_h.to(tl.int64) * T + start) * 2
    states = tensors.states + ((i_c * H + i_h) * (SIZES.P * SIZES.N) + i_n)

    # [BLOCK_P, SLICE]
    b_S = tl.zeros([tl.constexpr(SIZES.BLOCK_P), tl.constexpr(PASSING.slice)], tl.float32)
    if tensors.initial is not None:
        b_S = tl.load(tensors.initial + o_edge + o_state, mask=m_state, other=0.0).to(tl.float32)
    here = (u, v, dA_cumsum, states, i_n, H)
    if REVERSE and rest > 0:
        b_S = _pass_chunk(
            b_S, n_full, rest, *here, STRIDE_u, STRIDE_v, SIZES, PASSING, False, REVERSE
        )
    for i in tl.range(0, n_full, num_stages=PASSING.stages):
        c = n_full - 1 - i if REVERSE else i
        b_S = _pass_chunk(b_S, c, SIZES.Q, *here, STRIDE_u, STRIDE_v, SIZES, PASSING, True, REVERSE)
    if not REVERSE and rest > 0:
        b_S = _pass_chunk(
            b_S, n_full, rest, *here, STRIDE_u, STRIDE_v, SIZES, PASSING, False, REVERSE
        )
    if tensors.final is not None:
        p_final = tensors.final + o_edge + o_state
        tl.store(p_final, b_S.to(tensors.final.dtype.element_ty), mask=m_state)


@triton.jit
def _pass_chunk(
    b_S,
    c,
    length,
    u,
    v,
    dA_cumsum,
    states,
    i_n,
    H,
    STRIDE_u: tl.constexpr,
    STRIDE_v: tl.constexpr,
    SIZES: tl.constexpr,
    PASSING: tl.constexpr,
    FULL: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state behind chunk `c` of a document, of `length` tokens; FULL: of all Q."""
    o_t = tl.arange(0, SIZES.Q)
    # In 64 bits, or the distance of two rows is not a constant of an instruction.
    o_row = o_t.to(tl.int64)[:, None]
    o_p = tl.arange(0, SIZES.BLOCK_P)
    o_n = tl.arange(0, PASSING.slice)
    t = c.to(tl.int64) * SIZES.Q
    p_state = (
        states + c.to(tl.int64) * H * (SIZES.P * SIZES.N) + (o_p[:, None] * SIZES.N + o_n[None, :])
    )
    p_u = u + t * STRIDE_u + o_row * STRIDE_u + o_p[None, :]
    p_v = v + t * STRIDE_v + o_row * STRIDE_v + o_n[None, :]
    p_dA = dA_cumsum + t * 2 + o_t[:, None] * 2 + tl.arange(0, 2)[None, :]
    b_stored = b_S.to(states.dtype.element_ty)
    # [Q, BLOCK_P], [Q, SLICE], [Q]
    if FULL and SIZES.P == SIZES.BLOCK_P and SIZES.N % PASSING.slice == 0:
        tl.store(p_state, b_stored)
        b_u = tl.load(p_u)
        b_v = tl.load(p_v)
        b_dA = tl.load(p_dA)
    else:
        m_t = (o_t < length)[:, None]
        m_n = i_n + o_n < SIZES.N
        tl.store(p_state, b_stored, mask=(o_p < SIZES.P)[:, None] & m_n[None, :])
        b_u = tl.load(p_u, mask=m_t & (o_p < SIZES.P)[None, :], other=0.0)
        b_v = tl.load(p_v, mask=m_t & m_n[None, :], other=0.0)
        b_dA = tl.load(p_dA, mask=tl.broadcast_to(m_t, [tl.constexpr(SIZES.Q), 2]), other=0.0)
    b_a, b_dt = tl.split(b_dA)
    a_last = tl.load(dA_cumsum + (t + length - 1) * 2)
    # Behind a short chunk the difference would be above 0.
    b_a = b_a if REVERSE else tl.minimum(a_last - b_a, 0.0)
    b_w = decay(b_a) if REVERSE else decay(b_a) * b_dt.to(tl.float32)
    b_uw = (tl.trans(b_u).to(tl.float32) * b_w[None, :]).to(u.dtype.element_ty)
    b_S = b_S * decay(a_last)
    return tl.dot(b_uw, b_v, acc=b_S, input_precision=SIZES.PRECISION)
