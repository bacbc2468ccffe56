"""Projections of a few rows: `skinny_linear` (README.md)."""

from nemotron_v3.ops.common.low_rank import LowRank
from nemotron_v3.ops.skinny_linear.norm import Norm
from nemotron_v3.ops.skinny_linear.op import skinny_linear

__all__ = ["LowRank", "Norm", "skinny_linear"]
