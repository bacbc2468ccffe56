"""The host's half of a decode step's experts in Triton (README.md).

Letters: R rows, D hidden size, E experts, K choices a row, F expert width, X width the experts see.
"""

import triton
from torch import Tensor

from nemotron_v3.ops.common.early import early
from nemotron_v3.ops.common.host import power_of_two
from nemotron_v3.ops.decode_experts import one_row
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.products import combine_kernel, down_kernel, up_kernel
from nemotron_v3.ops.decode_experts.routing import route_kernel
from nemotron_v3.ops.decode_experts.weights import Router

SHARED_ROWS = 64  # of the shared expert, for which its weights are read once


def route(stream: Tensor, router: Router, active: Tensor, buffers: Buffers) -> None:
    R, D = stream.shape
    E, block_e = len(router.gate), 2
    route_kernel[triton.cdiv(E, block_e), R](
        stream,
        router.gain,
        router.gate,
        router.bias,
        active,
        buffers.normed,
        buffers.logits,
        buffers.weights,
        buffers.experts,
        buffers.slots,
        buffers.choices,
        buffers.counters,
        R,
        D,
        router.eps,
        router.scaling_factor,
        stream.stride(0),
        E=E,
        K=router.top_k,
        GROUPS=router.n_group,
        KEPT=router.topk_group,
        NORMALISE=router.norm_topk_prob,
        BY_BIASED=router.weights_use_bias,
        SLOTS=buffers.slots.shape[1],
        SORT=R > 1,
        BLOCK_E=block_e,
        BLOCK_R=min(power_of_two(R), 16),
        ALL_D=power_of_two(D),
        ALL_E=power_of_two(E),
        ALL_K=power_of_two(router.top_k),
        ALL_G=max(power_of_two(router.n_group), 2),
        num_warps=8,
        **early(stream.device),
    )


def experts(
    x: Tensor,
    routed: tuple[Tensor, Tensor] | None,
    shared: tuple[Tensor, Tensor] | None,
    active: Tensor,
    buffers: Buffers,
    *,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    if len(out) == 1:
        return _of_one_row(x, routed, shared, buffers, residual=residual, out=out)
    up, down = routed or shared
    shared_up, shared_down = shared or routed
    F, X = up.shape[-2:]
    R, D = buffers.normed.shape
    wide = 0 if shared is None else len(shared_up)
    slots = 0 if routed is None else buffers.slots.shape[1]
    block_m, block_n, warps, stages = blocks_of(R, up.element_size())
    sizes = {
        "F": F,
        "SLOTS": buffers.slots.shape[1],
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_R": 16,
        "SHARED_R": min(max(power_of_two(R), 16), SHARED_ROWS),
        "STAGES": stages,
        "num_warps": warps,
        **early(x.device),
    }
    shared_blocks = triton.cdiv(wide, block_m)
    up_kernel[shared_blocks + slots * triton.cdiv(F, block_m),](
        x,
        buffers.normed,
        up,
        shared_up,
        buffers.weights,
        buffers.slots,
        buffers.choices,
        buffers.h,
        buffers.shared_h,
        R,
        X,
        D,
        wide,
        shared_blocks,
        K=buffers.weights.shape[1],
        EVEN_X=X % block_n == 0,
        EVEN_D=D % block_n == 0,
        **sizes,
    )
    shared_blocks = triton.cdiv(D, block_m) if wide else 0
    down_kernel[shared_blocks + slots * triton.cdiv(X, block_m),](
        buffers.h,
        buffers.shared_h,
        down,
        shared_down,
        buffers.slots,
        buffers.choices,
        buffers.y,
        buffers.shared_y,
        R,
        X,
        D,
        wide,
        shared_blocks,
        EVEN_F=F % block_n == 0,
        EVEN_S=wide % block_n == 0,
        **sizes,
    )
    block = min(1024, power_of_two(out.shape[1]))
    combine_kernel[R, triton.cdiv(out.shape[1], block)](
        buffers.y,
        buffers.shared_y,
        out if residual is None else residual,
        active,
        out,
        out.shape[1],
        K=buffers.weights.shape[1],
        ROUTED=routed is not None,
        SHARED=shared is not None,
        RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=4,
        **early(x.device),
    )
    return out


def _of_one_row(
    x: Tensor,
    routed: tuple[Tensor, Tensor] | None,
    shared: tuple[Tensor, Tensor] | None,
    buffers: Buffers,
    *,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    up, down = routed or shared
    shared_up, shared_down = shared or routed
    F, X = up.shape[-2:]
    D, K = buffers.normed.shape[1], buffers.weights.shape[1]
    wide = 0 if shared is None else len(shared_up)
    block_m, block_n, warps, stages = ONE_ROW_UP
    shared_blocks = triton.cdiv(wide, block_m)
    one_row.up_kernel[shared_blocks + (0 if routed is None else K * triton.cdiv(F, block_m)),](
        x,
        buffers.normed,
        up,
        shared_up,
        buffers.weights,
        buffers.experts,
        buffers.h,
        buffers.shared_h,
        X,
        D,
        wide,
        shared_blocks,
        F=F,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        num_warps=warps,
        **early(x.device),
    )
    block_m, block_n, warps, stages = ONE_ROW_DOWN
    one_row.down_kernel[triton.cdiv(out.shape[1], block_m),](
        buffers.h,
        buffers.shared_h,
        down,
        shared_down,
        buffers.experts,
        out if residual is None else residual,
        out,
        out.shape[1],
        wide,
        F=F,
        K=K,
        ROUTED=routed is not None,
        SHARED=shared is not None,
        RESIDUAL=residual is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        num_warps=warps,
        **early(x.device),
    )
    return out


# BLOCK_M, BLOCK_N, warps and stages for one row.
ONE_ROW_UP = (4, 1024, 4, 4)
ONE_ROW_DOWN = (8, 512, 4, 4)


def blocks_of(R: int, element_size: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps and stages; see `skinny_linear.kernels.blocks_of`."""
    if element_size == 4:
        return 32, 32, 4, 2
    return (32, 256, 4, 4) if R <= 48 else (32, 128, 4, 4)
