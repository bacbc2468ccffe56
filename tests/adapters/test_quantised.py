"""Quantised in_proj and out_proj: they are called as modules, so they go on working."""

import copy

import pytest
import torch
from torch import nn

from tests.accuracy import relative_error
from tests.adapters.tiny import transformers_model
from tests.models import tiny_model, tokens

pytest.importorskip("peft")
pytest.importorskip("transformers")

from nemotron_v3 import hf
from nemotron_v3.adapters import coverage
from nemotron_v3.hf.peft import add_lora, lora_config

pytestmark = pytest.mark.filterwarnings("ignore")
MAMBA = ("in_proj", "out_proj")


def torchao_int8(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: name.rpartition(".")[2] in MAMBA,
    )
    return model


def bitsandbytes_4bit(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if leaf in MAMBA:
            rows, columns = module.weight.shape
            new = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(
                module.weight.detach().clone(), requires_grad=False, quant_type="nf4"
            )
            setattr(model.get_submodule(owner), leaf, new.to("cpu"))
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """A copy with plain layers that hold the values of the quantised ones."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if leaf not in MAMBA:
            continue
        if hasattr(module.weight, "quant_state"):
            import bitsandbytes as bnb

            weight = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
        else:
            weight = module.weight.dequantize()
        plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = nn.Parameter(weight.detach().float().reshape(plain.weight.shape))
        setattr(model.get_submodule(owner), leaf, plain)
    return model


SIZES = {"hidden_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 16}  # 4 bits want 64 columns


@pytest.mark.parametrize("quantise", [torchao_int8, bitsandbytes_4bit])
@pytest.mark.parametrize("kind", ["native", "accelerated"])
def test_a_quantised_model_computes_with_its_dequantised_weights(quantise, kind):
    ids = tokens(2, 33)
    if kind == "native":
        model = tiny_model("ME*M-", **SIZES).eval()
    else:
        model = hf.accelerate(transformers_model(**SIZES))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        quantised = quantise(model)
        logits = quantised(input_ids=ids).logits
        expected = dequantised(quantised)(input_ids=ids).logits
    assert (expected - before).abs().max() > 1e-3  # it is quantised
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("quantise", [torchao_int8, bitsandbytes_4bit])
def test_adapters_on_quantised_weights_have_the_right_gradients_and_train(quantise):
    ids = tokens(4, 33, vocab=258)
    model = quantise(hf.accelerate(transformers_model(**SIZES)))
    plain = dequantised(model)
    config = lora_config(model, ["mamba", "attention"], r=4)
    wrapped, same = add_lora(model, config), add_lora(plain, config)
    assert coverage(wrapped).covered_blocks == 3
    state = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in same.named_parameters():
            if "lora_" in name:
                state[name].add_(0.1 * torch.randn_like(parameter))
                parameter.copy_(state[name])
    for one in (wrapped, same):
        one(ids, labels=ids).loss.backward()
    for name, parameter in same.named_parameters():
        if "lora_" in name:
            assert parameter.grad.norm() > 0, name
            assert relative_error(state[name].grad, parameter.grad) < 2e-5, name
    optimizer = torch.optim.AdamW(state.values(), lr=3e-3)
    found = []
    for _ in range(12):
        loss = wrapped(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    assert found[-1] < 0.9 * found[0]


def loaded_by(kind: str):
    """transformers' own settings for quantising while it loads."""
    import transformers

    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


# bitsandbytes' 4-bit product on a CPU wants whole blocks of 64 rows, too.
WHOLE_BLOCKS = SIZES | {
    "mamba_num_heads": 64,
    "mamba_head_dim": 2,
    "head_dim": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "moe_latent_size": 64,
    "moe_shared_expert_intermediate_size": 64,
}


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes int8", "bitsandbytes 4-bit"])
def test_a_model_that_transformers_quantised_computes_the_same_accelerated(tmp_path, kind):
    import transformers

    ids = tokens(2, 33, vocab=258)
    transformers_model(**WHOLE_BLOCKS).save_pretrained(tmp_path)

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=loaded_by(kind), dtype=torch.float32, device_map="cpu"
        )

    model = load()
    held = [module for name, module in model.named_modules() if name.rpartition(".")[2] in MAMBA]
    assert len(held) == 4 and {type(module.weight) for module in held} != {nn.Parameter}
    with torch.no_grad():
        expected = model(ids).logits
        logits = hf.accelerate(model)(ids).logits
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    # Anew: once it has run without gradients, bitsandbytes' 4-bit layer passes none on a CPU.
    model = hf.accelerate(load())
    wrapped = add_lora(model, lora_config(model, r=4))
    wrapped(ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in wrapped.named_parameters() if "lora_B" in n}
    assert all(grad.norm() > 0 for grad in grads.values())
    assert sum("out_proj" in name for name in grads) == 2
