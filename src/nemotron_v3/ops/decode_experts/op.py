"""The public halves of a decode step's mixture of experts, on preallocated buffers.

Letters: R rows, D hidden size, E experts, K choices a row, F expert width, X width the experts see.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.common.slots import check_slots
from nemotron_v3.ops.decode_experts import portable, reference
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.weights import Router, Updates
from nemotron_v3.ops.registry import Op

Pair = tuple[Tensor, Tensor]


def _route_kernels() -> Callable:
    from nemotron_v3.ops.decode_experts.kernels import route

    return route


def _experts_kernels() -> Callable:
    from nemotron_v3.ops.decode_experts.kernels import experts

    return experts


def _contiguous(weights: tuple[Tensor, ...]) -> bool:
    return all(weight.is_contiguous() for weight in weights)


def _refusal(dtypes: Sequence[torch.dtype], contiguous: bool) -> str | None:
    """Why the kernels cannot take a call, or None."""
    return refuse_dtypes(dtypes) if contiguous else "a weight is not contiguous"


_ROUTE = Op(
    "decode_route",
    reference=reference.route,
    portable=portable.route,
    kernels=_route_kernels,
    refuse=_refusal,
)
_EXPERTS = Op(
    "decode_experts",
    reference=reference.experts,
    portable=portable.experts,
    kernels=_experts_kernels,
    refuse=_refusal,
)


@_ROUTE.public
@torch.no_grad()
def decode_route(
    stream: Tensor, router: Router, active: Tensor, buffers: Buffers, *, impl: str = "auto"
) -> None:
    """Norm, logits and choice of experts, into the buffers (README.md).

    Nothing is allocated on a GPU and no value is read, so that a CUDA graph can hold the call; no
    gradients flow. The portable form leaves out the order of the choices, which it does not need.

    Args:
        stream: `[R, D]`, neighbouring columns.
        router: of the layer.
        active: bool or integers `[R]`; a row with 0 there chooses no expert.
        buffers: of these sizes (`Buffers.of`).
        impl: see `nemotron_v3.ops`.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_router(stream, router, buffers)
    check_slots(len(stream), None, active)
    weights = (router.gain, router.gate, router.bias)
    run = _ROUTE.pick(impl, (stream, *weights), _contiguous(weights))
    run(stream, router, active, buffers)


@_EXPERTS.public
@torch.no_grad()
def decode_experts(
    x: Tensor,
    routed: Pair | None,
    shared: Pair | None,
    active: Tensor,
    buffers: Buffers,
    *,
    residual: Tensor | None = None,
    updates: Updates | None = None,
    out: Tensor,
    impl: str = "auto",
) -> Tensor:
    """The sum of the routed experts, in the order of a row's choices, of the shared one and of the
    residual stream, whichever are given (README.md).

    A CUDA graph can hold the call, as `route`'s, which has to come before it.

    Args:
        x: `[R, X]`, what the routed experts see, contiguous; the shared one sees `buffers.normed`.
        routed: `[E, F, X]` and `[E, X, F]`; shared: both weights of the shared expert, whose inputs
            and outputs are D. One of both may be None; with both, X is D.
        active: bool or integers `[R]`.
        buffers: what `route` wrote to.
        residual: laid out as `out`; it may be `out` itself.
        updates: low-rank ones of the experts that are given.
        out: `[R, X]`, contiguous (`[R, D]` of the shared expert alone); inactive rows stay as they
            are, or hold anything if R is 1.
        impl: see `nemotron_v3.ops`.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    _check_experts(routed, shared, buffers)
    _check_rows(x, routed, residual, out, buffers)
    check_slots(len(out), None, active)
    updates = None if updates is None or not any(updates) else updates
    given = _check_updates(routed, shared, updates)
    weights = (*(routed or ()), *(shared or ()), *given)
    run = _EXPERTS.pick(impl, (x, *weights), _contiguous(weights))
    return run(x, routed, shared, active, buffers, residual=residual, updates=updates, out=out)


def _check_router(stream: Tensor, router: Router, buffers: Buffers) -> None:
    R, K = buffers.weights.shape
    D, E = buffers.normed.shape[1], buffers.logits.shape[1]
    if tuple(stream.shape) != (R, D) or (D > 1 and stream.stride(1) != 1):
        raise ValueError(
            f"stream {tuple(stream.shape)} of strides {stream.stride()}: the buffers are for "
            f"({R}, {D}) with neighbouring columns"
        )
    found = tuple(router.gain.shape), tuple(router.gate.shape), tuple(router.bias.shape)
    if found != ((D,), (E, D), (E,)) or router.top_k != K:
        raise ValueError(
            f"gain {found[0]}, gate {found[1]}, bias {found[2]} and {router.top_k} choices: the "
            f"buffers are for ({D},), ({E}, {D}), ({E},) and {K}"
        )
    groups, kept = router.n_group, router.topk_group
    if groups < 1 or E % groups or not 1 <= kept <= groups or kept * (E // groups) < K:
        raise ValueError(
            f"{K} choices among {kept} of {groups} groups of {E} experts: groups must be equal, "
            "and those kept hold as many experts as are chosen"
        )


def _check_experts(routed: Pair | None, shared: Pair | None, buffers: Buffers) -> None:
    if routed is None and shared is None:
        raise ValueError("no experts: give routed ones, the shared one, or both")
    D, E = buffers.normed.shape[1], buffers.logits.shape[1]
    F, X = buffers.h.shape[1], buffers.y.shape[1]
    wide = buffers.shared_h.shape[1]
    for name, pair, needed in (
        ("routed", routed, ((E, F, X), (E, X, F))),
        ("shared", shared, ((wide, D), (D, wide))),
    ):
        if pair is None:
            continue
        if (tuple(pair[0].shape), tuple(pair[1].shape)) != needed:
            raise ValueError(
                f"{name} {tuple(pair[0].shape)} and {tuple(pair[1].shape)}: the buffers are for "
                f"{needed[0]} and {needed[1]}"
            )
        if not {pair[0].dtype, pair[1].dtype} == {buffers.h.dtype}:
            raise ValueError(
                f"{name} in {pair[0].dtype} and {pair[1].dtype}: the buffers are for "
                f"{buffers.h.dtype}"
            )
    if routed is not None and shared is not None and X != D:
        raise ValueError(f"routed experts of {X} inputs and a shared one of {D}: call them apart")


def _check_updates(
    routed: Pair | None, shared: Pair | None, updates: Updates | None
) -> list[Tensor]:
    """The matrices of all updates."""
    if updates is None:
        return []
    places = (("up", routed, 0), ("down", routed, 1), ("shared_up", shared, 0))
    given: list[Tensor] = []
    for name, pair, which in (*places, ("shared_down", shared, 1)):
        update = getattr(updates, name)
        if update is None:
            continue
        if pair is None:
            raise ValueError(f"an update {name} of experts that are not given")
        weight = pair[which]
        shapes = tuple(update.a.shape), tuple(update.b.shape)
        r = update.a.shape[-2]
        needed = (*weight.shape[:-2], r, weight.shape[-1]), (*weight.shape[:-1], r)
        if shapes != needed or update.a.dtype != update.b.dtype:
            raise ValueError(
                f"{name}: a {shapes[0]} in {update.a.dtype} and b {shapes[1]} in {update.b.dtype} "
                f"do not fit a weight {tuple(weight.shape)}: {needed[0]} and {needed[1]} of one "
                "dtype are needed"
            )
        given += update[:2]
    return given


def _check_rows(
    x: Tensor, routed: Pair | None, residual: Tensor | None, out: Tensor, buffers: Buffers
) -> None:
    R = len(buffers.normed)
    width = buffers.normed.shape[1] if routed is None else buffers.y.shape[1]
    if tuple(out.shape) != (R, width) or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)}: contiguous ({R}, {width}) is needed")
    if routed is not None and (tuple(x.shape) != (R, width) or not x.is_contiguous()):
        raise ValueError(f"x {tuple(x.shape)}: contiguous ({R}, {width}) is needed")
    if routed is not None and x.dtype != buffers.h.dtype:
        raise ValueError(f"x in {x.dtype}: {buffers.h.dtype} is needed, the experts' own")
    if residual is None:
        return
    if residual.shape != out.shape or not residual.is_contiguous():
        raise ValueError(f"residual {tuple(residual.shape)}: contiguous ({R}, {width}) is needed")
