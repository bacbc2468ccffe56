"""What compressed-tensors quantises reads back equal, to the bit, to what it dequantises itself.

Its NVFP4 compressor dequantises in fp32, as is done here, and rounds to bf16 at the end; its FP8
compressor returns fp32.
"""

import json

import pytest
import torch
from torch import Tensor

from nemotron_v3.checkpoint import audit, convert, from_pretrained
from tests.checkpoint.files import contents, read_checkpoint, released_tensors, write_checkpoint
from tests.checkpoint.narrow_files import CONFIG

pytestmark = pytest.mark.integration
pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")

PRESETS = ["NVFP4A16", "NVFP4", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"]


def scales(weight: Tensor, scheme) -> dict[str, Tensor]:
    """What a compressor needs beside a weight, by the package's own formulas."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    match scheme.weights.strategy:
        case "tensor_group":
            groups = weight.unflatten(1, (-1, 16))
            low, high = groups.amin(-1), groups.amax(-1)
        case "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "block":
            blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        case _:
            low, high = weight.min().reshape(1), weight.max().reshape(1)
    if scheme.weights.num_bits == 8:
        return {"weight_scale": calculate_qparams(low, high, scheme.weights)[0]}
    number = generate_gparam(weight.min(), weight.max())
    scale, _ = calculate_qparams(low, high, scheme.weights, global_scale=number)
    return {"weight_scale": scale, "weight_global_scale": number}


def compress(preset: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """A checkpoint's tensors, its compressed weights as the package dequantises them, and its
    quantization_config."""
    from compressed_tensors.compressors import FloatQuantizationCompressor, NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    narrow = scheme.weights.num_bits == 4
    compressor = NVFP4PackedCompressor if narrow else FloatQuantizationCompressor
    tensors, told = released_tensors(CONFIG), {}
    for name in list(tensors):
        if not ("_proj.weight" in name and ("expert" in name or ".layers.3." in name)):
            continue
        weight = tensors.pop(name).float() * 0.02
        stored = compressor.compress({"weight": weight} | scales(weight, scheme), scheme)
        if preset == "NVFP4":
            stored["input_global_scale"] = torch.tensor([12.0])
        tensors |= {name.removesuffix("weight") + leaf: part for leaf, part in stored.items()}
        told[name] = compressor.decompress(stored, scheme)["weight"]
    quantised = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized" if narrow else "float-quantized",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head", "re:.*gate$", "re:.*mixer.(in|out)_proj"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
    }
    return tensors, told, quantised


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_package_wrote_has_the_values_that_the_package_gives_it(tmp_path, preset):
    tensors, told, quantised = compress(preset)
    data = CONFIG.to_dict() | {"quantization_config": quantised}
    made = write_checkpoint(tmp_path / "made", tensors, data, shards=2)
    convert(made, tmp_path / "wide", dequantise=True)
    wide = read_checkpoint(tmp_path / "wide")
    assert len(told) == 10
    for name, values in told.items():
        assert torch.equal(wide[name], values.to(torch.bfloat16)), name
    audit(from_pretrained(made), tmp_path / "wide")
    convert(made, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(made)
