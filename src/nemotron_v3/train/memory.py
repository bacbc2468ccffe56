"""What a run takes of a device's memory, by part, from its options alone.

Letters: T tokens that pass the model at once, D hidden size, F expert width, K experts a token, X
width the experts see, N state, Q chunk.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.model import cost
from nemotron_v3.model.dtypes import FP32_NAMES
from nemotron_v3.parallel.costs import gathered_bytes
from nemotron_v3.parallel.plan import Plan
from nemotron_v3.train.muon import AT_ONCE
from nemotron_v3.train.options import LoraOptions, MemoryOptions, TrainOptions

# Elements that the fused head and loss hold at once, in fp32 (ops/linear_cross_entropy).
HEAD_ELEMENTS = 2**26
# Elements that the optimiser updates at once, in fp32: weights, gradients, and what is rounded.
UPDATED = 2**26
MARGIN = 0.92  # of a device's memory: the rest is kernels, fragments and other programs


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


def device_room(device: torch.device) -> int:
    """Bytes of a device's memory, shared evenly where several processes of a host have one; 0 where
    the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        bytes_ = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0
    return bytes_ // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable(options: MemoryOptions, room: int) -> float:
    """The bytes of a device's `room` that a run may fill."""
    return MARGIN * room if options.device_gib is None else options.device_gib * 2**30


def estimate(
    options: TrainOptions,
    config: NemotronV3Config,
    dtype: torch.dtype,
    processes: int,
    kernels: bool = True,
    room: int = 0,
) -> Memory:
    """Of one of so many processes, each with a device of its own.

    `kernels` is whether experts run by kernels, as on a GPU, or by PyTorch's own operations; `room`
    a device's bytes, which decide where blocks are recomputed by memory.
    """
    return _Run(options, config, dtype, processes, kernels).memory(
        recomputed_blocks(options, config, dtype, processes, kernels, room)
    )


def recomputed_blocks(
    options: TrainOptions,
    config: NemotronV3Config,
    dtype: torch.dtype,
    processes: int,
    kernels: bool = True,
    room: int = 0,
) -> tuple[int, ...]:
    """The numbers of the blocks that the backward pass computes again; arguments as `estimate`'s.

    By memory, those are kept first that take the most FLOPs for a byte, and the last ones of them:
    a block is recomputed when what the blocks behind it kept is gone.
    """
    every, blocks = options.memory.checkpoint_every, range(config.num_hidden_layers)
    if every != "auto":
        return tuple(blocks[::every]) if every else ()
    run = _Run(options, config, dtype, processes, kernels)
    limit = usable(options.memory, room)
    length = options.data.tokens_per_row
    values = [
        cost.block_flops(config.of_block(number), kind, length) / size
        for number, (kind, size) in enumerate(zip(config.layers_block_type, run.sizes, strict=True))
    ]
    recomputed = set(blocks)
    for number in sorted(blocks, key=lambda n: (-values[n], -n)):
        if run.memory(recomputed - {number}).total <= limit:
            recomputed.discard(number)
    return tuple(sorted(recomputed))


@dataclass(frozen=True)
class _Run:
    """What a run's memory is reckoned from."""

    options: TrainOptions
    config: NemotronV3Config
    dtype: torch.dtype
    processes: int
    kernels: bool

    def memory(self, recomputed: Collection[int]) -> Memory:
        """Where these blocks are recomputed."""
        fixed, update = self._fixed
        stream = _stream_bytes(self.config, self.dtype.itemsize)
        activations = self.passes * self.tokens * _held(self.sizes, stream, recomputed)
        # What the optimiser needs for an update comes where activations and logits were.
        more = max(0, update - activations - fixed.logits)
        return replace(fixed, optimizer=fixed.optimizer + more, activations=activations)

    @property
    def tokens(self) -> int:
        """Of a pass, that a process computes."""
        cp = self.options.plan.cp
        return -(-self.options.memory.rows_per_pass * self.options.data.tokens_per_row // cp)

    @property
    def passes(self) -> int:
        """How many batches are under way at once."""
        memory, rows = self.options.memory, self.options.data.rows
        return min(memory.passes_at_once, -(-rows // memory.rows_per_pass))

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes a token that each block keeps beside the stream in front of it."""
        rank, config, cp = self.options.lora.rank, self.config, self.options.plan.cp
        sizes = _sizes(config, self.dtype.itemsize, rank, self.kernels)
        if cp > 1:  # keys and values of all that comes before, at most of all tokens
            both = 2 * config.num_key_value_heads * config.head_dim * self.dtype.itemsize
            attends = [block == "attention" for block in config.layers_block_type]
            sizes = [n + cp * both * here for n, here in zip(sizes, attends, strict=True)]
        return sizes

    @cached_property
    def _fixed(self) -> tuple[Memory, int]:
        """All but activations, and what the optimiser needs for an update."""
        options, config = self.options, self.config
        shared = self.processes if options.parallel == "fsdp" else 1
        weights = _weight_bytes(config, self.dtype)
        adapters = lora_parameters(config, options.lora) if options.lora.rank else 0
        trained, width = adapters or cost.parameters(config).total, self.dtype.itemsize
        gradients = adapters * width if adapters else weights
        if self.passes > 1:  # each has its own, beside their sum
            gradients *= 1 + self.passes
        # Of a sharded model some weights are whole at a time, with their gradients.
        plan = Plan(**asdict(options.plan))
        gathered = gathered_bytes(config, plan.over(shared), width) if shared > 1 else 0
        fixed = Memory(
            weights=(weights + adapters * width) // shared + gathered,
            gradients=gradients // shared + (0 if adapters else gathered),
            optimizer=self._moments(trained) // shared,
            activations=0,
            logits=self.passes * _logit_bytes(config, options, self.tokens, shared > 1),
        )
        return fixed, self._update(trained, shared)

    def _moments(self, trained: int) -> int:
        """Bytes of the moments, and of fp32 copies, of so many parameters."""
        optimizer, width = self.options.optimizer, self.dtype.itemsize
        if optimizer.moments == "8bit":
            return 3 * trained  # a byte each, rounded up, and a scale for 256 of them
        master = 4 if width < 4 and optimizer.bf16_weights == "master" else 0
        one = sum(map(_matrix_elements, self._weights)) if optimizer.kind == "muon" else 0
        return (8 + master) * trained - 4 * one

    @cached_property
    def _weights(self) -> list[cost.Weight]:
        return cost.model_weights(self.config)

    def _update(self, trained: int, shared: int) -> int:
        if self.options.optimizer.kind == "muon":
            return self._made_orthogonal(shared)
        by_kernel = self.kernels and self.options.optimizer.moments == "float32"
        if self.dtype.itemsize >= 4 or by_kernel:
            return 0
        adapted = self.options.lora.rank
        stacks = 1 if adapted else max(w.parameters for w in self._weights)
        return 3 * 4 * min(max(UPDATED, stacks // shared), trained // shared)

    def _made_orthogonal(self, shared: int) -> int:
        """What an update by Muon needs, of the parameter where that is most: gradient, direction
        and update in fp32, and a part of them twice. A stack's matrices stay where they are."""
        sizes = ((_matrix_elements(w), w.copies) for w in self._weights)
        most = max(size // shared if copies > 1 else size for size, copies in sizes)
        return 4 * self.passes * (3 * most + 2 * min(AT_ONCE, most))


def lora_parameters(config: NemotronV3Config, options: LoraOptions) -> int:
    """Elements of the adapters."""
    from nemotron_v3.adapters import coverage, lora_targets

    targets = lora_targets(config, options.groups or None)
    return coverage(config, targets, rank=options.rank).adapter_parameters


def _held(each: Sequence[int], stream: int, recomputed: Collection[int]) -> int:
    """Bytes a token: of blocks, of the streams in front of them, and of one that is recomputed."""
    kept = sum(stream + (0 if n in recomputed else size) for n, size in enumerate(each))
    again = max((each[n] for n in recomputed), default=0)
    # Embeddings, the final norm and what goes into the head.
    return kept + again + 3 * stream


def _stream_bytes(config: NemotronV3Config, width: int) -> int:
    return config.hidden_size * (4 if config.residual_in_fp32 else width)


def _sizes(config: NemotronV3Config, width: int, rank: int, kernels: bool) -> list[int]:
    blocks = enumerate(config.layers_block_type)
    return [_block_bytes(config.of_block(n), block, width, rank, kernels) for n, block in blocks]


def _block_bytes(config: NemotronV3Config, block: str, width: int, rank: int, kernels: bool) -> int:
    """Bytes a token that one block keeps beside the stream in front of it."""
    D = config.hidden_size
    own = MIXER_BYTES[block](config, width)
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


def _mlp_bytes(config: NemotronV3Config, width: int) -> int:
    return 2 * config.intermediate_size * width


def _moe_bytes(config: NemotronV3Config, width: int) -> int:
    K, F = config.num_experts_per_tok, config.moe_intermediate_size
    latent = config.moe_latent_size
    shared = 2 * config.moe_shared_expert_intermediate_size
    through = 2 * (latent or 0)
    # The router's scores in fp32; both widths of a chosen expert, and numbers and weights.
    return (K * F + shared + through) * width + 4 * config.n_routed_experts + 24 * K


MIXER_BYTES: dict[str, Callable[[NemotronV3Config, int], int]] = {
    "mamba": _mamba_bytes,
    "attention": _attention_bytes,
    "mlp": _mlp_bytes,
    "moe": _moe_bytes,
}
"""Bytes a token that a mixer keeps for the backward pass, by block type: `(config, width)`."""


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


def _matrix_elements(weight: cost.Weight) -> int:
    """How many elements of a weight Muon moves."""
    others = ("embeddings", "lm_head", "conv1d", "gate")
    is_vector = len(weight.shape) < 2
    return 0 if is_vector or set(weight.name.split(".")) & {*others} else weight.parameters


def _logit_bytes(
    config: NemotronV3Config, options: TrainOptions, tokens: int, sharded: bool
) -> int:
    logits = tokens * config.vocab_size
    if sharded or "head" in options.lora.groups:
        return logits * (2 + 4 + 4)  # the head is called as a module: all logits, and gradients
    return 4 * min(HEAD_ELEMENTS, logits)
