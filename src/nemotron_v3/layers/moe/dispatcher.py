"""How routed tokens get to their experts and back.

Letters: T packed tokens, K experts a token, X width the experts see, R rows sent, L experts a row
is sent to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Sent(NamedTuple):
    """Rows where their experts are.

    Attributes:
        x: `[R, X]`.
        indices: `[R, L]` int64: numbers among the experts that are here.
        weights: `[R, L]`: of each expert's output in the sum of a row.
    """

    x: Tensor
    indices: Tensor
    weights: Tensor


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExpertDispatcher(Protocol):
    """Permute, compute, combine: what lies between a router and the sum over a token's experts.

    The layer calls the three in this order, once a forward pass, and knows nothing of where the
    experts are. `permute` brings tokens to their experts, `compute` applies those, `combine` brings
    the results back and adds up what a token has from several places. All are differentiable in
    `x` and `weights`. The sum over a token's experts is fp32 or wider.
    """

    def permute(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Sent, Any]:
        """`[T, X]`, `[T, K]`, `[T, K]` -> what the experts here compute, and the way back."""
        ...

    def compute(self, sent: Sent, experts: Experts) -> Tensor:
        """`[R, X]`: for each row the weighted sum of its experts' outputs.

        `experts` is the layer's module of the experts, called so that adapters and hooks on it act.
        """
        ...

    def combine(self, y: Tensor, way_back: Any) -> Tensor:
        """`[R, X]` -> `[T, X]`, each token's sum over all its experts."""
        ...


class LocalDispatcher:
    """All experts are here: gathering, products and the weighted sum are one op, `ops.experts`."""

    def permute(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Sent, None]:
        return Sent(x, indices, weights), None

    def compute(self, sent: Sent, experts: Experts) -> Tensor:
        return experts(*sent)

    def combine(self, y: Tensor, way_back: None) -> Tensor:
        return y
