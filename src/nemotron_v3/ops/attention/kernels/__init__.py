"""Attention over documents of any lengths, in Triton, forward and backward."""

from nemotron_v3.ops.attention.kernels.registration import attention, cached_attention

__all__ = ["attention", "cached_attention"]
