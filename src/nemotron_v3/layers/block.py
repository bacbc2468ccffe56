"""One block of the model: `x + mixer(norm(x))`."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import LongTensor, Tensor, nn

from nemotron_v3.config import (
    BackendConfig,
    MoEConfig,
    NemotronV3Config,
    canonical_block_type,
)
from nemotron_v3.layers.attention import NemotronV3Attention
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.init import place_on
from nemotron_v3.layers.inputs import grid_of
from nemotron_v3.layers.mamba2 import NemotronV3Mamba2Mixer
from nemotron_v3.layers.mlp import NemotronV3MLP
from nemotron_v3.layers.moe.moe import NemotronV3MoE
from nemotron_v3.layers.norm import NemotronV3RMSNorm


class NemotronV3Block(nn.Module):
    """A pre-norm residual block around one of the four mixers.

    Args:
        config: a `NemotronV3Config`, a transformers `NemotronHConfig`, or any object with those
            attributes; never changed.
        layer_idx: the block's number in the model.
        moe_config: a `MoEConfig` or a foreign object with its fields; None derives it from
            `config`.
        backend: a `BackendConfig` or a foreign object with its fields; None is the default one.
        block_type: `mamba`, `attention`, `mlp`, `moe` in any spelling; None reads it from
            `config.layers_block_type[layer_idx]`.

    Raises:
        ValueError: an unknown block type, or a layer number outside the model.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        moe_config: Any = None,
        backend: BackendConfig | None = None,
        block_type: str | None = None,
    ):
        super().__init__()
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
            raise TypeError(f"layer_idx is {layer_idx!r}: give the block's number in the model")
        if block_type is None:
            types = NemotronV3Config.from_any(config, "types").layers_block_type
            if not 0 <= layer_idx < len(types):
                raise ValueError(
                    f"layer_idx {layer_idx} is outside the model's {len(types)} "
                    "layers: give block_type for a block of its own"
                )
            block_type = types[layer_idx]
        part = canonical_block_type(block_type)
        if part == "moe" and moe_config is not None:
            part = "moe beside a moe_config"
        self.block_type: str = canonical_block_type(block_type)
        config = NemotronV3Config.from_any(config, "block", part)
        own = config.block_configs
        if 0 <= layer_idx < len(own) and own[layer_idx].block_type == self.block_type:
            config = config.of_block(layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32: bool = config.residual_in_fp32
        dtype = config.dtype
        if self.block_type == "moe":
            moe_config = MoEConfig.from_any(config if moe_config is None else moe_config)
            dtype = moe_config.dtype or dtype
        # The norm hands the stream over in the mixer's dtype, which is its weight's.
        self.norm: NemotronV3RMSNorm = NemotronV3RMSNorm(
            config.hidden_size,
            config.layer_norm_epsilon,
            dtype,
            BackendConfig.from_any(backend, "block"),
        )
        self.mixer: nn.Module = MIXERS[self.block_type].make(config, layer_idx, backend, moe_config)

    @property
    def layer_type(self) -> str:
        """`"full_attention"` for attention, the block type otherwise."""
        return "full_attention" if self.block_type == "attention" else self.block_type

    @property
    def self_attn(self) -> nn.Module:
        """The mixer, whatever its type: for code that looks for this name."""
        return self.mixer

    @property
    def mlp(self) -> nn.Module | None:
        """The mixer of a moe block, None otherwise: for code that looks for this name."""
        return self.mixer if self.block_type == "moe" else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: LongTensor | None = None,
        **attn_kwargs: Any,
    ) -> Tensor:
        """Add the mixer's output to the residual stream.

        Args:
            hidden_states: `[B, S, D]`, or `[T, D]` without a batch dimension.
            attention_mask: a padding mask, whose padding keeps its stream as it is and is in no
                gradient of a weight; attention also takes a 4-D mask, mlp and moe ignore one.
            past_key_values: a `NemotronHybridCache`: the tokens follow what it holds, and it is
                updated in place.
            cache_position: without effect: the cache knows the position of each row.
            **attn_kwargs: `layout`, `cu_seqlens`, `seq_idx` and the rest of
                `SequenceLayout.resolve`. In mlp and moe blocks offsets may end before the last
                token: what follows are real tokens too.

        Returns:
            The shape of `hidden_states`, in its dtype; in fp32 with `residual_in_fp32`.

        Raises:
            ValueError, TypeError: what the mixer raises.
        """
        context: ForwardContext | None = attn_kwargs.get("context")
        if context is None:
            kind = MIXERS[self.block_type]
            context = ForwardContext.enter(
                grid_of(hidden_states, self.config.hidden_size),
                hidden_states.device,
                attention_mask,
                past_key_values,
                attn_kwargs,
                layer_idx=None if kind.is_stateless else self.layer_idx,
                takes_4d_mask=kind.takes_4d_mask,
                is_stateless=kind.is_stateless,
                group=getattr(self.mixer, "token_group", None),
            )
            with context.writing():
                return NemotronV3Block.forward(self, hidden_states, context=context)
        if self.residual_in_fp32:
            hidden_states = hidden_states.to(
                torch.promote_types(hidden_states.dtype, torch.float32)
            )
        # Padding is in neither the norm nor the mixer, nor in any gradient of their weights.
        if context.has_padding:
            layout = context.on(hidden_states.device)
            x = self.norm(layout.pack(hidden_states))  # [T, D]
            within = context.packed()
            y = layout.unpack(self.mixer(x, layout=within.layout, context=within))
        else:
            y = self.mixer(self.norm(hidden_states), layout=context.layout, context=context)
        if y.dtype != hidden_states.dtype:  # the mixer's may be its own
            y = y.to(hidden_states.dtype)
        return hidden_states + y

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw the weights anew (the table of `nemotron_v3.layers.init.init_`).

        Args:
            buffer_device: move the block there first; from the meta device, None means the CPU.
        """
        place_on(self, buffer_device)
        nn.init.ones_(self.norm.weight)
        draw = cast(Callable[[int, bool], None], self.mixer.init_weights)
        draw(self.config.num_hidden_layers, self.config.rescale_prenorm_residual)


def _mamba(config: NemotronV3Config, layer_idx: int, backend: Any, moe_config: Any) -> nn.Module:
    return NemotronV3Mamba2Mixer(config, layer_idx, backend=backend)


def _attention(
    config: NemotronV3Config, layer_idx: int, backend: Any, moe_config: Any
) -> nn.Module:
    attention = NemotronV3Attention(config, backend)
    attention.layer_idx = layer_idx
    return attention


def _mlp(config: NemotronV3Config, layer_idx: int, backend: Any, moe_config: Any) -> nn.Module:
    return NemotronV3MLP.from_config(config, backend)


def _moe(
    config: NemotronV3Config, layer_idx: int, backend: Any, moe_config: MoEConfig
) -> nn.Module:
    if moe_config.dim != config.hidden_size:
        raise ValueError(
            f"moe_config.dim is {moe_config.dim}, the model's hidden_size {config.hidden_size}: "
            "they must be the same"
        )
    return NemotronV3MoE(
        moe_config,
        mlp_bias=config.mlp_bias,
        initializer_range=config.initializer_range,
        dtype=moe_config.dtype or config.dtype,
        backend=backend,
        num_hidden_layers=config.num_hidden_layers,
        rescale_prenorm_residual=config.rescale_prenorm_residual,
    )


class MixerKind(NamedTuple):
    """What a block has to know of its mixer.

    Attributes:
        make: `(config, layer_idx, backend, moe_config)` -> the mixer.
        is_stateless: it works token by token, without a state.
        takes_4d_mask: it takes a 4-D mask.
    """

    make: Callable[[NemotronV3Config, int, Any, Any], nn.Module]
    is_stateless: bool = False
    takes_4d_mask: bool = False


# By block type. Every mixer is called as `mixer(x, layout=context.layout, context=context)`: it
# reads the context, a hook on it finds the layout under its documented name.
MIXERS = {
    "mamba": MixerKind(_mamba),
    "attention": MixerKind(_attention, takes_4d_mask=True),
    "mlp": MixerKind(_mlp, is_stateless=True),
    "moe": MixerKind(_moe, is_stateless=True),
}
