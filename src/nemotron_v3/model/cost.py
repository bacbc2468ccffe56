"""What a model costs: parameters, FLOPs, bytes of state and of a checkpoint, from its config alone.

Letters: D hidden size; mamba: H heads, P head width, G groups, N state, Q chunk, W conv width;
MoE: E experts, K chosen per token, F expert width, X width the experts work at (the latent size,
or D).

One multiplication and addition are two FLOPs; training costs three forward passes. Norms,
activations, the embedding lookup and the choice of experts are left out, as usual.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from nemotron_v3.config import NemotronV3Config

TRAINING_OVER_FORWARD = 3  # the backward pass multiplies by the weights and by the activations


@dataclass(frozen=True)
class Weight:
    """Tensors of one shape as a checkpoint holds them, and how many of them a token passes."""

    name: str
    shape: tuple[int, ...]
    copies: int = 1
    used: int = 1
    fp32_on_disk: bool = False

    @property
    def parameters(self) -> int:
        """Elements of all copies."""
        return self.copies * prod(self.shape)

    @property
    def active(self) -> int:
        """Elements of the copies that a token passes."""
        return self.used * prod(self.shape)

    @property
    def flops(self) -> int:
        """Forward FLOPs a token: of matrices and the convolution, vectors are left out."""
        return 2 * self.active if len(self.shape) > 1 else 0


@dataclass(frozen=True)
class Parameters:
    """Sizes as published: the router's correction bias counts, multi-token prediction does not."""

    total: int
    with_mtp: int
    active: int  # what one token passes, all of the embedding and the head included
    active_without_embedding: int


# ---------------------------------------------------------------------------------------- weights


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (rows, columns))
    if bias:
        yield Weight(f"{name}.bias", (rows,))


def _mamba(config: NemotronV3Config) -> Iterator[Weight]:
    D, inner, heads = config.hidden_size, config.mamba_intermediate_size, config.mamba_num_heads
    yield from _linear("in_proj", config.in_proj_size, D, config.use_bias)
    yield Weight("conv1d.weight", (config.conv_dim, 1, config.conv_kernel))
    if config.use_conv_bias:
        yield Weight("conv1d.bias", (config.conv_dim,))
    for name in ("A_log", "D", "dt_bias"):
        yield Weight(name, (heads,))
    yield Weight("norm.weight", (inner,))
    yield from _linear("out_proj", D, inner, config.use_bias)


def _attention(config: NemotronV3Config) -> Iterator[Weight]:
    D, bias = config.hidden_size, config.attention_bias
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        yield from _linear(name, rows, D, bias)
    yield from _linear("o_proj", D, q, bias)


def _mlp(config: NemotronV3Config) -> Iterator[Weight]:
    yield from _linear("up_proj", config.intermediate_size, config.hidden_size, config.mlp_bias)
    yield from _linear("down_proj", config.hidden_size, config.intermediate_size, config.mlp_bias)


def _moe(config: NemotronV3Config) -> Iterator[Weight]:
    D, E, K = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    F, shared = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
    X, bias = config.moe_latent_size or D, config.mlp_bias
    yield Weight("gate.weight", (E, D))
    yield Weight("gate.e_score_correction_bias", (E,), fp32_on_disk=True)
    yield Weight("experts.up_proj.weight", (F, X), copies=E, used=K)
    yield Weight("experts.down_proj.weight", (X, F), copies=E, used=K)
    yield from _linear("shared_experts.up_proj", shared, D, bias)
    yield from _linear("shared_experts.down_proj", D, shared, bias)
    if config.moe_latent_size is not None:
        yield from _linear("fc1_latent_proj", X, D, bias)
        yield from _linear("fc2_latent_proj", D, X, bias)


def _scan_flops(config: NemotronV3Config, seq_len: float) -> float:
    """Of the recurrence: 7 a state element, the convention that published figures follow.

    The chunked algorithm's own count is 2Q(GN + HP) + 4HPN for a chunk of Q: 6.5 a state element
    for the released 30B, and less where the upper triangle of a chunk is skipped.
    """
    return 7 * config.mamba_intermediate_size * config.ssm_state_size


def _pair_flops(config: NemotronV3Config, seq_len: float) -> float:
    """Scores and values are 2 x 2 FLOPs a pair; a token sees half the sequence on average."""
    return 2 * config.num_attention_heads * config.head_dim * seq_len


def _no_flops(config: NemotronV3Config, seq_len: float) -> float:
    return 0


class MixerCost(NamedTuple):
    """What a mixer costs: its weights, and forward FLOPs a token besides theirs in a causal
    sequence of some length."""

    weights: Callable[[NemotronV3Config], Iterator[Weight]]
    more_flops: Callable[[NemotronV3Config, float], float] = _no_flops


# By block type.
COSTS = {
    "mamba": MixerCost(_mamba, _scan_flops),
    "attention": MixerCost(_attention, _pair_flops),
    "mlp": MixerCost(_mlp),
    "moe": MixerCost(_moe),
}


def block_weights(config: NemotronV3Config, block_type: str) -> list[Weight]:
    """The weights of one block, its norm and its mixer; `config` is that of the block where blocks
    have sizes of their own (`NemotronV3Config.of_block`)."""
    return [Weight("norm.weight", (config.hidden_size,)), *COSTS[block_type].weights(config)]


def _embedding(config: NemotronV3Config) -> Weight:
    return Weight("embeddings.weight", (config.vocab_size, config.hidden_size))


def _head(config: NemotronV3Config) -> Weight:
    return Weight("lm_head.weight", (config.vocab_size, config.hidden_size))


def _eh_proj(config: NemotronV3Config) -> Weight:
    return Weight("eh_proj.weight", (config.hidden_size, 2 * config.hidden_size))


def model_weights(config: NemotronV3Config) -> list[Weight]:
    """The weights of the model without multi-token prediction."""
    weights = [_embedding(config), Weight("norm_f.weight", (config.hidden_size,))]
    for index, block in enumerate(config.layers_block_type):
        weights += block_weights(config.of_block(index), block)
    return weights if config.tie_word_embeddings else [*weights, _head(config)]


def mtp_weights(config: NemotronV3Config) -> list[Weight]:
    """The weights of multi-token prediction; it shares the model's embedding and head."""
    D = config.hidden_size
    depth = [Weight(f"{name}.weight", (D,)) for name in ("enorm", "hnorm", "final_layernorm")]
    depth.append(_eh_proj(config))
    for index, block in enumerate(config.mtp_layers_block_type):
        depth += block_weights(config.of_mtp_block(index), block)
    return depth * config.num_nextn_predict_layers


# ----------------------------------------------------------------------------- parameters and bytes


def parameters(config: NemotronV3Config) -> Parameters:
    """How many parameters the model has, and how many of them one token passes."""
    weights = model_weights(config)
    total = sum(weight.parameters for weight in weights)
    active = sum(weight.active for weight in weights)
    # A tied embedding is the head too, and a head is passed.
    lookup_only = 0 if config.tie_word_embeddings else _embedding(config).parameters
    return Parameters(
        total=total,
        with_mtp=total + sum(weight.parameters for weight in mtp_weights(config)),
        active=active,
        active_without_embedding=active - lookup_only,
    )


def checkpoint_tensors(config: NemotronV3Config) -> int:
    """How many tensors a checkpoint holds: one an expert, multi-token prediction included."""
    return sum(weight.copies for weight in model_weights(config) + mtp_weights(config))


def checkpoint_bytes(config: NemotronV3Config, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's tensors in `dtype`, multi-token prediction included.

    The router's correction bias is stored in fp32 at least, as released files have it.
    """
    return sum(
        weight.parameters * (max(dtype.itemsize, 4) if weight.fp32_on_disk else dtype.itemsize)
        for weight in model_weights(config) + mtp_weights(config)
    )


def kv_bytes_per_token(config: NemotronV3Config, dtype: torch.dtype) -> int:
    """Bytes of keys and values that attention keeps for each token, in all layers."""
    layers = config.layers_block_type.count("attention")
    return layers * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


def ssm_state_bytes(config: NemotronV3Config) -> int:
    """Bytes of SSM state a sequence, in all layers, in `mamba_ssm_cache_dtype`; any length."""
    layers = config.layers_block_type.count("mamba")
    elements = layers * config.mamba_intermediate_size * config.ssm_state_size
    return elements * config.mamba_ssm_cache_dtype.itemsize


def conv_state_bytes(config: NemotronV3Config, dtype: torch.dtype) -> int:
    """Bytes of convolution state (the last W inputs) a sequence, in all layers; any length."""
    layers = config.layers_block_type.count("mamba")
    return layers * config.conv_dim * config.conv_kernel * dtype.itemsize


# ------------------------------------------------------------------------------------------- FLOPs


def block_flops(config: NemotronV3Config, block_type: str, seq_len: float) -> float:
    """Forward FLOPs a token of one block in a causal sequence of `seq_len` tokens."""
    flops = sum(weight.flops for weight in block_weights(config, block_type))
    return flops + COSTS[block_type].more_flops(config, seq_len)


def forward_flops(config: NemotronV3Config, seq_len: float) -> float:
    """Forward FLOPs a token in a causal sequence, multi-token prediction not included.

    `seq_len` of packed documents is the sum of their squared lengths over the sum of their lengths.
    Raises `ValueError` for a length below 1.
    """
    _check_length(seq_len)
    blocks = sum(
        block_flops(config.of_block(index), block, seq_len)
        for index, block in enumerate(config.layers_block_type)
    )
    return blocks + _head(config).flops


def training_flops(config: NemotronV3Config, seq_len: float) -> float:
    """Forward and backward FLOPs a token, recomputation and multi-token prediction not included."""
    return TRAINING_OVER_FORWARD * forward_flops(config, seq_len)


def _check_length(seq_len: float) -> None:
    if not seq_len >= 1:
        raise ValueError(f"seq_len is {seq_len}: give at least 1 token")
