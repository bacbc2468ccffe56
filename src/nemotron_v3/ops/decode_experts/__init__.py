"""The mixture of experts in a decode step: `route`, then `experts` (README.md)."""

from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.op import experts, route
from nemotron_v3.ops.decode_experts.weights import Router

__all__ = ["Buffers", "Router", "experts", "route"]
