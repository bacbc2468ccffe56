"""The public squared rectifier."""

from collections.abc import Callable

from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.registry import Op
from nemotron_v3.ops.relu2 import portable, reference


def _kernels() -> Callable[..., Tensor]:
    from nemotron_v3.ops.relu2.kernels import relu2

    return relu2


_OP = Op(
    "relu2",
    reference=reference.relu2,
    portable=portable.relu2,
    kernels=_kernels,
    refuse=refuse_dtypes,
)


@_OP.public
def relu2(x: Tensor, *, impl: str = "auto") -> Tensor:
    """`relu(x)^2` (So et al. 2021, "Primer", arXiv 2109.08668).

    Args:
        x: any shape.
        impl: see `nemotron_v3.ops`.

    Returns:
        The shape and dtype of `x`.
    """
    return _OP.pick(impl, (x,))(x).to(x.dtype)
