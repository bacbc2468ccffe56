"""What is wrong with a checkpoint in 8 or 4 bits is told by the tensor's name, before memory is
taken."""

import json

import pytest
import torch

from nemotron_v3.checkpoint import CheckpointError, audit, convert, from_pretrained, open_checkpoint
from nemotron_v3.checkpoint.audit import Ledger
from tests.checkpoint.narrow_files import FP8, fp8, narrow_tensors
from tests.checkpoint.test_narrow import HF_QUANT_CONFIG, QUANTISED, TWIN, write

HEAD = "lm_head."
UP = "backbone.layers.3.mixer.up_proj."  # fp8
EXPERT = "backbone.layers.1.mixer.experts.2.up_proj."
ATTENTION = "backbone.layers.2.mixer."


@pytest.fixture(scope="module")
def tensors():
    return narrow_tensors()[0]


def changed(tensors: dict, change: dict) -> dict:
    """`tensors` with some of them exchanged, added, or (None) left out."""
    return {name: t for name, t in (tensors | change).items() if t is not None}


ONE = torch.tensor(1.0)
CODES = torch.ones(128, 128).to(FP8)
LAYOUTS = {
    "missing scale": ({UP + "weight_scale": None}, "weight_scale is missing beside .*up_proj.weig"),
    "missing block scales": ({HEAD + "weight_scale": None}, "lm_head.weight_scale is missing"),
    "missing second scale": (
        {EXPERT + "weight_scale_2": None},
        r"experts.2.up_proj.weight_scale_2 is missing beside .*2.up_proj.weight",
    ),
    "missing codes": ({HEAD + "weight": None}, "lm_head.weight_scale is the scale of no narrow"),
    "scale of a wide weight": (
        {ATTENTION + "q_proj.weight_scale": ONE},
        "q_proj.weight_scale is the scale of no narrow weight",
    ),
    "scale of activations alone": (
        {ATTENTION + "q_proj.input_scale": ONE},
        "q_proj.input_scale is the scale of no narrow weight",
    ),
    "second scale of fp8": (
        {UP + "weight_scale_2": ONE},
        "up_proj.weight_scale_2 does not belong beside .*up_proj.weight",
    ),
    "another format's scale": (
        {HEAD + "weight_global_scale": ONE},
        "lm_head.weight_global_scale does not belong beside lm_head.weight",
    ),
    "two weights": (
        {HEAD + "weight_packed": torch.zeros(64, 64, dtype=torch.uint8)},
        "lm_head.weight_packed stands beside a weight",
    ),
    "groups of 32": (
        {HEAD + "weight_scale": torch.ones(64, 4).to(FP8)},
        r"lm_head.weight_scale is F8_E4M3 \(64, 4\): .* groups of 16 need F8_E4M3 \(64, 8\)",
    ),
    "scales in another dtype": ({HEAD + "weight_scale": torch.ones(64, 8)}, "is F32 .* need F8_E4"),
    "swizzled scales": ({HEAD + "weight_scale": torch.ones(512).to(FP8)}, r"F8_E4M3 \(512,\)"),
    "many global scales": (
        {HEAD + "weight_scale_2": torch.ones(64)},
        r"lm_head.weight_scale_2 is F32 \(64,\): one float is needed",
    ),
    "columns that are no groups": (
        {HEAD + "weight": torch.zeros(64, 61, dtype=torch.uint8)},
        "lm_head.weight has 122 columns, no multiple of its groups of 16",
    ),
    "blocks of another size": (
        {UP + "weight_scale": torch.ones(2, 1)},
        r"up_proj.weight_scale is F32 \(2, 1\): .* or \(1, 1\) for blocks of 128",
    ),
    "rows that are no blocks": (
        {UP + "weight": torch.ones(100, 256).to(FP8), UP + "weight_scale": torch.ones(1, 2)},
        r"up_proj.weight_scale is F32 \(1, 2\): beside .* \(100, 1\) for one a row",
    ),
    "a stack in fp8": ({UP + "weight": torch.ones(2, 128, 128).to(FP8)}, r"is F8_E4M3 \(2, 128"),
    "an unknown companion": (
        {HEAD + "pre_quant_scale": torch.ones(128)},
        "lm_head.pre_quant_scale is unknown, and may change",
    ),
    "a scale the other way round": (
        {UP + "weight_scale": None, UP + "weight_scale_inv": torch.ones(1, 1)},
        "up_proj.weight_scale_inv is unknown",
    ),
    "another 8 bit format": ({UP + "weight": CODES.to(torch.float8_e5m2)}, "is F8_E5M2, which is"),
    "scales that are powers of two": (
        {HEAD + "weight_scale": torch.ones(64, 4).to(torch.float8_e8m0fnu)},
        "lm_head.weight_scale is F8_E8M0, which is not read",
    ),
    "a norm in fp8": ({"backbone.norm_f.weight": torch.ones(128).to(FP8)}, r"F8_E4M3 \(128,\)"),
    "a bias in fp8": ({UP + "bias": torch.ones(128).to(FP8)}, "up_proj.bias is F8_E4M3: only a w"),
    "integers": ({UP + "weight": torch.ones(9, 9, dtype=torch.int8)}, "of no narrow weight"),
    "a cache's scale beside no cache": (
        {"backbone.layers.0.mixer.k_scale": ONE},
        "layers.0.mixer.k_scale is the scale of no cache",
    ),
    "many scales of a cache": (
        {ATTENTION + "k_proj.k_scale": torch.ones(2)},
        r"k_proj.k_scale is F32 \(2,\): one float",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_tensors_that_are_no_layout_are_named_when_the_checkpoint_is_opened(
    tmp_path, tensors, case
):
    change, message = LAYOUTS[case]
    directory = write(tmp_path, changed(tensors, change))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(directory)
    assert "the BF16 release of the same model" in str(caught.value)


def with_one(scale: torch.Tensor, value: float) -> torch.Tensor:
    scale = scale.float().clone()
    scale.view(-1)[5 % scale.numel()] = value
    return scale


SCALES = [
    *((HEAD + "weight_scale_2", value) for value in (0.0, float("nan"), float("inf"), -1.0)),
    *((HEAD + "weight_scale_2", value) for value in (1e37,)),  # beyond fp32 with the others
    *((EXPERT + "weight_scale", value) for value in (0.0, float("nan"), -2.0)),
    *((UP + "weight_scale", value) for value in (0.0, float("nan"), float("inf"), -1e-3)),
]


@pytest.mark.parametrize(("name", "value"), SCALES)
def test_a_scale_that_no_quantiser_writes_is_named_before_memory_is_taken(
    tmp_path, tensors, name, value, monkeypatch
):
    bad = with_one(tensors[name], value).to(tensors[name].dtype).reshape(tensors[name].shape)
    directory = write(tmp_path / "made", tensors | {name: bad})
    monkeypatch.setattr(Ledger, "write", None)  # which would take memory
    with pytest.raises(CheckpointError, match=f"{name} (holds|is)"):
        from_pretrained(directory)
    with pytest.raises(CheckpointError, match=f"{name} (holds|is)"):
        convert(directory, tmp_path / "there", dequantise=True)
    assert not (tmp_path / "there").exists()


def test_a_model_is_not_audited_with_broken_scales(tmp_path, tensors):
    model = from_pretrained(write(tmp_path, tensors))
    write(tmp_path, tensors | {HEAD + "weight_scale_2": torch.tensor(float("nan"))})
    with pytest.raises(CheckpointError, match="lm_head.weight_scale_2 holds nan"):
        audit(model, tmp_path)


@pytest.mark.parametrize("name", [EXPERT + "weight_scale", UP + "weight_scale"])
def test_a_scale_of_0_beside_zeros_is_what_a_quantiser_makes_of_zeros(tmp_path, tensors, name):
    weight = name.removesuffix("_scale")
    held = {name: torch.zeros_like(tensors[name]), weight: torch.zeros_like(tensors[weight])}
    held[weight].view(torch.uint8)[3] = 0x80 if name == UP + "weight_scale" else 0x88  # -0.0
    model = from_pretrained(write(tmp_path, tensors | held))
    assert not model.model.layers[3].mixer.up_proj.weight.any() or name != UP + "weight_scale"


QUANT = {"quant_method": "modelopt"}
CLAIMS = {
    "another format": (
        {"quantized_layers": {"lm_head": {"quant_algo": "FP8"}}},
        "lm_head.weight is nvfp4 in groups of 16, config.json's quantization_config says fp8",
    ),
    "a wide weight": (
        {"quantized_layers": {"backbone.layers.2.mixer.q_proj": {"quant_algo": "NVFP4"}}},
        "layers.2.mixer.q_proj.weight has no scales beside it, .* says nvfp4",
    ),
    "one format for all": ({"quant_algo": "FP8"}, "lm_head.weight is nvfp4 .* says fp8"),
    "one group": (
        {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}},
        "up_proj.weight is fp8 with one scale, .* says nvfp4",
    ),
    "another size of groups": (
        {
            "config_groups": {
                "a": {"weights": {"num_bits": 4, "group_size": 32}},
                "b": {"weights": {"num_bits": 8}},
            }
        },
        "lm_head.weight is nvfp4 in groups of 16, .* says groups of 32",
    ),
    "excluded by name": ({"ignore": ["lm_head"]}, "lm_head.weight is nvfp4 .* excludes lm_head"),
    "excluded by pattern": ({"ignore": ["*experts.2.*"]}, "excludes backbone.*experts.2.up_proj"),
    "excluded by expression": ({"ignore": [r"re:.*experts\.2\."]}, "excludes .*experts.2.up_proj"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_config_that_contradicts_the_tensors_is_named_with_both(tmp_path, tensors, case):
    told, message = CLAIMS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write(tmp_path, tensors, QUANT | told))
    assert "remove quantization_config" in str(caught.value)


def test_a_hf_quant_config_is_checked_too(tmp_path, tensors):
    beside = tmp_path / "hf_quant_config.json"
    write(tmp_path, tensors)
    beside.write_text(json.dumps(HF_QUANT_CONFIG))
    open_checkpoint(tmp_path)
    beside.write_text(json.dumps({"quantization": {"exclude_modules": ["lm_h*"]}}))
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json excludes lm_head"):
        open_checkpoint(tmp_path)
    beside.write_text("{")
    with pytest.raises(CheckpointError, match="hf_quant_config.json: not a whole JSON document"):
        open_checkpoint(tmp_path)


def test_wide_tensors_beside_a_config_of_narrow_ones_are_named(tmp_path):
    from tests.checkpoint.files import released_tensors
    from tests.checkpoint.narrow_files import CONFIG

    with pytest.raises(CheckpointError, match="no tensor has scales .* weights are quantised"):
        open_checkpoint(write(tmp_path, released_tensors(CONFIG), QUANT | {"quant_algo": "FP8"}))


UNREAD = [
    ({"quant_method": "gptq"}, "quant_method 'gptq': read are modelopt"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method 'fp8'"),
    (QUANT | {"quant_algo": "MXFP8"}, "quant_algo 'MXFP8': read are FP8,"),
    (QUANT | {"quantized_layers": {"x": {"quant_algo": "NVFP4_SVD"}}}, "quant_algo 'NVFP4_SVD'"),
    (TWIN | {"format": "pack-quantized"}, "format 'pack-quantized': read are nvfp4-pack"),
    (TWIN | {"transform_config": {"a": 1}}, "a transform_config, which changes the weights"),
    (QUANT | {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}, "'int' weig"),
    (QUANT | {"config_groups": {"a": {"weights": {"num_bits": []}}}}, r"weights of \[\] bits"),
    (QUANT | {"ignore": "lm_head"}, "ignore is 'lm_head': a list of names"),
    (QUANT | {"quantized_layers": []}, r"is \[\]: an object is needed"),
    ([], r"is \[\]: an object is needed there"),
    (True, "is True: an object is needed there"),
    (QUANT | {"ignore": [f"*{i}" for i in range(1001)]}, "1,001 patterns exclude modules"),
]


@pytest.mark.parametrize(("told", "message"), UNREAD)
def test_a_format_that_is_not_read_is_refused_by_name(tmp_path, tensors, told, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path, tensors, told))


def test_an_expression_that_could_take_for_ever_is_not_run(tmp_path, tensors):
    open_checkpoint(write(tmp_path, tensors, TWIN | {"ignore": ["re:(.*.*)*(a|a)*$", "re:["]}))


@pytest.mark.parametrize(
    ("change", "release"),
    [
        ({"hidden_size": 4096, "hybrid_override_pattern": "M" * 88}, "3-Super-120B-A12B-BF16"),
        (
            {"hidden_size": 2688, "layers_block_type": ["moe"] * 52,
             "max_position_embeddings": 1048576},
            "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16",
        ),
        ({"hidden_size": 3, "hybrid_override_pattern": 5}, "the BF16 release of the same model"),
    ],
)  # fmt: skip
def test_the_release_to_use_instead_is_named(tmp_path, tensors, change, release):
    write(tmp_path, changed(tensors, {HEAD + "weight_scale": None}))
    (tmp_path / "config.json").write_text(json.dumps(change | {"quantization_config": QUANTISED}))
    with pytest.raises(CheckpointError, match="lm_head.weight_scale is missing") as caught:
        open_checkpoint(tmp_path)
    assert release in str(caught.value)


def test_scales_a_row_in_one_dimension_are_not_taken_for_blocks(tmp_path, tensors):
    stored = fp8(128, 128, torch.Generator().manual_seed(5), "row", 0)
    held = {UP + leaf: tensor for leaf, tensor in stored.tensors.items()}
    weight = open_checkpoint(write(tmp_path, tensors | held)).narrow.weights[UP + "weight"]
    assert weight.description == "fp8 with a scale a row"
