"""The causal convolution in Triton: one pass over memory each way (README.md)."""

from nemotron_v3.ops.causal_conv1d.kernels.registration import causal_conv1d

__all__ = ["causal_conv1d"]
