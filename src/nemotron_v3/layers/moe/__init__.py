"""The mixture-of-experts layer: its router, experts and dispatcher, and what observes them."""

from nemotron_v3.layers.moe.experts import NemotronV3Experts
from nemotron_v3.layers.moe.moe import NemotronV3MoE
from nemotron_v3.layers.moe.router import NemotronV3Router

__all__ = ["NemotronV3Experts", "NemotronV3MoE", "NemotronV3Router"]
