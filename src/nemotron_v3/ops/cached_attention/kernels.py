"""Attention of new tokens to a cache in Triton: the kernels of `attention`, on other places."""

from nemotron_v3.ops.attention.kernels import cached_attention

__all__ = ["cached_attention"]
