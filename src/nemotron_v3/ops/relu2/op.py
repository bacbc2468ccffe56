"""The public squared rectifier."""

from collections.abc import Callable

from torch import Tensor

from nemotron_v3.ops._dispatch import Kernels, pick
from nemotron_v3.ops._triton import refuse_dtypes
from nemotron_v3.ops.relu2 import portable, reference


def relu2(x: Tensor, *, impl: str = "auto") -> Tensor:
    """`relu(x)^2` (So et al. 2021, "Primer", arXiv 2109.08668).

    Args:
        x: any shape.
        impl: see `nemotron_v3.ops`.

    Returns:
        The shape and dtype of `x`.
    """
    run = pick(
        "relu2",
        impl,
        reference=reference.relu2,
        portable=portable.relu2,
        triton=Kernels(_kernels, x.device, refuse_dtypes(x)),
    )
    return run(x).to(x.dtype)


def _kernels() -> Callable:
    from nemotron_v3.ops.relu2.kernels import relu2

    return relu2
