"""The choice of one token a slot in Triton, without sorting a vocabulary (README.md)."""

from nemotron_v3.ops.sampling.kernels.launch import sample

__all__ = ["sample"]
