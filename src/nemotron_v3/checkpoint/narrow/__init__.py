"""Weights that a checkpoint holds in 8 or 4 bits: found, checked, and given their values."""

from nemotron_v3.checkpoint.narrow.layouts import Narrow, StoredNarrow, find_narrow

__all__ = ["Narrow", "StoredNarrow", "find_narrow"]
