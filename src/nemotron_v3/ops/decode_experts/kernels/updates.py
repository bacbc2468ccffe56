"""The host's half of the experts' low-rank updates (README.md)."""

from typing import Any

import torch
import triton
from torch import Tensor

from nemotron_v3.ops.common.early import early
from nemotron_v3.ops.common.host import power_of_two
from nemotron_v3.ops.common.low_rank import LowRank
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.kernels.thin import thin_kernel
from nemotron_v3.ops.skinny_linear.kernels.launch import THIN_RANKS, rank_block


def up_arguments(
    x: Tensor, routed: LowRank | None, shared: LowRank | None, buffers: Buffers
) -> dict[str, Any]:
    """What `up_kernel` is told of updates, their thin products made."""
    share = buffers.weights.shape[1]
    return _arguments("up_b", (x, buffers.normed), routed, shared, buffers, share)


def down_arguments(
    routed: LowRank | None, shared: LowRank | None, buffers: Buffers
) -> dict[str, Any]:
    """What `down_kernel` is told of updates, their thin products made."""
    return _arguments("down_b", (buffers.h, buffers.shared_h), routed, shared, buffers, 1)


def _arguments(
    b: str,
    inputs: tuple[Tensor, Tensor],
    routed: LowRank | None,
    shared: LowRank | None,
    buffers: Buffers,
    share: int,
) -> dict[str, Any]:
    """Inputs of the routed experts, `share` choices a row of them, and of the shared one."""
    rank = 0 if routed is None else routed.a.shape[1]
    shared_rank = 0 if shared is None else len(shared.a)
    thin, shared_thin = _thin(inputs, routed, shared, buffers, share)
    rows = len(buffers.normed)
    return {
        b: None if routed is None else routed.b,
        "shared_b": None if shared is None else shared.b,
        "thin": thin,
        "shared_thin": shared_thin,
        "rank": rank,
        "shared_rank": shared_rank,
        "RANK": 0 if routed is None else rank_block(rank, routed.b.dtype, rows),
        "SHARED_RANK": 0 if shared is None else rank_block(shared_rank, shared.b.dtype, rows),
    }


def _thin(
    inputs: tuple[Tensor, Tensor],
    routed: LowRank | None,
    shared: LowRank | None,
    buffers: Buffers,
    share: int,
) -> tuple[Tensor | None, Tensor | None]:
    """fp32 `[R K, r]` and `[R, r]`."""
    if routed is None and shared is None:
        return None, None
    x, shared_x = inputs
    R, K = buffers.weights.shape
    rank = 0 if routed is None else routed.a.shape[1]
    shared_rank = 0 if shared is None else len(shared.a)
    choices = 0 if routed is None else R * K
    numbers = {"dtype": torch.float32, "device": x.device}
    thin = None if routed is None else torch.empty(R * K, rank, **numbers)
    shared_thin = None if shared is None else torch.empty(R, shared_rank, **numbers)
    programs = choices + (0 if shared is None else R)
    thin_kernel[triton.cdiv(max(rank, shared_rank), THIN_RANKS), programs](
        x=x,
        shared_x=shared_x,
        a=None if routed is None else routed.a,
        shared_a=None if shared is None else shared.a,
        experts=buffers.experts,
        thin=thin,
        shared_thin=shared_thin,
        choices=choices,
        n=x.shape[1],
        shared_n=shared_x.shape[1],
        rank=rank,
        shared_rank=shared_rank,
        scale=0.0 if routed is None else float(routed.scale),
        shared_scale=0.0 if shared is None else float(shared.scale),
        SHARE=share,
        ROUTED=routed is not None,
        SHARED=shared is not None,
        BLOCK_M=THIN_RANKS,
        ALL_N=power_of_two(x.shape[1]),
        SHARED_ALL_N=power_of_two(shared_x.shape[1]),
        num_warps=8,
        **early(x.device),
    )
    return thin, shared_thin
