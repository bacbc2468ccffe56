"""The router in Triton (README.md)."""

from nemotron_v3.ops.router.kernels.registration import router

__all__ = ["router"]
