"""The mixture of experts in a decode step: `decode_route`, then `decode_experts` (README.md)."""

from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.op import decode_experts, decode_route
from nemotron_v3.ops.decode_experts.weights import Router

__all__ = ["Buffers", "Router", "decode_experts", "decode_route"]
