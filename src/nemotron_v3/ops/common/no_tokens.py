"""What an op does for no token at all: keep its parameters in the graph."""

from torch import Tensor


def of_no_tokens(x: Tensor, *others: Tensor | None) -> Tensor:
    """`x`, with the others in its graph: each gets a gradient of zeros from it.

    A process that shares its parameters with others needs one for all of them in every step (DDP
    and FSDP wait for it), also where its part of a batch is all padding.
    """
    for other in others:
        if other is not None:
            x = x + other[:0].sum()
    return x
