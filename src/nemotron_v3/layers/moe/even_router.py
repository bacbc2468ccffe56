"""A router that spreads tokens evenly, for benchmarks.

Letters: T packed tokens, D hidden size, E experts, K experts a token.
"""

import functools
import logging

import torch
from torch import Tensor

from nemotron_v3.config import MoEConfig
from nemotron_v3.layers.fp32_params import at_least_fp32
from nemotron_v3.layers.moe.router import NemotronV3Router

_log = logging.getLogger("nemotron_v3")


class EvenRouter(NemotronV3Router):
    """Token t's k-th choice is expert `(t K + k) mod E`, with weight `1 / K`, unscaled.

    t counts the real tokens of a call. The parameters of a router are there, frozen, so that
    checkpoints and wrappers for several processes go on working; nothing is computed with them.
    """

    def __init__(self, config: MoEConfig, dtype: torch.dtype | None, impl: str):
        super().__init__(config, dtype, impl)
        self.weight.requires_grad_(False)
        _say_once()

    @property
    def is_plain(self) -> bool:
        return False

    def weights_of(self, x: Tensor, indices: Tensor) -> Tensor:
        """`1 / K` each, whichever experts the tokens have."""
        dtype = at_least_fp32(x.dtype)
        return torch.full(indices.shape, 1 / self.top_k, dtype=dtype, device=x.device)

    def _by_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        choices = torch.arange(len(x) * self.top_k, device=x.device)
        indices = (choices % len(self.weight)).view(-1, self.top_k)
        return self.weights_of(x, indices), indices


@functools.cache
def _say_once() -> None:
    _log.warning(
        "fake_balanced_gate: tokens are spread evenly over the experts, whatever the router says; "
        "for benchmarks alone"
    )
