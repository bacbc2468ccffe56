"""The settings of a model: the fields of its `config.json`, and sizes that follow from them."""

import math
from dataclasses import InitVar

import torch

from nemotron_v3.config import values
from nemotron_v3.config.blocks import to_pattern
from nemotron_v3.config.puzzle import BlockConfig, entries
from nemotron_v3.config.spelling import converted, setting, settings_class

_COUNT = values.whole(1)
_SIZE = values.whole(0)
_FRACTION = values.number(0.0, below=1.0)
_POSITIVE = values.positive()
_NOT_NEGATIVE = values.number(0.0)


@settings_class
class ModelSettings:
    """The fields of `NemotronV3Config`, which reads, checks and writes them."""

    # Width and vocabulary
    vocab_size: int = setting(131072, _COUNT)
    hidden_size: int = setting(4096, _COUNT)
    tie_word_embeddings: bool = setting(False, values.flag)
    max_position_embeddings: int = setting(4096, _COUNT)

    # The blocks, in order: each is one of BLOCK_TYPES with its own norm and residual
    layers_block_type: tuple[str, ...] = converted(
        *("layer_types", "hybrid_override_pattern"),
        default=(),
        converter=values.blocks,
        fresh="hybrid_override_pattern",
    )

    # Attention (no positional encoding of any kind)
    num_attention_heads: int = setting(32, _COUNT)
    # None: each query head has its own
    num_key_value_heads: int = converted(default=8, converter=values.filled(_COUNT))
    head_dim: int = setting(128, _COUNT, "attention_head_dim")
    attention_bias: bool = setting(False, values.flag)
    attention_dropout: float = setting(0.0, _FRACTION)
    sliding_window: int | None = setting(None, values.optional(values.only(None)))

    # Mamba-2
    mamba_num_heads: int = setting(128, _COUNT)
    mamba_head_dim: int = setting(64, _COUNT)
    ssm_state_size: int = setting(128, _COUNT)
    n_groups: int = setting(8, _COUNT, "mamba_n_groups")
    conv_kernel: int = setting(4, _COUNT, "mamba_d_conv")
    chunk_size: int = setting(128, _COUNT, "mamba_chunk_size")
    mamba_hidden_act: str = setting("silu", values.choice("silu", "swish"))  # synonyms
    use_conv_bias: bool = setting(True, values.flag, "mamba_conv_bias")
    # Every implementation obeys use_bias; files hold mamba_proj_bias beside it without effect.
    use_bias: bool = setting(False, values.flag, yielding=("mamba_proj_bias",))
    time_step_min: float = setting(0.001, _POSITIVE, "mamba_dt_min")
    time_step_max: float = setting(0.1, _POSITIVE, "mamba_dt_max")
    time_step_floor: float = setting(1e-4, _POSITIVE, "mamba_dt_init_floor")
    time_step_limit: tuple[float, float] = setting(
        (0.0, math.inf), values.limit, "mamba_dt_limit", group="if changed"
    )
    mamba_ssm_cache_dtype: torch.dtype = converted(default=torch.float32, converter=values.dtype)

    # MLP: down(relu(up(x))^2)
    intermediate_size: int = setting(21504, _COUNT)
    mlp_hidden_act: str = setting("relu2", values.choice("relu2"))
    mlp_bias: bool = setting(False, values.flag)

    # Mixture of experts; n_routed_experts 0 means there is none
    n_routed_experts: int = setting(0, _SIZE, "num_local_experts", group="moe")
    n_shared_experts: int = setting(1, _SIZE, group="moe")
    num_experts_per_tok: int = setting(2, _COUNT, group="moe")
    moe_intermediate_size: int = setting(0, _SIZE, group="moe")
    moe_shared_expert_intermediate_size: int = setting(0, _SIZE, group="moe")
    moe_latent_size: int | None = setting(None, values.optional(_COUNT), group="moe")
    moe_shared_expert_overlap: bool = setting(True, values.flag, group="moe")
    n_group: int = setting(1, _COUNT, group="moe")
    topk_group: int = setting(1, _COUNT, group="moe")
    norm_topk_prob: bool = setting(True, values.flag, group="moe")
    routed_scaling_factor: float = setting(1.0, values.number(), group="moe")

    # Multi-token prediction; num_nextn_predict_layers 0 means there is none
    num_nextn_predict_layers: int = setting(0, _SIZE, group="mtp")
    mtp_layers_block_type: tuple[str, ...] = converted(
        "mtp_hybrid_override_pattern",
        default=("attention", "moe"),
        converter=values.blocks,
        fresh="mtp_hybrid_override_pattern",
        group="mtp",
    )

    # Sizes of single blocks; empty where all blocks of a type are alike
    block_configs: tuple[BlockConfig, ...] = converted(
        default=(), converter=entries, group="if changed"
    )
    mtp_block_configs: tuple[BlockConfig, ...] = converted(
        default=(), converter=entries, group="if changed"
    )

    # Norms, residual stream, initialisation
    layer_norm_epsilon: float = setting(1e-5, _NOT_NEGATIVE, "norm_eps", "rms_norm_eps")
    residual_in_fp32: bool = setting(False, values.flag)
    rescale_prenorm_residual: bool = setting(True, values.flag)
    initializer_range: float = setting(0.02, _NOT_NEGATIVE)
    hidden_dropout: float = setting(0.0, values.only(0.0))  # no implementation applies it

    # Generation and storage
    pad_token_id: int | None = setting(0, values.token_id)
    bos_token_id: int | None = setting(1, values.token_id)
    eos_token_id: int | list[int] | None = setting(2, values.token_ids, hashed=False)
    use_cache: bool = setting(True, values.flag)
    num_logits_to_keep: int = setting(1, _SIZE)
    dtype: torch.dtype | None = converted(
        "torch_dtype", default=None, converter=values.optional(values.dtype), group="if changed"
    )

    # Other ways to give the blocks, which the config has as properties
    hybrid_override_pattern: InitVar[str | None] = None
    num_hidden_layers: InitVar[int | None] = None

    @property
    def mamba_intermediate_size(self) -> int:
        """Inner width of a mamba block: heads times head width."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.mamba_intermediate_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_size(self) -> int:
        """Width of a mamba block's input projection: z, then x B C, then dt."""
        return self.mamba_intermediate_size + self.conv_dim + self.mamba_num_heads

    @property
    def mtp_hybrid_override_pattern(self) -> str:
        """`mtp_layers_block_type` as pattern letters."""
        return to_pattern(self.mtp_layers_block_type)

    @property
    def has_experts(self) -> bool:
        """Whether any block, a multi-token prediction block included, is a mixture of experts."""
        mtp = self.mtp_layers_block_type if self.num_nextn_predict_layers else ()
        return "moe" in self.layers_block_type or "moe" in mtp
