"""The dtype contract: what stays fp32, what the stream between blocks is, what autocast does."""

import copy

import pytest
import torch

from nemotron_v3.layers import NemotronV3Block, NemotronV3Mamba2Mixer
from nemotron_v3.model.dtypes import FP32_NAMES, memory_dtype
from tests.accuracy import relative_error
from tests.models import WITHOUT_MOE, tiny_config, tiny_model, tokens


def dtypes(model: torch.nn.Module) -> set[tuple[bool, torch.dtype]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {(name.rsplit(".", 1)[-1] in FP32_NAMES, t.dtype) for name, t in named}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_four_kinds_of_tensor_stay_fp32_and_keep_their_values(dtype):
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(dtype)
    assert dtypes(model) == {(True, torch.float32), (False, dtype)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].to(memory_dtype(name, dtype))), name


def test_half_and_double_and_back():
    model = tiny_model().double()
    assert dtypes(model) == {(True, torch.float64), (False, torch.float64)}
    assert dtypes(model.half()) == {(True, torch.float32), (False, torch.float16)}
    assert dtypes(copy.deepcopy(model)) == dtypes(model)


def test_gradients_are_treated_as_their_parameters():
    mixer = NemotronV3Mamba2Mixer(tiny_config(), 0)
    mixer(torch.randn(1, 5, 48)).sum().backward()
    before = mixer.A_log.grad.clone()
    mixer.to(torch.bfloat16)
    assert mixer.A_log.grad.dtype == torch.float32 and torch.equal(mixer.A_log.grad, before)
    assert mixer.in_proj.weight.grad.dtype == torch.bfloat16


def test_a_layer_built_alone_takes_the_configs_dtype():
    config = tiny_config(dtype=torch.bfloat16)
    for block_type in ("mamba", "attention", "mlp", "moe"):
        block = NemotronV3Block(config, 0, block_type=block_type)
        assert {d for kept, d in dtypes(block) if not kept} == {torch.bfloat16}
        assert {d for kept, d in dtypes(block) if kept} <= {torch.float32}
        x = torch.randn(1, 5, 48).bfloat16()
        assert block(x).dtype == torch.bfloat16


@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_a_whole_bf16_model_runs_and_its_stream_has_the_promised_dtype(residual_in_fp32):
    model = tiny_model(residual_in_fp32=residual_in_fp32).to(torch.bfloat16)
    ids = tokens(2, 40)
    out = model(ids, labels=ids, output_hidden_states=True)
    stream = torch.float32 if residual_in_fp32 else torch.bfloat16
    assert [h.dtype for h in out.hidden_states[1:-1]] == [stream] * 6
    assert out.hidden_states[-1].dtype == out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_an_fp32_stream_loses_less_than_a_bf16_one():
    ids, deep = tokens(2, 40), 4 * WITHOUT_MOE
    truth = tiny_model(deep).bfloat16().double()(ids).logits
    errors = {
        flag: relative_error(tiny_model(deep, residual_in_fp32=flag).bfloat16()(ids).logits, truth)
        for flag in (False, True)
    }
    assert errors[True] < errors[False] < 0.1


def test_autocast_costs_what_bf16_costs_and_leaves_fp32_arithmetic_alone():
    ids = tokens(2, 40)
    model = tiny_model()
    truth = tiny_model().double()(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.loss.dtype == torch.float32 and out.logits.dtype == torch.bfloat16
    plain = relative_error(tiny_model().bfloat16()(ids).logits, truth)
    assert relative_error(out.logits, truth) <= 2 * plain + 2**-9
    out.loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_an_assigned_state_dict_in_16_bits_leaves_them_wide():
    model = tiny_model()
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert dtypes(model) == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_parametrized_tensor_stays_wide():
    class Doubled(torch.nn.Module):
        def forward(self, A_log):
            return 2 * A_log

    mixer = NemotronV3Mamba2Mixer(tiny_config(), 0)
    torch.nn.utils.parametrize.register_parametrization(mixer, "A_log", Doubled())
    mixer.to(torch.bfloat16)
    assert mixer.parametrizations.A_log.original.dtype == mixer.A_log.dtype == torch.float32
    assert mixer.dt_bias.dtype == torch.float32 and mixer.in_proj.weight.dtype == torch.bfloat16
