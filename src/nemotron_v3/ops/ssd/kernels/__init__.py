"""The scan in Triton: steps, states, outputs, and their gradients (docs/mamba2.md)."""

from nemotron_v3.ops.ssd.kernels.registration import ssd

__all__ = ["ssd"]
