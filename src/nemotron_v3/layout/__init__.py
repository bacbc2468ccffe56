"""How tokens lie: which document each belongs to, and where documents start."""

from nemotron_v3.layout import tree as tree  # registers the pytree
from nemotron_v3.layout.sequence import PADDING, SequenceLayout

__all__ = ["PADDING", "SequenceLayout"]
