"""What a scan hands to other parts of its documents, and gets from them, while it runs.

Letters: n_docs pieces of documents, H heads, P head width, N state.
"""

from typing import Protocol

from torch import Tensor


class StateExchange(Protocol):
    """Between the sweep over the states and the scan of the tokens, once in each direction.

    A piece that goes on with a document begins with the state `I` that other parts of it end with.
    The sweep begins with 0 and gives `E^`; the state at a token is `S^ + e^s I`, where `s` sums the
    log-decays since the piece began. Backwards it is the same with the gradients of the states.
    """

    def before(self, ends: Tensor, decays: Tensor) -> Tensor:
        """The states that the pieces begin with, `[n_docs, H, P, N]`.

        Args:
            ends: `[n_docs, H, P, N]` in fp32 or wider, the states after the pieces if they began
                with 0.
            decays: `[n_docs, H]`, how much of a state before each piece is left after it.
        """
        ...

    def behind(self, starts: Tensor) -> Tensor:
        """The gradients of the states that the pieces end with, `[n_docs, H, P, N]`.

        Args:
            starts: of the states before the pieces, if nothing came of those behind them.
        """
        ...
