"""Attention of one token a slot in Triton: parts of the keys, then their combination (README.md).

Letters: R slots, H query heads, J key/value heads, P head width, M queries (those of a key/value
head, filled up) and N keys of a tile. `places` are those of a buffer.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops.attention.kernels.tiles import load_rows, store_rows
from nemotron_v3.ops.common.early import early, start_early
from nemotron_v3.ops.common.host import interpreted, on_device_of_first, power_of_two, unit_stride
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.decode_attention.split import split_of

LOG2E = math.log2(math.e)
C_COLUMNS = tl.constexpr(32)  # that a score in fp32 sums in one go


@kernel
def parts_kernel(
    qkv,
    keys,
    values,
    positions,
    active,
    partial,
    log_sums,
    out,
    R,
    parts,
    places,
    scale,
    stride: tl.constexpr,
    H: tl.constexpr,
    J: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has one part of the keys of a key/value head in one slot, for all its queries.

    `partial` `[R, J, parts, H / J, P]` is a part's result, `log_sums` `[R, J, parts, H / J]` the
    logarithm of its sum, to base 2 as `scale`. WHOLE: there is one part, which writes `out`. WIDE:
    products in fp32, which a thread adds up one after another: no such sum is longer than a tile.

    The newest key and value come from `qkv`: the part that they fall into stores them, and reads
    from the buffers what stands before them.
    """
    start_early(PDL)
    SHARE: tl.constexpr = H // J
    # Parts behind all slots' tokens come last and are over at once.
    i_rj = tl.program_id(0) % (R * J)
    i_part = tl.program_id(0) // (R * J)
    i_r, i_j = (i_rj // J).to(tl.int64), i_rj % J
    o_m, o_p = tl.arange(0, M), tl.arange(0, BLOCK_P)
    m_m, m_p = o_m < SHARE, o_p < P
    position = tl.load(positions + i_r)
    inside = (position >= 0) & (position < places)
    on = tl.load(active + i_r) != 0
    first = i_part * SPLIT
    p_out = out + (i_r * H + i_j * SHARE) * P
    if on & inside & (position >= first):
        last = position.to(tl.int32)
        newest = last < first + SPLIT
        end = tl.minimum(first + SPLIT, last)
        p_row = qkv + i_r * stride
        p_keys = keys + (i_r * J + i_j) * places * P
        p_values = values + (i_r * J + i_j) * places * P
        # [M, BLOCK_P]
        b_q = load_rows(p_row + i_j * SHARE * P, o_m, m_m, P, P, BLOCK_P, True)
        b_max = tl.full([M], float("-inf"), tl.float32)
        b_sum = tl.zeros([M], tl.float32)
        b_out = tl.zeros([M, BLOCK_P], tl.float32)
        for n in tl.range(first, end, N, num_stages=STAGES):
            o_n = n + tl.arange(0, N)
            m_n = o_n < end
            if WIDE:
                b_s = _wide_scores(p_row + i_j * SHARE * P, p_keys, o_m, m_m, o_n, m_n, scale,
                                   P, BLOCK_P, M, N)  # fmt: skip
            else:
                b_k = load_rows(p_keys, o_n, m_n, P, P, BLOCK_P, True)
                b_s = tl.dot(b_q, tl.trans(b_k)) * scale  # [M, N]
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_w = tl.exp2(b_s - b_new[:, None])
            b_less = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_less + tl.sum(b_w, 1)
            b_v = load_rows(p_values, o_n, m_n, P, P, BLOCK_P, True)
            if WIDE:
                b_part = tl.dot(b_w, b_v, input_precision="ieee")
                b_out = tl.fma(b_out, b_less[:, None], b_part)
            else:
                b_out = tl.dot(b_w.to(b_v.dtype), b_v, b_out * b_less[:, None])
            b_max = b_new
        m_new = tl.where(newest, m_p, False)
        # [BLOCK_P]
        b_k_new = tl.load(p_row + (H + i_j) * P + o_p, mask=m_new, other=0.0)
        b_v_new = tl.load(p_row + (H + J + i_j) * P + o_p, mask=m_new, other=0.0)
        tl.store(p_keys + position * P + o_p, b_k_new, mask=m_new)
        tl.store(p_values + position * P + o_p, b_v_new, mask=m_new)
        b_s = tl.sum(b_q.to(tl.float32) * b_k_new.to(tl.float32)[None, :], 1) * scale
        b_s = tl.where(newest, b_s, float("-inf"))
        b_new = tl.maximum(b_max, b_s)
        b_less, b_w = tl.exp2(b_max - b_new), tl.exp2(b_s - b_new)
        b_sum = b_sum * b_less + b_w
        b_out = b_out * b_less[:, None] + b_w[:, None] * b_v_new.to(tl.float32)[None, :]
        b_out = b_out / b_sum[:, None]
        b_max = b_new
        if WHOLE:
            store_rows(p_out, o_m, m_m, b_out, P, P, BLOCK_P)
        else:
            i_rows = (i_rj.to(tl.int64) * parts + i_part) * SHARE
            store_rows(partial + i_rows * P, o_m, m_m, b_out, P, P, BLOCK_P)
            tl.store(log_sums + i_rows + o_m, b_max + tl.log2(b_sum), mask=m_m)
    elif WHOLE:
        b_none = tl.zeros([M, BLOCK_P], tl.float32) + tl.where(on, float("nan"), 0.0)
        store_rows(p_out, o_m, m_m, b_none, P, P, BLOCK_P)


@triton.jit
def _wide_scores(
    p_q, p_keys, o_m, m_m, o_n, m_n, scale, P: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Scores in fp32 `[M, N]`, each the sum of sums of at most `C_COLUMNS` products."""
    COLUMNS: tl.constexpr = BLOCK_P if BLOCK_P < C_COLUMNS else C_COLUMNS
    b_s = tl.zeros([M, N], tl.float32)
    for c in tl.static_range(0, BLOCK_P, COLUMNS):
        o_p = c + tl.arange(0, COLUMNS)
        m_p = (o_p < P)[None, :]
        b_q = tl.load(p_q + o_m[:, None] * P + o_p[None, :], mask=m_m[:, None] & m_p, other=0.0)
        p_k = p_keys + o_n.to(tl.int64)[:, None] * P + o_p[None, :]
        b_k = tl.load(p_k, mask=m_n[:, None] & m_p, other=0.0)
        # Not `+=`, which Triton would make one long sum of.
        b_s = tl.fma(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), scale, b_s)
    return b_s


@kernel
def combine_kernel(
    partial,
    log_sums,
    positions,
    active,
    out,
    parts,
    places,
    H: tl.constexpr,
    J: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has one head of one slot: the mean of its parts, each weighed by its sum."""
    start_early(PDL)
    SHARE: tl.constexpr = H // J
    i_r, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    o_p, o_s = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK)
    position = tl.load(positions + i_r)
    inside = (position >= 0) & (position < places)
    on = tl.load(active + i_r) != 0
    p_out = out + (i_r * H + i_h) * P + o_p
    if on & inside:
        n = position.to(tl.int32) // SPLIT + 1
        first = (i_r * J + i_h // SHARE) * parts * SHARE + i_h % SHARE
        b_max = tl.full([1], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK], tl.float32)
        b_out = tl.zeros([BLOCK, BLOCK_P], tl.float32)
        for s in tl.range(0, n, BLOCK, num_stages=STAGES):
            m_s = s + o_s < n
            o_row = (s + o_s) * SHARE
            b_l = tl.load(log_sums + first + o_row, mask=m_s, other=float("-inf"))
            # [BLOCK, BLOCK_P]
            b_part = load_rows(partial + first * P, o_row, m_s, P, P, BLOCK_P, True)
            b_new = tl.maximum(b_max, tl.max(b_l, 0))
            b_less, b_w = tl.exp2(b_max - b_new), tl.exp2(b_l - b_new)
            b_sum = b_sum * b_less + b_w
            b_out = b_out * b_less[:, None] + b_part * b_w[:, None]
            b_max = b_new
        b_y = tl.sum(b_out, 0) / tl.sum(b_sum, 0)
        tl.store(p_out, b_y.to(out.dtype.element_ty), mask=o_p < P)
    else:
        b_none = tl.zeros([BLOCK_P], tl.float32) + tl.where(on, float("nan"), 0.0)
        tl.store(p_out, b_none.to(out.dtype.element_ty), mask=o_p < P)


class Tile(NamedTuple):
    """Keys of a tile, depth of the software pipeline, warps of a program."""

    n: int
    stages: int
    warps: int


def tile(dtype: torch.dtype, P: int) -> Tile:
    """Of the parts.

    Two programs on a multiprocessor, with 32 KiB of keys and as many of values under way in each:
    as much as hides the memory's latency.
    """
    if interpreted():
        return Tile(32, 1, 4)
    if dtype == torch.float32:
        return Tile(32 if P <= 128 else 16, 2, 4)
    return Tile(64 if P <= 128 else 32, 3, 4)


COMBINED, COMBINE_STAGES, COMBINE_WARPS = 16, 3, 4  # parts of a tile


@on_device_of_first
def _run(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    active: Tensor,
    workspace: Tensor,
    out: Tensor,
    heads: int,
    scale: float,
    split: int,
    cut: Tile,
) -> None:
    R, J, L, P = keys.shape
    parts = -(-L // split)
    narrow = qkv.dtype != torch.float32
    # Below 64 columns Triton 3.6 computes products wrongly in loops without a pipeline.
    block_p = max(64 if narrow and not interpreted() else 16, power_of_two(P))
    partial, log_sums = workspace.split([R * heads * parts * P, R * heads * parts])
    m = max(16, power_of_two(heads // J))
    parts_kernel[R * J * parts,](
        *(qkv, keys, values, positions, active, partial, log_sums, out),
        *(R, parts, L, scale),
        *(qkv.stride(0), heads, J, P, block_p, m, cut.n, split, cut.stages),
        *(not narrow, parts == 1),
        num_warps=cut.warps,
        **early(qkv.device),
    )
    if parts > 1:
        combine_kernel[R * heads,](
            *(partial, log_sums, positions, active, out),
            *(parts, L),
            *(heads, J, P, power_of_two(P), COMBINED, split, COMBINE_STAGES),
            num_warps=COMBINE_WARPS,
            **early(qkv.device),
        )


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    active: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float | None = None,
    workspace: Tensor | None = None,
    out: Tensor,
    split: int | None = None,
    cut: Tile | None = None,
) -> Tensor:
    """See `ops.decode_attention`.

    Args:
        split, cut: places of a part, a multiple of the tile's keys, and the tile; `split_of` and
            `tile` choose by default.
    """
    R, _, L, P = keys.shape
    if R == 0:
        return out
    split = split_of(L) if split is None else split
    cut = tile(qkv.dtype, P) if cut is None else cut
    needed = R * num_heads * -(-L // split) * (P + 1)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=qkv.device)
    scale = P**-0.5 if scale is None else float(scale)
    tensors = unit_stride(qkv), keys, values, positions, active, workspace.view(-1)[:needed], out
    _run(*tensors, num_heads, scale * LOG2E, split, cut)
    return out
