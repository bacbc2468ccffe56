"""The interface to tokens outside the current pass: of earlier segments, or of other processes.

A document may be cut: into segments in time, of which a pass holds one, or into shares of several
processes. A layer that looks back then needs what lies before its tokens. It asks for it here, and
knows nothing of where the other tokens are.

Letters: T packed tokens of the pass, H query heads, J key/value heads, P head width.
"""

from typing import Any, Protocol

from torch import Tensor

from nemotron_v3.layers.functional import RecurrentState


class Carry(Protocol):
    """Of one pass; set on its `ForwardContext`."""

    def recurrent(self, mixer: Any) -> RecurrentState:
        """The states that a `NemotronV3Mamba2Mixer` begins with, and where those go that it ends
        with."""
        ...

    def attend(
        self, layer_idx: int | None, q: Tensor, k: Tensor, v: Tensor, *, impl: str
    ) -> Tensor:
        """Causal attention of the pass's tokens to all of their documents that comes before.

        Args:
            layer_idx: the layer's number in the model.
            q: `[T, H, P]`. k, v: `[T, J, P]`, of the pass's own tokens.
            impl: see `nemotron_v3.ops`.

        Returns:
            `[T, H, P]`.
        """
        ...
