"""The mathematics of the model, one function a piece, on packed tokens.

Every op takes `impl`: `"auto"` (the fastest form that can run here), `"reference"` (step by step,
in fp64: the truth that the others are held to), `"portable"` (plain PyTorch, any device) or
`"triton"` (raises where it cannot run). `registry.py` holds the table of them.
"""

from nemotron_v3.ops.attention.op import attention as attention
from nemotron_v3.ops.cached_attention.op import cached_attention as cached_attention
from nemotron_v3.ops.causal_conv1d.op import causal_conv1d as causal_conv1d
from nemotron_v3.ops.cross_entropy.op import cross_entropy as cross_entropy
from nemotron_v3.ops.cross_entropy.op import shift_labels as shift_labels
from nemotron_v3.ops.decode_attention.op import decode_attention as decode_attention
from nemotron_v3.ops.decode_experts.op import decode_experts as decode_experts
from nemotron_v3.ops.decode_experts.op import decode_route as decode_route
from nemotron_v3.ops.decode_mamba2.op import decode_mamba2 as decode_mamba2
from nemotron_v3.ops.experts.op import experts as experts
from nemotron_v3.ops.gated_rms_norm.op import gated_rms_norm as gated_rms_norm
from nemotron_v3.ops.grouped_low_rank.op import grouped_low_rank as grouped_low_rank
from nemotron_v3.ops.grouped_low_rank.op import merge_low_rank_ as merge_low_rank_
from nemotron_v3.ops.grouped_low_rank.op import unmerge_low_rank_ as unmerge_low_rank_
from nemotron_v3.ops.linear_cross_entropy.op import TokenLosses as TokenLosses
from nemotron_v3.ops.linear_cross_entropy.op import linear_cross_entropy as linear_cross_entropy
from nemotron_v3.ops.linear_cross_entropy.op import (
    linear_log_probabilities as linear_log_probabilities,
)
from nemotron_v3.ops.low_rank_linear.op import low_rank_linear as low_rank_linear
from nemotron_v3.ops.mamba2.op import mamba2 as mamba2
from nemotron_v3.ops.mamba2_step.op import mamba2_step as mamba2_step
from nemotron_v3.ops.relu2.op import relu2 as relu2
from nemotron_v3.ops.rms_norm.op import rms_norm as rms_norm
from nemotron_v3.ops.router.op import choose_experts as choose_experts
from nemotron_v3.ops.router.op import router as router
from nemotron_v3.ops.sampling.op import sample as sample
from nemotron_v3.ops.skinny_linear.op import skinny_linear as skinny_linear
from nemotron_v3.ops.ssd.op import ssd as ssd
from nemotron_v3.ops.ssm_step.op import ssm_step as ssm_step
