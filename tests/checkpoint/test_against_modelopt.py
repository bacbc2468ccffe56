"""A model of transformers that NVIDIA's ModelOpt quantises and exports opens here, with the values
that ModelOpt's own tensors give it.

Its NVFP4 dequantises to the bit as here. Its FP8 rounds the scale to 16 bits first, which is up to
0.4 % off the stored scale, so FP8 is compared with its dequantisation in fp32.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nemotron_v3.checkpoint import audit, convert, from_pretrained
from tests.checkpoint.files import contents, read_checkpoint

pytestmark = pytest.mark.integration

# ModelOpt changes transformers as it is imported, so that it has a process of its own.
EXPORT = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

torch.manual_seed(0)
config = NemotronHConfig(
    vocab_size=256, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=2, intermediate_size=128,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=128, dtype="bfloat16",
)
config.architectures = ["NemotronHForCausalLM"]
model = NemotronHForCausalLM(config).bfloat16().eval()

def calibrate(model):
    for _ in range(2):
        model(torch.randint(0, 256, (2, 32)))

_, recipe, made, told = sys.argv
model = mtq.quantize(model, getattr(mtq, recipe), calibrate)
export_hf_checkpoint(model, export_dir=made)
stored, values = load_file(f"{made}/model.safetensors"), {}
for name, codes in stored.items():
    scale, second = stored.get(f"{name}_scale"), stored.get(f"{name}_scale_2")
    if second is not None:
        q = NVFP4QTensor((codes.shape[0], 2 * codes.shape[1]), torch.bfloat16, codes)
        values[name] = q.dequantize(scale=scale, double_scale=second, block_sizes={-1: 16})
    elif scale is not None:
        q = FP8QTensor(codes.shape, torch.float32, codes)
        values[name] = q.dequantize(dtype=torch.float32, scale=scale).contiguous()
save_file(values, told)
"""


def has_modelopt() -> bool:
    command = [sys.executable, "-c", "import modelopt.torch.quantization, modelopt.torch.export"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "recipe",
    ["MAMBA_MOE_NVFP4_CONSERVATIVE_CFG", "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG",
     "MAMBA_MOE_FP8_AGGRESSIVE_CFG"],
)  # fmt: skip
def test_what_modelopt_exports_has_the_values_that_modelopt_gives_it(tmp_path, recipe):
    if not has_modelopt():
        pytest.skip("needs nvidia-modelopt")
    made, told = tmp_path / "made", tmp_path / "told.safetensors"
    command = [sys.executable, "-c", EXPORT, recipe, str(made), str(told)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    values = load_file(told)
    assert len(values) >= 10
    convert(made, tmp_path / "wide", dequantise=True)
    wide = read_checkpoint(tmp_path / "wide")
    for name, expected in values.items():
        assert torch.equal(wide[name], expected.to(torch.bfloat16)), name
    audit(from_pretrained(made), tmp_path / "wide")
    convert(made, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(made)
    assert "quantization_config" in json.loads((made / "config.json").read_text())
