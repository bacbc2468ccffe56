"""The mixture of experts in a decode step: `decode_route`, then `decode_experts` (README.md)."""

from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.op import decode_experts, decode_route
from nemotron_v3.ops.decode_experts.weights import Router, Updates

__all__ = ["Buffers", "Router", "Updates", "decode_experts", "decode_route"]
