"""The documented layers: one mixer of the paper a file."""

from nemotron_v3.layers.attention import NemotronV3Attention
from nemotron_v3.layers.block import NemotronV3Block
from nemotron_v3.layers.mamba2 import NemotronV3Mamba2Mixer
from nemotron_v3.layers.mlp import NemotronV3MLP
from nemotron_v3.layers.moe.dispatcher import ExpertDispatcher, LocalDispatcher
from nemotron_v3.layers.moe.experts import LowRankUpdates, NemotronV3Experts
from nemotron_v3.layers.moe.load_balancing import BalanceLoss, ExpertLoad, balance_
from nemotron_v3.layers.moe.moe import NemotronV3MoE
from nemotron_v3.layers.moe.router import checkpoint_contexts
from nemotron_v3.layers.moe.routing_replay import RoutingRecord, record_routing, replay_routing
from nemotron_v3.layers.norm import NemotronV3MambaRMSNormGated, NemotronV3RMSNorm

__all__ = [
    "BalanceLoss",
    "ExpertDispatcher",
    "ExpertLoad",
    "LocalDispatcher",
    "LowRankUpdates",
    "NemotronV3Attention",
    "NemotronV3Block",
    "NemotronV3Experts",
    "NemotronV3MLP",
    "NemotronV3Mamba2Mixer",
    "NemotronV3MambaRMSNormGated",
    "NemotronV3MoE",
    "NemotronV3RMSNorm",
    "RoutingRecord",
    "balance_",
    "checkpoint_contexts",
    "record_routing",
    "replay_routing",
]
