"""The scan in Triton: steps, states, outputs, and their gradients (docs/design/mamba2.md)."""

from nemotron_v3.ops.ssd.kernels.registration import ssd

__all__ = ["ssd"]
