"""How many rows of how many tokens a GPU's memory holds while steps are CUDA graphs."""

import torch

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.generation.graphs.graph import capacity_of, row_slots
from nemotron_v3.model import cost

# What is not of the model: the context of CUDA, its libraries, compiled kernels, and what a
# prefill's chunk takes on its way.
ASIDE = 3 << 30
# Of a row's activations in a step: projections, the choices' results, parts of attention.
OF_A_STEP = 2 << 20


def row_bytes(config: NemotronV3Config, dtype: torch.dtype, length: int) -> int:
    """Bytes that a row of at most `length` tokens takes besides the model.

    States, keys and values stand in the graph's buffers, which hold a power of two of tokens, and
    in the cache. Logits have fp32 numbers beside them where tokens are drawn.
    """
    states = cost.ssm_state_bytes(config) + cost.conv_state_bytes(config, dtype)
    tokens = cost.kv_bytes_per_token(config, dtype) * (capacity_of(length) + length)
    return 2 * states + tokens + config.vocab_size * (dtype.itemsize + 4) + OF_A_STEP


def rows_that_fit(config: NemotronV3Config, dtype: torch.dtype, length: int, memory: int) -> int:
    """The most rows of `length` tokens each that generate beside the model's weights.

    Args:
        dtype: of weights, keys and values.
        length: tokens of a row, its prompt included.
        memory: bytes of the GPU.

    Returns:
        A number of slots that a graph can have; 0 where not one row fits.
    """
    left = memory - ASIDE - cost.checkpoint_bytes(config, dtype)
    most = left // row_bytes(config, dtype, length)
    if most < 1:
        return 0
    if most >= 64:
        return most // 32 * 32
    fits = 1 << (most.bit_length() - 1)
    assert row_slots(fits) == fits, "a power of two is a number of slots"
    return fits
