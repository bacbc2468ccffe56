"""Fresh states: what a row holds before its first token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemotron_v3.cache.states import KeyValueState, LayerState, MambaState
from nemotron_v3.config import NemotronV3Config


@dataclass(frozen=True)
class Sizes:
    """The sizes of a cache, as `NemotronHybridCache` takes them."""

    config: NemotronV3Config
    rows: int
    dtype: torch.dtype
    device: torch.device | str | None
    max_length: int | None
    window: int


def fresh_states(sizes: Sizes) -> dict[int, LayerState]:
    """Fresh states by layer number, for the layers that have one."""
    return {
        layer: make(sizes)
        for layer, block in enumerate(sizes.config.layers_block_type)
        if (make := STATES[block]) is not None
    }


def _key_value_state(sizes: Sizes) -> KeyValueState:
    config = sizes.config
    keys = torch.zeros(
        sizes.rows,
        config.num_key_value_heads,
        sizes.max_length or 0,
        config.head_dim,
        dtype=sizes.dtype,
        device=sizes.device,
    )
    return KeyValueState(keys, torch.zeros_like(keys))


def _mamba_state(sizes: Sizes) -> MambaState:
    config, rows, window = sizes.config, sizes.rows, sizes.window
    conv = (config.conv_dim, config.conv_kernel)
    ssm = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    exact = sizes.dtype == torch.float64  # a model in fp64 is there to be exact
    ssm_dtype = sizes.dtype if exact else config.mamba_ssm_cache_dtype
    return MambaState(
        torch.zeros(rows, *conv, dtype=sizes.dtype, device=sizes.device),
        torch.zeros(rows, *ssm, dtype=ssm_dtype, device=sizes.device),
        torch.zeros(rows, window, *conv, dtype=sizes.dtype, device=sizes.device),
        torch.zeros(rows, window, *ssm, dtype=ssm_dtype, device=sizes.device),
    )


# By block type: the state of a layer, None where it has none.
STATES: dict[str, Callable[[Sizes], LayerState] | None] = {
    "mamba": _mamba_state,
    "attention": _key_value_state,
    "mlp": None,
    "moe": None,
}
