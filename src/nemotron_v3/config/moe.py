"""The config of one mixture of experts, in the fields that NeMo AutoModel's `MoEConfig` has."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Self

import torch

from nemotron_v3.config import values
from nemotron_v3.config.checks import check_expert_sizes, check_routing
from nemotron_v3.config.foreign import INERT_MOE_FIELDS, check_fields
from nemotron_v3.config.model import NemotronV3Config
from nemotron_v3.config.spelling import (
    converted,
    put,
    read_attributes,
    read_mapping,
    required,
    setting,
    settings_class,
    settings_of,
    settle,
)

_COUNT = values.whole(1)


@settings_class
class MoEConfig:
    """Router, experts and shared expert of a moe block.

    Code written for AutoModel may hand in its own class. Each field of that one is honoured,
    refused, or listed in `foreign.INERT_MOE_FIELDS` because it changes nothing here. A field whose
    only offered value is its default stands below to refuse the other values.

    Attributes:
        shared_expert_inter_dim: width of one shared expert; None is `moe_inter_dim`.
        n_shared_experts: how many times that width the shared MLP has; 0 is none.
        dtype: of the block's mixer; None is the model's.
        gate_dtype: of the router's weight; None is `dtype`.
        force_e_score_correction_bias: False leaves the bias out of the state dict, where it is 0;
            not with several groups of experts.
        router_weight_uses_score_correction_bias: whether the chosen experts are weighted by score
            and bias, not by the score alone.
    """

    dim: int = required(_COUNT)  # hidden size of the model; experts see moe_latent_size, if set
    n_routed_experts: int = required(_COUNT)
    n_activated_experts: int = required(_COUNT)
    moe_inter_dim: int = required(_COUNT)
    shared_expert_inter_dim: int = converted(default=None, converter=values.filled(values.whole(0)))
    inter_dim: int = setting(0, values.whole(0))
    moe_latent_size: int | None = setting(None, values.optional(_COUNT))
    n_shared_experts: int = setting(1, values.whole(0))
    n_expert_groups: int = setting(1, _COUNT)
    n_limited_groups: int = setting(1, _COUNT)
    norm_topk_prob: bool = setting(True, values.flag)
    route_scale: float = setting(1.0, values.number())
    train_gate: bool = setting(True, values.flag)
    dtype: torch.dtype | None = converted(default=None, converter=values.optional(values.dtype))
    gate_dtype: torch.dtype | None = converted(
        default=None, converter=values.optional(values.dtype)
    )
    force_e_score_correction_bias: bool = setting(True, values.flag)
    router_weight_uses_score_correction_bias: bool = setting(False, values.flag)
    score_func: str = setting("sigmoid", values.choice("sigmoid"))
    expert_activation: str = setting("relu2", values.choice("relu2"))
    shared_expert_activation: str = setting("relu2", values.choice("relu2"))
    # Watched and moved from outside the layer: docs/routing.md.
    gate_bias_update_factor: float = setting(
        0.0, values.only(0.0, "nemotron_v3.layers.ExpertLoad with balance_(load, rate)")
    )
    aux_loss_coeff: float = setting(
        0.0, values.only(0.0, "nemotron_v3.layers.BalanceLoss(model, coefficient)")
    )
    router_bias: bool = setting(False, values.only(False))
    expert_bias: bool = setting(False, values.only(False))
    shared_expert_gate: bool = setting(False, values.only(False))
    enable_routing_replay: bool = setting(
        False, values.only(False, "nemotron_v3.layers.record_routing and replay_routing")
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.shared_expert_inter_dim is None:
            put(self, "shared_expert_inter_dim", self.moe_inter_dim)
        if self.n_shared_experts and not self.shared_expert_inter_dim:
            raise ValueError(
                f"shared_expert_inter_dim is 0 beside n_shared_experts {self.n_shared_experts}: "
                "give a width of at least 1, or set n_shared_experts to 0"
            )
        if not self.force_e_score_correction_bias and self.n_expert_groups > 1:
            raise ValueError(
                f"force_e_score_correction_bias is False with n_expert_groups "
                f"{self.n_expert_groups}: groups are chosen by scores with a bias; set it to True"
            )
        check_routing(
            self,
            experts="n_routed_experts",
            top_k="n_activated_experts",
            groups="n_expert_groups",
            top_groups="n_limited_groups",
        )

    @classmethod
    def from_any(cls, source: Any) -> Self:
        """The typed form of `source`: ours, a `NemotronV3Config`, a mapping, or any object.

        A foreign object stays as it is.

        Raises:
            ValueError: a value that is not offered, a field that is missing, or one that nothing
                here reads (of a mapping, or of a dataclass where it is not at its default).
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, NemotronV3Config):
            return cls.from_config(source)
        check_fields("moe_config", source, settings_of(cls), INERT_MOE_FIELDS)
        read = read_mapping if isinstance(source, Mapping) else read_attributes
        given = read(settings_of(cls), source)
        missing = [
            field.name
            for field in fields(cls)
            if field.default is MISSING and field.name not in given
        ]
        if missing:
            raise ValueError(f"moe_config lacks {', '.join(missing)}: give a number for each")
        return cls(**given)

    @classmethod
    def from_config(cls, config: NemotronV3Config) -> Self:
        """The mixture of experts that a model's config describes.

        Raises `ValueError` naming the sizes it lacks.
        """
        check_expert_sizes(config)
        return cls(
            dim=config.hidden_size,
            inter_dim=config.intermediate_size,
            n_routed_experts=config.n_routed_experts,
            n_shared_experts=config.n_shared_experts,
            n_activated_experts=config.num_experts_per_tok,
            n_expert_groups=config.n_group,
            n_limited_groups=config.topk_group,
            moe_inter_dim=config.moe_intermediate_size,
            shared_expert_inter_dim=config.moe_shared_expert_intermediate_size,
            moe_latent_size=config.moe_latent_size,
            norm_topk_prob=config.norm_topk_prob,
            route_scale=config.routed_scaling_factor,
            expert_activation=config.mlp_hidden_act,
            shared_expert_activation=config.mlp_hidden_act,
            dtype=config.dtype,
        )
