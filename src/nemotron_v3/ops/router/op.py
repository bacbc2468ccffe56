"""The public mixture-of-experts router."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.common.precision import WIDE, as_promised
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.registry import Op
from nemotron_v3.ops.router import portable, reference

MOST_EXPERTS, MOST_CHOICES, MOST_GROUPS = 2048, 64, 32  # of the kernels


def _kernels() -> Callable[..., tuple[Tensor, Tensor]]:
    from nemotron_v3.ops.router.kernels import router

    return router


def _refusal(dtypes: Sequence[torch.dtype], experts: int, top_k: int, n_group: int) -> str | None:
    if experts > MOST_EXPERTS or top_k > MOST_CHOICES or n_group > MOST_GROUPS:
        return (
            f"a token's choice must fit into one program, and {top_k} of {experts} experts in "
            f"{n_group} groups are asked for (at most {MOST_CHOICES} of {MOST_EXPERTS} in "
            f"{MOST_GROUPS})"
        )
    return refuse_dtypes(dtypes)


_OP = Op(
    "router",
    reference=reference.router,
    portable=portable.router,
    kernels=_kernels,
    refuse=_refusal,
    check=Check("grouped-negative", adapt="dense"),
)


@_OP.public
def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scaling_factor: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each token's experts and their weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Scores are `sigmoid(weight x)` in fp32 or wider. The bias moves only the choice: the `top_k`
    largest of score + bias, within the `topk_group` best groups (a group's value is the sum of its
    two largest). The weights are the plain scores of the chosen, divided by their sum if
    `norm_topk_prob`, times `scaling_factor`.

    Letters: T packed tokens, D width, E experts, K = top_k.

    Args:
        x: `[T, D]`. weight: `[E, D]`. bias: `[E]`.
        impl: see `nemotron_v3.ops`.

    Returns:
        Weights `[T, K]` in fp32 or wider, differentiable in `x` and `weight`, and indices `[T, K]`
        int64 in no particular order.

    Raises:
        ValueError: shapes that do not fit, or more choices than the experts allow.
    """
    experts = weight.shape[0]
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or tuple(bias.shape) != (experts,):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not "
            "fit: (tokens, width), (experts, width), (experts,)"
        )
    if experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(
            f"{experts} experts cannot be cut into n_group={n_group} groups of which "
            f"topk_group={topk_group} are kept"
        )
    if not 1 <= top_k <= experts // n_group * topk_group:
        raise ValueError(
            f"top_k={top_k} experts cannot be chosen among {experts // n_group * topk_group}"
        )
    run = _OP.pick(impl, (x, weight), experts, top_k, n_group)
    results = run(
        x,
        weight,
        bias,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        scaling_factor=scaling_factor,
    )
    return as_promised(results, WIDE[x.dtype], torch.int64)


def choose_experts(
    scores: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`router` from its scores `[T, E]` on, for a caller who has made these: in plain PyTorch."""
    return portable.choose(
        scores,
        bias,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        scaling_factor=scaling_factor,
    )
