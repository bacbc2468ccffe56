"""The mathematics of the model, one function a piece, on packed tokens.

Every op takes `impl`: `"auto"` (the fastest form that can run here), `"reference"` (step by step,
in fp64: the truth that the others are held to), `"portable"` (plain PyTorch, any device) or
`"triton"` (raises where it cannot run).
"""

from nemotron_v3.ops.attention.op import attention
from nemotron_v3.ops.cached_attention.op import cached_attention
from nemotron_v3.ops.causal_conv1d.op import causal_conv1d
from nemotron_v3.ops.cross_entropy.op import cross_entropy, shift_labels
from nemotron_v3.ops.decode_attention.op import decode_attention
from nemotron_v3.ops.decode_mamba2.op import decode_mamba2
from nemotron_v3.ops.experts.op import experts
from nemotron_v3.ops.gated_rms_norm.op import gated_rms_norm
from nemotron_v3.ops.grouped_low_rank.op import (
    grouped_low_rank,
    merge_low_rank_,
    unmerge_low_rank_,
)
from nemotron_v3.ops.linear_cross_entropy.op import (
    TokenLosses,
    linear_cross_entropy,
    linear_log_probabilities,
)
from nemotron_v3.ops.mamba2.op import mamba2
from nemotron_v3.ops.mamba2_step.op import mamba2_step
from nemotron_v3.ops.relu2.op import relu2
from nemotron_v3.ops.rms_norm.op import rms_norm
from nemotron_v3.ops.router.op import router
from nemotron_v3.ops.sampling.op import sample
from nemotron_v3.ops.skinny_linear.op import skinny_linear
from nemotron_v3.ops.ssd.op import ssd
from nemotron_v3.ops.ssm_step.op import ssm_step

__all__ = [
    "TokenLosses",
    "attention",
    "cached_attention",
    "causal_conv1d",
    "cross_entropy",
    "decode_attention",
    "decode_mamba2",
    "experts",
    "gated_rms_norm",
    "grouped_low_rank",
    "linear_cross_entropy",
    "linear_log_probabilities",
    "mamba2",
    "mamba2_step",
    "merge_low_rank_",
    "relu2",
    "rms_norm",
    "router",
    "sample",
    "shift_labels",
    "skinny_linear",
    "ssd",
    "ssm_step",
    "unmerge_low_rank_",
]
