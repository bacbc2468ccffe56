import dataclasses
from types import SimpleNamespace

import pytest
import torch

from nemotron_v3.config import MoEConfig, NemotronV3Config

OF_SUPER = {
    "dim": 4096,
    "inter_dim": 2688,
    "n_routed_experts": 512,
    "n_shared_experts": 1,
    "n_activated_experts": 22,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "moe_inter_dim": 2688,
    "shared_expert_inter_dim": 5376,
    "moe_latent_size": 1024,
    "norm_topk_prob": True,
    "route_scale": 5.0,
    "dtype": torch.bfloat16,
}


def test_from_the_config_of_a_model():
    model = NemotronV3Config.preset("nemotron-3-super")
    config = MoEConfig.from_config(model)
    assert {name: getattr(config, name) for name in OF_SUPER} == OF_SUPER
    assert (config.score_func, config.expert_activation) == ("sigmoid", "relu2")
    assert MoEConfig.from_any(model) == config
    assert MoEConfig.from_any(config) is config


def test_a_foreign_one_is_read_and_left_alone():
    config = MoEConfig(**OF_SUPER)
    foreign = SimpleNamespace(**dataclasses.asdict(config), softmax_before_topk=False)
    foreign.dtype = "bfloat16"
    before = dict(vars(foreign))
    assert MoEConfig.from_any(foreign) == config
    assert vars(foreign) == before
    assert MoEConfig.from_any(OF_SUPER) == config


def test_a_model_without_experts_has_none():
    dense = NemotronV3Config(layers_block_type="M-")
    with pytest.raises(
        ValueError,
        match="moe blocks need n_routed_experts, moe_inter.*or, to a single block, a moe_config",
    ):
        MoEConfig.from_config(dense)


def test_missing_fields_are_listed():
    with pytest.raises(ValueError, match="lacks n_activated_experts"):
        MoEConfig.from_any(SimpleNamespace(dim=8, n_routed_experts=4, moe_inter_dim=8))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"score_func": "softmax"}, "score_func is 'softmax', .* use sigmoid"),
        ({"expert_activation": "swiglu"}, "expert_activation is 'swiglu'"),
        ({"router_bias": True}, "router_bias is True, .* set it to False"),
        ({"shared_expert_gate": True}, "shared_expert_gate is True"),
        (
            {"aux_loss_coeff": 1e-4},
            "aux_loss_coeff is 0.0001, .* set it to 0.0 and .*BalanceLoss",
        ),
        ({"n_shared_experts": -1}, "n_shared_experts is -1"),
        ({"shared_expert_inter_dim": 0}, "shared_expert_inter_dim is 0 beside n_shared_experts 1"),
        (
            {"force_e_score_correction_bias": False, "n_expert_groups": 2},
            "force_e_score_correction_bias is False with n_expert_groups 2",
        ),
        ({"n_activated_experts": 513}, "n_activated_experts 513 is above the 512 experts"),
        ({"n_expert_groups": 3}, "n_routed_experts 512 is not a multiple of n_expert_groups 3"),
        ({"moe_inter_dim": 0}, "moe_inter_dim is 0"),
    ],
)
def test_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        MoEConfig(**OF_SUPER | changes)
