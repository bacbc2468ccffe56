"""Projections of a few rows in Triton (README.md)."""

from nemotron_v3.ops.skinny_linear.kernels.launch import skinny_linear

__all__ = ["skinny_linear"]
