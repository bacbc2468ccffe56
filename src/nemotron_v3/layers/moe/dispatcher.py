"""How routed tokens get to their experts and back.

Letters: T packed tokens, K experts a token, X width the experts see, R rows sent, L experts a row
is sent to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Dispatched(NamedTuple):
    """Rows where their experts are.

    Attributes:
        x: `[R, X]`.
        indices: `[R, L]` int64: numbers among the experts that are here; how many those are stands
            for one that is not.
        weights: `[R, L]`: of each expert's output in the sum of a row.
    """

    x: Tensor
    indices: Tensor
    weights: Tensor


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExpertDispatcher(Protocol):
    """Dispatch, compute, combine: what lies between a router and the sum over a token's experts.

    The layer calls the three in this order, once a forward pass, and knows nothing of where the
    experts are. `dispatch` brings tokens to their experts, `compute` applies those, `combine`
    brings the results back and adds up what a token has from several places. All are differentiable
    in `x` and `weights`. The sum over a token's experts is fp32 or wider. An object that knows
    `dispatch` by its former name, `permute`, is a dispatcher too. What `dispatch` returns goes to
    `compute` alone. Where a dispatcher has an attribute `arrives_later` that is true, tokens are
    still on their way then, and the layer computes its shared expert before it calls `compute`.
    """

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Any, Any]:
        """`[T, X]`, `[T, K]`, `[T, K]` -> what the experts here compute, and what
        `combine` needs to bring it back."""
        ...

    def compute(self, dispatched: Any, experts: Experts) -> Tensor:
        """`[R, X]`: for each row the weighted sum of its experts' outputs.

        `experts` is the layer's module of the experts, called so that adapters and hooks on it act.
        """
        ...

    def combine(self, y: Tensor, metadata: Any) -> Tensor:
        """`[R, X]` -> `[T, X]`, each token's sum over all its experts."""
        ...


class LocalDispatcher:
    """All experts are here: gathering, products and the weighted sum are one op, `ops.experts`."""

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Dispatched, None]:
        return self.permute(x, indices, weights)

    def permute(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Dispatched, None]:
        """The former name of `dispatch`, which a subclass may have in its own way."""
        return Dispatched(x, indices, weights), None

    def compute(self, dispatched: Dispatched, experts: Experts) -> Tensor:
        return experts(*dispatched)

    def combine(self, y: Tensor, metadata: None) -> Tensor:
        return y
