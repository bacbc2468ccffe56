"""The documented classes of this package, built from AutoModel's own objects, beside its own."""

import dataclasses

import pytest
import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.nemotron_v3 import layers as theirs
from nemo_automodel.components.moe.config import MoEConfig
from torch import nn

from nemotron_v3 import layers as ours
from nemotron_v3.nemo import accelerate
from tests.nemo.models import CPU, saved, their_backend, their_config, their_model

CONFIG = their_config()
KINDS = {kind: i for i, kind in enumerate(("mamba", "moe", "attention", "mlp"))}
MOE = {
    "n_routed_experts": 8, "n_shared_experts": 1, "n_activated_experts": 3, "n_expert_groups": 2,
    "n_limited_groups": 1, "train_gate": True, "gate_bias_update_factor": 0.0,
    "aux_loss_coeff": 0.0, "score_func": "sigmoid", "route_scale": 2.5, "dim": 48, "inter_dim": 40,
    "moe_inter_dim": 24, "norm_topk_prob": True, "expert_activation": "relu2",
    "shared_expert_activation": "relu2", "force_e_score_correction_bias": True,
    "shared_expert_inter_dim": 32, "dtype": torch.float32,
}  # fmt: skip


def pair(kind: str, **changes) -> tuple[nn.Module, nn.Module]:
    """A block of theirs and one of ours, of the same objects, with the same weights."""
    torch.manual_seed(0)
    fields = {field.name for field in dataclasses.fields(MoEConfig)}
    if changes.keys() - fields:
        pytest.skip(f"this version has no {', '.join(changes.keys() - fields)}")
    moe, backend = MoEConfig(**(MOE | changes)), their_backend()
    block = theirs.NemotronV3Block(CONFIG, KINDS[kind], moe_config=moe, backend=backend)
    with torch.no_grad():
        if kind == "moe":  # the block's own fails where there is no shared expert
            block.mixer.init_weights(CPU)
        else:
            block.init_weights(buffer_device=CPU)
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            tensor.uniform_(0.1, 0.9) if "correction" in name else tensor.add_(
                0.1 * torch.randn_like(tensor)
            )
    before = dataclasses.asdict(moe), dataclasses.asdict(backend)
    mine = ours.NemotronV3Block(CONFIG, KINDS[kind], moe_config=moe, backend=backend)
    assert (dataclasses.asdict(moe), dataclasses.asdict(backend)) == before
    state = {}
    for name, tensor in block.state_dict().items():
        name = name.replace("_fp32_params.", "")
        for its, own in (("gate_and_up_projs", "up_proj"), ("down_projs", "down_proj")):
            if name.endswith(its):
                name, tensor = name.removesuffix(its) + own, tensor.transpose(1, 2)
        state[name] = tensor
    mine.load_state_dict(state)
    return block, mine


@pytest.mark.parametrize("kind", ["moe", "attention", "mlp"])
def test_a_block_gives_the_numbers_of_theirs(kind):
    block, mine = pair(kind)
    x = torch.randn(2, 9, 48, requires_grad=True)
    expected, found = block(x), mine(x)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, x, cotangent)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_mamba_block_gives_the_numbers_of_the_accelerated_one():
    block, mine = pair("mamba")
    x, mask = torch.randn(2, 9, 48), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    torch.testing.assert_close(mine(x, mask), accelerate(block)(x, mask))


@pytest.mark.parametrize(
    "changes",
    [
        {"router_weight_uses_score_correction_bias": True},
        {"norm_topk_prob": False},
        {"n_shared_experts": 2},
        {"n_shared_experts": 0},
        {"shared_expert_inter_dim": None},
        {"moe_latent_size": 12},
        {"gate_dtype": "float32"},
        {"apply_router_weight_after_down": True},
        {"router_weights_fp32": True},
        {"softmax_before_topk": True, "swiglu_limit": 3.0, "activation_limit": 1.0},
    ],
    ids=str,
)
def test_a_field_of_their_config_does_there_what_it_does_here(changes):
    block, mine = pair("moe", **changes)
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(mine.mixer(x), block.mixer(x))
    torch.testing.assert_close(accelerate(block).mixer(x), mine.mixer(x))


@pytest.mark.parametrize(
    "changes",
    [
        {"score_func": "softmax"}, {"expert_activation": "swiglu"}, {"router_bias": True},
        {"shared_expert_activation": "swiglu"}, {"shared_expert_gate": True},
        {"gate_bias_update_factor": 0.1}, {"aux_loss_coeff": 0.1}, {"enable_routing_replay": True},
        {"expert_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_offered_is_refused_and_never_passed_over(changes):
    if changes.keys() - {field.name for field in dataclasses.fields(MoEConfig)}:
        pytest.skip(f"this version has no {next(iter(changes))}")
    moe = MoEConfig(**(MOE | changes))
    with pytest.raises(ValueError, match=next(iter(changes))):
        ours.NemotronV3Block(CONFIG, KINDS["moe"], moe_config=moe, backend=their_backend())


def other_values(kind: type) -> list[tuple[str, object]]:
    """Each field with a simple default, and another value than that."""
    found: list[tuple[str, object]] = []
    for field in dataclasses.fields(kind):
        if isinstance(field.default, bool):
            found.append((field.name, not field.default))
        elif isinstance(field.default, int | float):
            found.append((field.name, type(field.default)(field.default + 1)))
    return found


@pytest.mark.parametrize(("name", "value"), other_values(MoEConfig), ids=str)
def test_no_field_of_their_moe_config_is_unknown(name, value):
    """Each is obeyed, refused by its name, or named among those without effect."""
    options = MOE | {name: value}
    try:
        layer = ours.NemotronV3MoE(MoEConfig(**options))
    except ValueError as error:
        assert name in str(error)
        assert "did you mean" not in str(error), "a field that nothing here has heard of"
        return
    assert layer(torch.randn(1, 3, 48)).isfinite().all()


def test_a_foreign_backend_of_another_kind_is_refused_where_it_matters():
    with pytest.raises(ValueError, match="attn"):
        ours.NemotronV3Attention(CONFIG, BackendConfig(attn="eager"))
    backend = BackendConfig(attn="eager", linear="torch", rms_norm="torch_fp32")
    ours.NemotronV3Block(CONFIG, KINDS["mlp"], backend=backend)
    assert ours.NemotronV3Attention(CONFIG, (mine := their_backend())).backend is mine


def test_a_negative_score_of_a_dropped_group_never_wins():
    """Theirs multiplies dropped groups by 0, which beats any score below; ours, and the accelerated
    router, leave them out."""
    block, mine = pair("moe")
    with torch.no_grad():
        for gate in (block.mixer.gate, mine.mixer.gate):
            gate.e_score_correction_bias.fill_(-3.0)
    x = torch.randn(2, 9, 48)
    truth = mine.mixer(x)
    wrong = block.mixer(x)
    assert (wrong - truth).norm() / truth.norm() > 0.1
    torch.testing.assert_close(accelerate(block).mixer(x), truth)


def test_one_choice_that_is_normalised_has_weight_one():
    block, mine = pair("moe", n_activated_experts=1, n_expert_groups=1)
    x = torch.randn(2, 9, 48)
    _, indices, _ = accelerate(block.mixer).gate(x.flatten(0, 1), torch.ones(18).bool(), None)
    weights, same, _ = block.mixer.gate(x.flatten(0, 1), torch.ones(18).bool(), None)
    assert torch.equal(indices, same) and torch.allclose(weights, torch.full_like(weights, 2.5))
    torch.testing.assert_close(block.mixer(x), mine.mixer(x))


def test_a_model_of_theirs_that_was_loaded_by_transformers_is_for_the_other_room(tmp_path):
    """`force_hf=True`: AutoModel puts a mixin before transformers' class, under the same name."""
    from nemo_automodel._transformers.model_init import _get_mixin_wrapped_class
    from transformers import AutoModelForCausalLM

    from nemotron_v3 import nemo

    # Not with the transformers that versions 0.5 and 0.6 pin.
    hf = pytest.importorskip("nemotron_v3.hf", exc_type=ImportError)
    folder = saved(their_model(), tmp_path)
    model, plain = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    model.__class__ = wrapped = _get_mixin_wrapped_class(type(model))
    with pytest.raises(TypeError, match="force_hf=True"):
        nemo.accelerate(model)
    ids = torch.randint(3, 90, (1, 7))
    before = model(ids).logits
    assert torch.equal(hf.accelerate(model)(ids).logits, hf.accelerate(plain)(ids).logits)
    assert isinstance(model, wrapped)
    hf.undo(model)
    assert type(model) is wrapped and torch.equal(model(ids).logits, before)
