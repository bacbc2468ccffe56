"""The mixer's core in Triton: the kernels of its parts on the packed projection, in place."""

from nemotron_v3.ops.mamba2.kernels.registration import mamba2

__all__ = ["mamba2"]
