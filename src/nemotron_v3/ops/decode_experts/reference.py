"""A decode step's experts, one row and one choice after another (README.md).

Letters: R rows, D hidden size, E experts, K choices a row, F expert width, X width the experts see.
"""

import torch
from torch import Tensor

from nemotron_v3.ops.common.low_rank import LowRank
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.weights import Router, Updates


def route(
    stream: Tensor,
    router: Router,
    active: Tensor,
    buffers: Buffers,
    *,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Arguments: see `op.py`. Computed in `dtype`, rounded to what the buffers hold."""
    for row in range(len(stream)):
        x = stream[row].to(dtype)
        normed = x / (x.square().mean() + router.eps).sqrt() * router.gain.to(dtype)
        buffers.normed[row] = normed
        buffers.logits[row] = router.gate.to(dtype) @ buffers.normed[row].to(dtype)
    choose(router, active, buffers, dtype=dtype)
    order(buffers)


def choose(
    router: Router, active: Tensor, buffers: Buffers, *, dtype: torch.dtype = torch.float64
) -> None:
    """The choice from `buffers.logits` on. Ties go to the expert of the lower number."""
    for row in range(len(active)):
        scores = buffers.logits[row].to(dtype).sigmoid()
        biased = (scores + router.bias.to(dtype)).tolist()
        size = len(biased) // router.n_group
        groups = [range(first, first + size) for first in range(0, len(biased), size)]

        def score(group: range, biased: list[float] = biased) -> float:
            return sum(sorted((biased[e] for e in group), reverse=True)[:2])

        kept = sorted(groups, key=score, reverse=True)[: router.topk_group]
        allowed = sorted(e for group in kept for e in group)
        chosen = sorted(allowed, key=biased.__getitem__, reverse=True)[: router.top_k]
        weights = scores[chosen]
        if router.weights_use_bias:
            weights = weights + router.bias.to(dtype)[chosen]
        if router.norm_topk_prob:
            weights = weights / (weights.sum() + 1e-20)
        buffers.weights[row] = weights * router.scaling_factor
        chosen = chosen if active[row] else [-1] * router.top_k
        buffers.experts[row] = torch.tensor(chosen, device=buffers.experts.device)


def order(buffers: Buffers) -> None:
    """`slots` and `choices` of what the rows have chosen."""
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(buffers.experts.flatten().tolist()):
        if expert >= 0:
            places.setdefault(expert, []).append(place)
    buffers.slots[0] = -1
    start = 0
    for slot, (expert, own) in enumerate(sorted(places.items())):
        device = buffers.slots.device
        buffers.slots[:, slot] = torch.tensor([expert, start, len(own)], device=device)
        buffers.choices[start : start + len(own)] = torch.tensor(own, device=device)
        start += len(own)


def experts(
    x: Tensor,
    routed: tuple[Tensor, Tensor] | None,
    shared: tuple[Tensor, Tensor] | None,
    active: Tensor,
    buffers: Buffers,
    *,
    residual: Tensor | None,
    updates: Updates | None = None,
    out: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Arguments: see `op.py`."""

    updates = updates or Updates()

    def product(x: Tensor, weight: Tensor, update: LowRank | None, e: int | None = None) -> Tensor:
        y = weight.to(dtype) @ x.to(dtype)
        if update is None:
            return y
        a, b = (update.a, update.b) if e is None else (update.a[e], update.b[e])
        return y + update.scale * (b.to(dtype) @ (a.to(dtype) @ x.to(dtype)))

    for row in range(len(out)):
        if not active[row]:
            continue
        y = torch.zeros(out.shape[1], dtype=dtype, device=out.device)
        if routed is not None:
            weights = buffers.weights[row].to(dtype)
            for weight, e in zip(weights, buffers.experts[row].tolist(), strict=True):
                u = product(x[row], routed[0][e], updates.up, e).relu()
                y += product(weight * u.square(), routed[1][e], updates.down, e)
        if shared is not None:
            u = product(buffers.normed[row], shared[0], updates.shared_up).relu()
            y += product(u.square(), shared[1], updates.shared_down)
        out[row] = y if residual is None else y + residual[row].to(dtype)
    return out
