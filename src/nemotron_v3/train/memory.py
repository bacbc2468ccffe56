"""What a run takes of a device's memory, by part, from its options alone.

Letters: T tokens that pass the model at once, D hidden size, F expert width, K experts a token, X
width the experts see, N state, Q chunk.
"""

from dataclasses import dataclass

import torch

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.model import cost
from nemotron_v3.model.dtypes import FP32_NAMES
from nemotron_v3.train.options import LoraOptions, TrainOptions

# Elements that the fused head and loss hold at once, in fp32 (ops/linear_cross_entropy).
HEAD_ELEMENTS = 2**26
# Elements that the optimiser updates at once, in fp32: weights, gradients, and what is rounded.
UPDATED = 2**26


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate(
    options: TrainOptions,
    config: NemotronV3Config,
    dtype: torch.dtype,
    processes: int,
    kernels: bool = True,
) -> Memory:
    """Of one of so many processes, each with a device of its own.

    `kernels` is whether experts run by kernels, as on a GPU, or by PyTorch's own operations.
    """
    shared = processes if options.parallel == "fsdp" else 1
    weights = _weight_bytes(config, dtype)
    adapters = lora_parameters(config, options.lora) if options.lora.rank else 0
    count = cost.parameters(config).total
    trained = adapters or count
    width = dtype.itemsize
    gradients = adapters * width if adapters else weights
    stacks = 1 if adapters else max(w.parameters for w in cost.model_weights(config))
    update = 3 * 4 * min(max(UPDATED, stacks // shared), trained // shared) if width < 4 else 0
    # Of a sharded model the largest block is whole at a time, with its gradient.
    largest = max(
        sum(w.parameters for w in cost.block_weights(config, b)) for b in config.layers_block_type
    )
    gathered = largest * width if shared > 1 else 0
    tokens = options.memory.rows_per_pass * options.data.tokens_per_row
    return Memory(
        weights=(weights + adapters * width) // shared + gathered,
        gradients=gradients // shared + (0 if adapters else gathered),
        optimizer=trained * _moments(options, width) // shared + update,
        activations=activation_bytes(
            config, tokens, width, options.memory.checkpoint_every, options.lora.rank, kernels
        ),
        logits=_logit_bytes(config, options, tokens, shared > 1),
    )


def lora_parameters(config: NemotronV3Config, options: LoraOptions) -> int:
    """Elements of the adapters."""
    from nemotron_v3.adapters import coverage, lora_targets

    targets = lora_targets(config, options.groups or None)
    return coverage(config, targets, rank=options.rank).adapter_parameters


def activation_bytes(
    config: NemotronV3Config,
    tokens: int,
    width: int,
    checkpoint_every: int,
    rank: int = 0,
    kernels: bool = True,
) -> int:
    """What the backward pass needs of the forward pass of so many tokens.

    Args:
        width: bytes of an element.
        checkpoint_every: recompute every nth block; 0 none.
        rank: of adapters beside the projections; each keeps its input too.
        kernels: as for `estimate`.
    """
    blocks = config.layers_block_type
    each = [_block_bytes(config, block, width, rank, kernels) for block in blocks]
    stream = config.hidden_size * (4 if config.residual_in_fp32 else width)
    kept, recomputed = 0, 0
    for number, size in enumerate(each):
        if checkpoint_every and number % checkpoint_every == 0:
            kept += stream
            recomputed = max(recomputed, size)
        else:
            kept += stream + size
    # Embeddings, the final norm and what goes into the head.
    return tokens * (kept + recomputed + 3 * stream)


def _block_bytes(config: NemotronV3Config, block: str, width: int, rank: int, kernels: bool) -> int:
    """Bytes a token that one block keeps beside the stream in front of it."""
    D = config.hidden_size
    own = {
        "mamba": _mamba_bytes,
        "attention": _attention_bytes,
        "mlp": lambda c, w: 2 * c.intermediate_size * w,
        "moe": _moe_bytes,
    }[block](config, width)
    if block == "moe" and not kernels:
        own += _chosen_rows_bytes(config, width)
    # The normed input, and what the adapters of two projections hold.
    return own + D * width + 4 * rank * width


def _mamba_bytes(config: NemotronV3Config, width: int) -> int:
    inner, N = config.mamba_intermediate_size, config.ssm_state_size
    heads, Q = config.mamba_num_heads, config.chunk_size
    # The projection; the convolved x, B, C; what comes out of the scan and of the gated norm; a
    # state each chunk and some scalars a head in fp32.
    wide = config.in_proj_size + config.conv_dim + 2 * inner
    return wide * width + 4 * (inner * N // Q + 4 * heads)


def _attention_bytes(config: NemotronV3Config, width: int) -> int:
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return (2 * q + 2 * kv) * width + 4 * config.num_attention_heads


def _moe_bytes(config: NemotronV3Config, width: int) -> int:
    K, F = config.num_experts_per_tok, config.moe_intermediate_size
    latent = config.moe_latent_size
    shared = 2 * config.moe_shared_expert_intermediate_size
    through = 2 * (latent or 0)
    # The router's scores in fp32; both widths of a chosen expert, and numbers and weights.
    return (K * F + shared + through) * width + 4 * config.n_routed_experts + 24 * K


def _chosen_rows_bytes(config: NemotronV3Config, width: int) -> int:
    """A row a choice, before and behind the experts and weighed, which kernels do not keep; and
    the activation beside what it is of."""
    X = config.moe_latent_size or config.hidden_size
    return config.num_experts_per_tok * (3 * X + config.moe_intermediate_size) * width


def _weight_bytes(config: NemotronV3Config, dtype: torch.dtype) -> int:
    names = tuple(FP32_NAMES)
    return sum(
        w.parameters * (max(4, dtype.itemsize) if w.name.endswith(names) else dtype.itemsize)
        for w in cost.model_weights(config)
    )


def _moments(options: TrainOptions, width: int) -> int:
    """Bytes a trained parameter, rounded up."""
    if options.optimizer.moments == "8bit":
        return 3  # a byte each, and a scale for 256 of them
    return 12 if width < 4 and options.optimizer.bf16_weights == "master" else 8


def _logit_bytes(
    config: NemotronV3Config, options: TrainOptions, tokens: int, sharded: bool
) -> int:
    logits = tokens * config.vocab_size
    if sharded or "head" in options.lora.groups:
        return logits * (2 + 4 + 4)  # the head is called as a module: all logits, and gradients
    return 4 * min(HEAD_ELEMENTS, logits)
