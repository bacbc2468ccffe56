"""The two norms: before each block, and inside the Mamba-2 mixer."""

import torch
from torch import Tensor, nn

from nemotron_v3 import ops
from nemotron_v3.config import BackendConfig
from nemotron_v3.layers.decode_weights import NormWeights
from nemotron_v3.layers.inputs import check_size, refuse_other_than_floats
from nemotron_v3.layers.transformer_engine import TERMSNorm


class NemotronV3RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` (Zhang & Sennrich 2019), cast to the weight's dtype.

    The output has the weight's dtype, not the input's: an fp32 residual stream enters a bf16 mixer
    through it.

    Args:
        hidden_size: D.
        eps: added to the mean square.
        dtype: of the weight; None is torch's default.
        backend: its `rms_norm` and `impl` choose what runs: `"auto"` the op as `impl` says,
            `"torch"` its portable form, `"te"` Transformer Engine's norm.

    Raises:
        ModuleNotFoundError: `rms_norm="te"` where Transformer Engine is not installed.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dtype: torch.dtype | None = None,
        backend: BackendConfig | None = None,
    ):
        super().__init__()
        self.backend: BackendConfig = backend or BackendConfig()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.variance_epsilon = eps
        self.te_norm: TERMSNorm | None = (
            TERMSNorm(self.weight, eps) if self.backend.rms_norm == "te" else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` of any float dtype -> `[..., D]` in the weight's dtype."""
        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            refuse_other_than_floats(hidden_states)
        weight, backend = self.weight, self.backend
        if self.te_norm is not None:
            return self.te_norm(hidden_states, weight)
        impl = "portable" if backend.rms_norm == "torch" else backend.impl
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon, weight.dtype, impl=impl)

    def decode_weights(self) -> NormWeights:
        """What a decode step reads."""
        return NormWeights(self.weight.detach(), self.variance_epsilon)

    def reset_parameters(self) -> None:
        """The weight is ones again, as `torch.nn.RMSNorm` has it."""
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class NemotronV3MambaRMSNormGated(nn.Module):
    """Gate with `silu(gate)` first, then normalise each group of channels by its own RMS (Mamba-2).

    Args:
        hidden_size: D, the mixer's inner width.
        group_size: channels that share one RMS; divides D.
        eps: added to the mean square.

    Raises:
        ValueError: `group_size` does not divide `hidden_size`.
    """

    def __init__(self, hidden_size: int, group_size: int, eps: float = 1e-05):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("group_size", group_size)
        if hidden_size % group_size:
            raise ValueError(
                f"group_size {group_size} does not divide hidden_size {hidden_size}: it is the "
                "inner width divided by n_groups"
            )
        self.weight: nn.Parameter = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps
        self.group_size = group_size

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """`[..., D]` and a gate like it, or None -> `[..., D]` in `hidden_states`' dtype."""
        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            refuse_other_than_floats(hidden_states)
        return ops.gated_rms_norm(
            hidden_states, gate, self.weight, self.group_size, self.variance_epsilon
        )

    def decode_weights(self) -> NormWeights:
        """What a decode step reads."""
        return NormWeights(self.weight.detach(), self.variance_epsilon)

    def reset_parameters(self) -> None:
        """The weight is ones again."""
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, group_size={self.group_size}, eps={self.variance_epsilon}"
