"""The experts' kernels: how rows are sorted, multiplied and joined again (README.md)."""

from nemotron_v3.ops.experts.kernels.registration import experts

__all__ = ["experts"]
