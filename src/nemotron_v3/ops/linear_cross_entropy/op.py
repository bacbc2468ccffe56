"""The public loss of a linear head: from hidden states, without all their logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from nemotron_v3.ops.common.host import refuse_mixed
from nemotron_v3.ops.common.precision import (
    WIDE,
    as_promised,
    autocast_matmul_dtype,
)
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.common.targets import IGNORE_INDEX, refuse_outside
from nemotron_v3.ops.linear_cross_entropy import portable, reference
from nemotron_v3.ops.registry import Op


def _loss_kernels() -> Callable[..., Any]:
    from nemotron_v3.ops.linear_cross_entropy.kernels import linear_cross_entropy

    return linear_cross_entropy


def _log_probability_kernels() -> Callable[..., Any]:
    from nemotron_v3.ops.linear_cross_entropy.kernels import linear_log_probabilities

    return linear_log_probabilities


_LOSS = Op(
    "linear_cross_entropy",
    reference=reference.linear_cross_entropy,
    portable=portable.linear_cross_entropy,
    kernels=_loss_kernels,
    refuse=refuse_mixed,
    check=Check("some-ignored"),
)
_LOG_PROBABILITIES = Op(
    "linear_log_probabilities",
    reference=reference.linear_log_probabilities,
    portable=portable.linear_log_probabilities,
    kernels=_log_probability_kernels,
    refuse=refuse_mixed,
)


class TokenLosses(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        loss: a scalar, differentiable.
        log_probabilities: `[T]`, of each token's target; 0 where there is none. No gradient.
        log_normalizers: `[T]`, the logarithm of the sum of the exponentials of a token's logits; 0
            where there is no target. No gradient.
    """

    loss: Tensor
    log_probabilities: Tensor
    log_normalizers: Tensor


@_LOSS.public
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    per_token: bool = False,
    impl: str = "auto",
) -> Tensor | TokenLosses:
    """`cross_entropy(hidden weight^T, targets)`, a chunk of tokens at a time, in nats.

    The mean over the n targets that count of `-log p[target] + z_loss log(Z)^2`, where Z is the sum
    of the exponentials of a token's logits (z-loss: Chowdhery et al. 2022, arXiv 2204.02311). The
    gradients are made together with the loss, which is why it cannot be differentiated twice.

    Letters: T packed tokens, D width, V vocabulary.

    Args:
        hidden: `[T, D]`; under autocast it and the weight take part in the autocast dtype.
        weight: `[V, D]` in the dtype of `hidden`; a tied embedding matrix is one too.
        targets: `[T]` int64 in [0, V); `ignore_index` does not count.
        z_loss: weight of the squared log-normaliser; 0 leaves it out.
        per_token: return `TokenLosses`.
        impl: see `nemotron_v3.ops`.

    Returns:
        A scalar in fp32 or wider; 0, with zero gradients, where no target counts.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        IndexError: on a CPU, a target outside the vocabulary. On a GPU nothing is read back: that
            token's log-probability is NaN, and so is the loss.
    """
    hidden, weight = _checked(hidden, weight, targets, ignore_index)
    options = {"ignore_index": ignore_index, "z_loss": z_loss, "per_token": per_token}
    results = _LOSS.pick(impl, (hidden, weight))(hidden, weight, targets, **options)
    dtype = WIDE[hidden.dtype]
    if not per_token:
        return results.to(dtype)
    return TokenLosses(*as_promised(results, dtype, dtype, dtype))


@_LOG_PROBABILITIES.public
def linear_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and log-normalisers, each token with a gradient of its own.

    For what is more than a mean: weights a token, ratios of two policies. The backward pass
    computes the logits a second time; where the mean is wanted, `linear_cross_entropy` is a quarter
    cheaper.

    Args:
        hidden, weight, targets, ignore_index, impl: see `linear_cross_entropy`.

    Returns:
        Two `[T]` in fp32 or wider, in nats; 0 and 0 where there is no target.

    Raises:
        ValueError, IndexError: see `linear_cross_entropy`.
    """
    hidden, weight = _checked(hidden, weight, targets, ignore_index)
    run = _LOG_PROBABILITIES.pick(impl, (hidden, weight))
    results = run(hidden, weight, targets, ignore_index=ignore_index)
    dtype = WIDE[hidden.dtype]
    return as_promised(results, dtype, dtype)


def _checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Hidden states and weight in the dtype in which they are multiplied."""
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or tuple(targets.shape) != tuple(hidden.shape[:1])
    ):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit: (tokens, width), (vocabulary, width), (tokens,)"
        )
    refuse_outside(targets, weight.shape[0], ignore_index)
    dtype = autocast_matmul_dtype(hidden)
    if dtype == hidden.dtype and weight.dtype != dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and the weight {weight.dtype}: cast one to the other's dtype"
        )
    return hidden.to(dtype), weight.to(dtype)
