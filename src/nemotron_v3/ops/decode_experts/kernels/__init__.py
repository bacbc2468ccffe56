"""Routing and experts of a decode step in Triton (README.md)."""

from nemotron_v3.ops.decode_experts.kernels.launch import experts, route

__all__ = ["experts", "route"]
