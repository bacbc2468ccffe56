"""What a plan takes of each process: bytes of memory, and bytes sent in a pass.

Counted from a config, for training all weights; activations depend on what is recomputed and are
left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.cost import Weight, block_weights, model_weights
from nemotron_v3.parallel.plan import Plan, gathered_rows, sent_rows
from nemotron_v3.parallel.shares import Shares

# Dense weights of all blocks that stay gathered from the forward to the backward pass: a tenth of
# the memory of a GPU. Nano's are 3.0e9 bytes.
KEPT_BYTES = 2**33


@dataclass(frozen=True)
class PlanCosts:
    """Bytes, of one process.

    Attributes:
        weights, gradients, moments: what it holds of each.
        gathered: weights that are whole at once besides: the dense ones of all blocks, or those of
            the largest block where all are more than 8 GiB, and the head.
        experts: sent for the tokens of a forward and a backward pass, to experts and back.
        dense: sent for weights that are gathered, and for sums of gradients.
        embeddings: sent for rows of the embeddings, where those stay where they are.
        mixers: sent for the tokens of others behind a process's, by Mamba-2 mixers: states, and
            inputs of the convolution. Forward and backward; whatever the number of tokens.
        attention: sent of keys and values, likewise, and of their gradients.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int
    experts: int
    dense: int
    embeddings: int
    mixers: int
    attention: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.moments + self.gathered

    @property
    def sent(self) -> int:
        return self.experts + self.dense + self.embeddings + self.mixers + self.attention


def plan_costs(
    config: NemotronV3Config,
    plan: Plan,
    *,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    moments: float = 8.0,
) -> PlanCosts:
    """Of a plan with all sizes settled (`Plan.over`).

    Args:
        tokens: of each process in a pass; with `cp` above 1 they are its part of one document.
        dtype: of weights, activations, gradients and their sums.
        moments: bytes a parameter: 8 in fp32, 2.06 in 8 bits with a scale for 64 of them.

    Raises:
        ValueError: experts that the plan does not divide.
    """
    shard, sets, width = plan.set_size, plan.dp_replicate, dtype.itemsize
    if config.has_experts and config.n_routed_experts % plan.ep:
        raise ValueError(
            f"ep = {plan.ep} does not divide the {config.n_routed_experts} experts of a layer"
        )
    weights = model_weights(config)
    own = [w for w in weights if plan.ep > 1 and _is_expert(w)]
    even = config.vocab_size % shard == 0
    rows = sets == 1 and shard > 1 and even and not config.tie_word_embeddings
    table = config.vocab_size * config.hidden_size if rows else 0
    everything = sum(w.parameters for w in weights)
    expert = sum(w.parameters for w in own)
    dense = everything - expert - table
    sharers = shard // plan.ep
    held = everything // shard
    head = config.vocab_size * config.hidden_size
    # Gathered forward, and backward again unless they stay, as the head always does; then the sum,
    # of which each has a part.
    stay = 0 if config.tie_word_embeddings else head
    if _dense_of_blocks(config, plan, width) <= KEPT_BYTES:
        stay = dense
    travels = (3 * dense - stay) * (shard - 1) // shard
    travels += 3 * (expert // plan.ep) * (sharers - 1) // sharers
    travels += 2 * held * (sets - 1) // sets if sets > 1 else 0
    return PlanCosts(
        weights=held * width,
        gradients=held * width,
        moments=round(held * moments),
        gathered=gathered_bytes(config, plan, width) + head * width if shard > 1 else 0,
        experts=_rows_sent(config, plan, tokens) * width,
        dense=travels * width,
        embeddings=2 * tokens * config.hidden_size * (shard - 1) * width if rows else 0,
        mixers=_states_sent(config, plan, tokens, width),
        attention=_keys_sent(config, plan, tokens) * width,
    )


def _is_expert(weight: Weight) -> bool:
    return weight.name.startswith("experts.")


def gathered_bytes(config: NemotronV3Config, plan: Plan, width: int) -> int:
    """Of the blocks' weights that are whole at once where the plan has several processes.

    Args:
        width: bytes of a number.
    """
    rows, sharers = [0], plan.set_size // plan.ep
    dense = []
    for whole, own in _blocks(config, plan):
        dense.append(width * (whole - own))
        rows.append(width * own // plan.ep if sharers > 1 else 0)
    if sum(dense) <= KEPT_BYTES:
        return sum(dense) + max(rows)
    return max(own + other for own, other in zip(dense, rows[1:], strict=True))


def _dense_of_blocks(config: NemotronV3Config, plan: Plan, width: int) -> int:
    """Bytes of what blocks hold besides experts that are spread."""
    return sum(width * (whole - own) for whole, own in _blocks(config, plan))


def _blocks(config: NemotronV3Config, plan: Plan) -> Iterator[tuple[int, int]]:
    """Weights of each block, and those among them of experts that are spread."""
    for index, block in enumerate(config.layers_block_type):
        weights = block_weights(config.of_block(index), block)
        own = sum(w.parameters for w in weights if plan.ep > 1 and _is_expert(w))
        yield sum(w.parameters for w in weights), own


def _states_sent(config: NemotronV3Config, plan: Plan, tokens: int, width: int) -> int:
    """Bytes that a process sends to those it shares a document with, forward and backward."""
    mixers = config.layers_block_type.count("mamba")
    if plan.cp == 1 or not mixers:
        return 0
    layout = SequenceLayout.from_lengths([tokens * plan.cp])
    segments = len(Shares.of(layout, plan.cp, 0, plan.cp_layout).own)
    return mixers * mixer_bytes(config, width).sent(plan.cp, segments)


def _keys_sent(config: NemotronV3Config, plan: Plan, tokens: int) -> int:
    attends = config.layers_block_type.count("attention")
    return attends * gathered_keys(config, tokens, plan.cp)


def gathered_keys(config: NemotronV3Config, tokens: int, processes: int) -> int:
    """Elements that a process sends forward and backward for an attention layer: keys and values of
    its tokens to each other one, and to each the gradient of that one's."""
    return 2 * (processes - 1) * tokens * 2 * config.num_key_value_heads * config.head_dim


@dataclass(frozen=True)
class MixerBytes:
    """What a Mamba-2 mixer hands on of one segment of the tokens, whatever their number.

    Attributes:
        state: in the forward pass, the state and what a segment leaves of one before it.
        gradient: in the backward pass, the gradient of a state.
        halo: the last inputs of the convolution; as many for their gradient, to each process.
    """

    state: int
    gradient: int
    halo: int

    def sent(self, processes: int, segments: int) -> int:
        """Bytes that it sends: all to each other one, and to each its part of a gradient."""
        return (processes - 1) * segments * (self.state + self.gradient + 2 * self.halo)


def mixer_bytes(config: NemotronV3Config, width: int) -> MixerBytes:
    """Of a config, with activations of so many bytes an element; states are fp32 or wider."""
    H, wide = config.mamba_num_heads, max(4, width)
    state = H * config.mamba_head_dim * config.ssm_state_size
    halo = (config.conv_kernel - 1) * config.conv_dim
    return MixerBytes((state + H) * wide, state * wide, halo * width)


def _rows_sent(config: NemotronV3Config, plan: Plan, tokens: int) -> int:
    """Elements sent to experts and back, forward and backward."""
    if plan.ep == 1:
        return 0
    total = 0.0
    for index, block in enumerate(config.layers_block_type):
        if block == "moe":
            own = config.of_block(index)
            E, K = own.n_routed_experts, own.num_experts_per_tok
            gathers = plan.gathers(E, K)
            rows = gathered_rows(plan.ep) if gathers else sent_rows(E, K, plan.ep)
            total += 4 * tokens * rows * (own.moe_latent_size or own.hidden_size)
    return round(total)
