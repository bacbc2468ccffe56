"""Checkpoints cross over to transformers and back, tensor by tensor."""

import json

import pytest
import torch

from nemotron_v3.checkpoint import audit, from_pretrained, save_pretrained
from nemotron_v3.checkpoint.plan import tensors_of
from tests.checkpoint.files import assert_same, contents
from tests.models import tiny_model

transformers = pytest.importorskip("transformers", minversion="5.23")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "ssm_state_size": 16,
    "n_groups": 2,
    "intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": 20,
}


BIASES = {"use_bias": True, "mlp_bias": True, "use_conv_bias": False, "moe_latent_size": None}


@pytest.fixture(params=[{}, BIASES], ids=["", "biases, no latent experts"])
def theirs(request):
    config = transformers.NemotronHConfig(**(SIZES | request.param))
    model = transformers.NemotronHForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_what_transformers_saves_loads_here_and_is_saved_the_same(tmp_path, theirs, dtype, size):
    theirs.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours = from_pretrained(tmp_path / "theirs")
    expected = theirs.state_dict()
    for name, tensor in tensors_of(ours).items():
        assert torch.equal(tensor, expected.pop(name).to(tensor.dtype)), name
    assert expected == {}
    audit(ours, tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "40KB"}, {"experts": "fused"}, {"prefix": "model."}]
)
def test_what_is_saved_here_loads_in_transformers(tmp_path, dtype, options):
    ours = tiny_model(moe_latent_size=20).to(dtype)
    save_pretrained(ours, tmp_path, **options)
    theirs, told = transformers.NemotronHForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(told.values()), told
    assert_same(theirs.state_dict(), {n: t.to(torch.float32) for n, t in ours.state_dict().items()})


def test_a_tied_model_saved_here_has_its_head_in_transformers(tmp_path):
    """transformers does not tie this model, and draws a head that the file lacks."""
    ours = tiny_model(tie_word_embeddings=True)
    save_pretrained(ours, tmp_path)
    theirs, told = transformers.NemotronHForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(told.values()), told
    assert torch.equal(theirs.lm_head.weight, ours.model.embeddings.weight)


def test_a_cross_over_and_back_changes_nothing(tmp_path, theirs):
    theirs.save_pretrained(tmp_path / "1")
    save_pretrained(from_pretrained(tmp_path / "1"), tmp_path / "2")
    again = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "2")
    assert_same(again.state_dict(), theirs.state_dict())
    again.save_pretrained(tmp_path / "3")
    first, last = contents(tmp_path / "1"), contents(tmp_path / "3")
    assert first["model.safetensors"] == last["model.safetensors"]
    assert json.loads(first["config.json"]) == json.loads(last["config.json"])
