"""The host's half of a decode step's experts in Triton (README.md).

Letters: R rows, D hidden size, E experts, K choices a row, F expert width, X width the experts see.
"""

import triton
from torch import Tensor

from nemotron_v3.ops.common.early import early
from nemotron_v3.ops.common.host import on_device_of_first, power_of_two, shared_memory
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.kernels import one_row
from nemotron_v3.ops.decode_experts.kernels.products import combine_kernel, down_kernel, up_kernel
from nemotron_v3.ops.decode_experts.kernels.routing import route_kernel
from nemotron_v3.ops.decode_experts.kernels.updates import down_arguments, up_arguments
from nemotron_v3.ops.decode_experts.weights import Router, Updates
from nemotron_v3.ops.router.kernels.choose import Sizes
from nemotron_v3.ops.skinny_linear.kernels.launch import Blocks

Pair = tuple[Tensor, Tensor]

SHARED_ROWS = 64  # of the shared expert, for which its weights are read once
ROUTED_ROWS = 16  # of an expert that is routed to
EXPERTS_OF_PROGRAM = 2  # whose logits a program of the router computes
ONE_ROW_UP = Blocks(4, 1024, 1, 4, 4)
ONE_ROW_DOWN = Blocks(8, 512, 1, 4, 4)


def blocks_of(R: int, element_size: int, shared: int) -> Blocks:
    """How the products of two rows and more are cut; see `skinny_linear.kernels.launch`.

    `r` is that of the shared expert; one that is routed to has `ROUTED_ROWS` at a time.
    """
    r = min(max(power_of_two(R), 16), SHARED_ROWS)
    blocks = Blocks(32, 256 if R <= 48 else 128, r, 4, 4)
    if element_size == 4:
        blocks = Blocks(32, 32, r, 4, 2)
    return blocks.within(shared, element_size, element_size)


@on_device_of_first
def route(stream: Tensor, router: Router, active: Tensor, buffers: Buffers) -> None:
    R, D = stream.shape
    E = len(router.gate)
    if R == 0:
        return
    sizes = Sizes(
        E=E,
        K=router.top_k,
        GROUPS=router.n_group,
        KEPT=router.topk_group,
        NORMALISE=router.norm_topk_prob,
        BLOCK_T=1,
        BLOCK_E=power_of_two(E),
        BLOCK_K=power_of_two(router.top_k),
        BLOCK_G=max(power_of_two(router.n_group), 2),
    )
    route_kernel[triton.cdiv(E, EXPERTS_OF_PROGRAM), R](
        x=stream,
        gain=router.gain,
        gate=router.gate,
        bias=router.bias,
        active=active,
        normed=buffers.normed,
        logits=buffers.logits,
        weights=buffers.weights,
        experts=buffers.experts,
        slots=buffers.slots,
        choices=buffers.choices,
        counters=buffers.counters,
        R=R,
        D=D,
        eps=router.eps,
        factor=router.scaling_factor,
        stride_x=stream.stride(0),
        SIZES=sizes,
        BY_BIASED=router.weights_use_bias,
        SLOTS=buffers.slots.shape[1],
        SORT=R > 1,
        BLOCK_E=EXPERTS_OF_PROGRAM,
        BLOCK_R=min(power_of_two(R), 16),
        ALL_D=power_of_two(D),
        num_warps=8,  # with four the choice spills
        **early(stream.device),
    )


def experts(
    x: Tensor,
    routed: Pair | None,
    shared: Pair | None,
    active: Tensor,
    buffers: Buffers,
    *,
    residual: Tensor | None,
    updates: Updates | None,
    out: Tensor,
) -> Tensor:
    updates = updates or Updates()
    if len(out) == 1:
        _of_one_row(x, routed, shared, buffers, updates, residual, out)
    elif len(out):
        _of_rows(x, routed, shared, buffers, updates)
        _combine(buffers, routed, shared, active, residual, out)
    return out


@on_device_of_first
def _of_rows(
    x: Tensor, routed: Pair | None, shared: Pair | None, buffers: Buffers, updates: Updates
) -> None:
    """Both products of every choice and of the shared expert, to `buffers.y` and `shared_y`."""
    up, down = routed or shared
    shared_up, shared_down = shared or routed
    F, X = up.shape[-2:]
    R, D = buffers.normed.shape
    wide = 0 if shared is None else len(shared_up)
    slots = 0 if routed is None else buffers.slots.shape[1]
    blocks = blocks_of(R, up.element_size(), shared_memory(x.device))
    shared_blocks = triton.cdiv(wide, blocks.m)
    up_kernel[shared_blocks + slots * triton.cdiv(F, blocks.m),](
        x=x,
        shared_x=buffers.normed,
        up=up,
        shared_up=shared_up,
        weights=buffers.weights,
        slots=buffers.slots,
        choices=buffers.choices,
        h=buffers.h,
        shared_h=buffers.shared_h,
        **up_arguments(x, updates.up, updates.shared_up, buffers),
        R=R,
        X=X,
        D=D,
        F_SHARED=wide,
        shared_blocks=shared_blocks,
        F=F,
        K=buffers.weights.shape[1],
        SLOTS=buffers.slots.shape[1],
        BLOCKS=blocks._replace(r=ROUTED_ROWS),
        SHARED_BLOCKS=blocks,
        EVEN_X=X % blocks.n == 0,
        EVEN_D=D % blocks.n == 0,
        num_warps=blocks.warps,
        **early(x.device),
    )
    shared_blocks = triton.cdiv(D, blocks.m) if wide else 0
    down_kernel[shared_blocks + slots * triton.cdiv(X, blocks.m),](
        h=buffers.h,
        shared_h=buffers.shared_h,
        down=down,
        shared_down=shared_down,
        slots=buffers.slots,
        choices=buffers.choices,
        y=buffers.y,
        shared_y=buffers.shared_y,
        **down_arguments(updates.down, updates.shared_down, buffers),
        R=R,
        X=X,
        D=D,
        F_SHARED=wide,
        shared_blocks=shared_blocks,
        F=F,
        SLOTS=buffers.slots.shape[1],
        BLOCKS=blocks._replace(r=ROUTED_ROWS),
        SHARED_BLOCKS=blocks,
        EVEN_F=F % blocks.n == 0,
        EVEN_S=wide % blocks.n == 0,
        num_warps=blocks.warps,
        **early(x.device),
    )


def _combine(
    buffers: Buffers,
    routed: Pair | None,
    shared: Pair | None,
    active: Tensor,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    R, X = out.shape
    block = min(1024, power_of_two(X))
    combine_kernel[R, triton.cdiv(X, block)](
        y=buffers.y,
        shared_y=buffers.shared_y,
        residual=residual,
        active=active,
        out=out,
        X=X,
        K=buffers.weights.shape[1],
        ROUTED=routed is not None,
        SHARED=shared is not None,
        RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=4,
        **early(out.device),
    )


@on_device_of_first
def _of_one_row(
    x: Tensor,
    routed: Pair | None,
    shared: Pair | None,
    buffers: Buffers,
    updates: Updates,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    up, down = routed or shared
    shared_up, shared_down = shared or routed
    F, X = up.shape[-2:]
    K = buffers.weights.shape[1]
    wide = 0 if shared is None else len(shared_up)
    blocks = ONE_ROW_UP
    shared_blocks = triton.cdiv(wide, blocks.m)
    choices = 0 if routed is None else K
    one_row.up_kernel[shared_blocks + choices * triton.cdiv(F, blocks.m),](
        x=x,
        shared_x=buffers.normed,
        up=up,
        shared_up=shared_up,
        weights=buffers.weights,
        experts=buffers.experts,
        h=buffers.h,
        shared_h=buffers.shared_h,
        **up_arguments(x, updates.up, updates.shared_up, buffers),
        X=X,
        D=buffers.normed.shape[1],
        F_SHARED=wide,
        shared_blocks=shared_blocks,
        F=F,
        BLOCKS=blocks,
        num_warps=blocks.warps,
        **early(x.device),
    )
    blocks = ONE_ROW_DOWN
    one_row.down_kernel[triton.cdiv(out.shape[1], blocks.m),](
        h=buffers.h,
        shared_h=buffers.shared_h,
        down=down,
        shared_down=shared_down,
        experts=buffers.experts,
        residual=residual,
        out=out,
        **down_arguments(updates.down, updates.shared_down, buffers),
        X=out.shape[1],
        F_SHARED=wide,
        F=F,
        K=K,
        ROUTED=routed is not None,
        SHARED=shared is not None,
        RESIDUAL=residual is not None,
        BLOCKS=blocks,
        num_warps=blocks.warps,
        **early(x.device),
    )
