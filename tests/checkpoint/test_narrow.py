"""Checkpoints in 8 and 4 bits: loaded, audited, converted, written back; each value by
definition."""

import json

import pytest
import torch
from torch import Tensor

from nemotron_v3.checkpoint import (
    CheckpointError,
    audit,
    convert,
    from_pretrained,
    open_checkpoint,
    plan_conversion,
    save_pretrained,
)
from nemotron_v3.checkpoint.plan import tensors_of
from tests.checkpoint.files import assert_same, contents, read_checkpoint, write_checkpoint
from tests.checkpoint.narrow_files import (
    CONFIG,
    FP8_SCALES,
    fp8,
    narrow_tensors,
    nvfp4,
    wide_tensors,
)

QUANTISED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
    "ignore": ["backbone.embeddings", "mtp*", "backbone.layers.2.mixer.q_proj"],
    "quantized_layers": {
        "lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
        "backbone.layers.1.mixer.experts.2.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
    },
}
HF_QUANT_CONFIG = {
    "producer": {"name": "modelopt", "version": "1.0.0"},
    "quantization": {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["backbone.embeddings", "backbone.layers.*.mixer.gate", "mtp*"],
        "quantized_layers": QUANTISED["quantized_layers"],
    },
}
TWIN = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "group"},
            "targets": ["re:.*experts.*"],
        },
        "group_1": {
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
            "targets": ["Linear"],
        },
    },
    "ignore": ["re:.*gate$", r"re:^backbone\.layers\.2\.mixer\.[qkvo]_proj", "lm_heads"],
}
KINDS = {
    "modelopt": {},
    "compressed-tensors": {"twin": True},
    "rows": {"fp8_scales": "row"},
    "blocks": {"fp8_scales": "block"},
}


def write(directory, tensors: dict, quantised: dict | None = None, **options):
    data = CONFIG.to_dict() | ({} if quantised is None else {"quantization_config": quantised})
    return write_checkpoint(directory, tensors, data, **options)


def in_memory(wide: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model holds of these tensors, each rounded once."""
    found: dict = {}
    for name, tensor in wide.items():
        memory = name.replace("backbone.", "model.", 1)
        leaf = name.rpartition(".")[2]
        fp32 = leaf in ("A_log", "D", "dt_bias", "e_score_correction_bias")
        head, inside, tail = memory.partition(".experts.")
        memory = f"{head}.experts.{tail.split('.')[1]}" if inside else memory
        found.setdefault(memory, []).append(tensor.to(torch.float32 if fp32 else dtype))
    stacks = {n: torch.stack(t) if ".experts." in n else t[0] for n, t in found.items()}
    return stacks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_load_gives_the_values_of_the_definition_rounded_once(tmp_path, kind, dtype):
    tensors, weights = narrow_tensors(**KINDS[kind])
    write(tmp_path, tensors, TWIN if kind == "compressed-tensors" else QUANTISED, shards=3)
    model = from_pretrained(tmp_path, dtype=dtype)
    assert_same(tensors_of(model), in_memory(wide_tensors(tensors, weights, dtype), dtype))
    report = model.checkpoint_origin.report
    short = str(dtype).removeprefix("torch.")
    narrow = {layout: report.casts[f"{layout} -> {short}"] for layout in ("nvfp4", "fp8")}
    assert narrow == {"nvfp4": 3 * 2 + 2 + 1, "fp8": 2 + 1}
    told = {name for name in tensors if name.endswith(("input_scale", "input_global_scale",
                                                       "k_scale", "v_scale"))}  # fmt: skip
    assert set(report.ignored) == told
    assert audit(model, tmp_path) == report


@pytest.mark.parametrize(
    ("scales", "spelling"), [(s, i) for s in FP8_SCALES for i in range(len(FP8_SCALES[s](128, 1)))]
)
def test_the_scales_of_fp8_may_have_any_of_the_shapes_that_files_have(tmp_path, scales, spelling):
    tensors, _ = narrow_tensors()
    name = "backbone.layers.3.mixer.up_proj."
    stored = fp8(128, 128, torch.Generator().manual_seed(1), scales, spelling)
    tensors |= {name + leaf: tensor for leaf, tensor in stored.tensors.items()}
    model = from_pretrained(write(tmp_path, tensors))
    held = tensors_of(model)["model.layers.3.mixer.up_proj.weight"]
    assert torch.equal(held, stored.by_definition(torch.bfloat16))


def test_a_weight_larger_than_a_block_of_rows_is_read_in_several(tmp_path, monkeypatch):
    from nemotron_v3.checkpoint.narrow import read

    for scales in FP8_SCALES:
        directory = tmp_path / scales
        tensors, weights = narrow_tensors(fp8_scales=scales)
        write(directory, tensors)
        for most in (1, 128 * 37, 128 * 128):
            monkeypatch.setattr(read, "ELEMENTS", {"cpu": most})
            model = from_pretrained(directory)
            wide = wide_tensors(tensors, weights, torch.bfloat16)
            assert_same(tensors_of(model), in_memory(wide, torch.bfloat16))


def test_embeddings_and_a_carried_head_may_be_narrow_too(tmp_path):
    config = CONFIG.replace(num_nextn_predict_layers=1)
    tensors, _ = narrow_tensors(config)  # its mtp experts are narrow
    embeddings = nvfp4(64, 128, torch.Generator().manual_seed(3))
    del tensors["backbone.embeddings.weight"]
    tensors |= {f"backbone.embeddings.{leaf}": t for leaf, t in embeddings.tensors.items()}
    write_checkpoint(tmp_path / "made", tensors, config)
    model = from_pretrained(tmp_path / "made")
    held = tensors_of(model)["model.embeddings.weight"]
    assert torch.equal(held, embeddings.by_definition(torch.bfloat16))
    assert {t.dtype for n, t in model.mtp.items() if "experts" in n} == {torch.bfloat16}
    convert(tmp_path / "made", tmp_path / "wide", dequantise=True)
    assert_same(
        {n: t for n, t in read_checkpoint(tmp_path / "wide").items() if n.startswith("mtp.")},
        dict(model.mtp),
    )


def test_a_model_loaded_wide_is_saved_as_a_wide_one(tmp_path):
    tensors, _ = narrow_tensors()
    write(tmp_path / "made", tensors, QUANTISED, shards=2)
    (tmp_path / "made" / "hf_quant_config.json").write_text(json.dumps(HF_QUANT_CONFIG))
    model = from_pretrained(tmp_path / "made")
    save_pretrained(model, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert not (tmp_path / "saved" / "hf_quant_config.json").exists()
    again = from_pretrained(tmp_path / "saved")
    assert_same(tensors_of(again), tensors_of(model))
    audit(again, tmp_path / "made")  # whose values they are


def test_dequantising_writes_what_loading_and_saving_does(tmp_path):
    for kind, options in KINDS.items():
        made, a, b = (tmp_path / kind / name for name in ("made", "a", "b"))
        tensors, weights = narrow_tensors(**options)
        write(made, tensors, TWIN if kind == "compressed-tensors" else QUANTISED, shards=3)
        (made / "hf_quant_config.json").write_text(json.dumps(HF_QUANT_CONFIG))
        done = convert(made, a, dequantise=True)
        save_pretrained(from_pretrained(made), b)
        assert contents(a) == contents(b)
        assert_same(read_checkpoint(a), wide_tensors(tensors, weights, torch.bfloat16))
        assert done.casts["nvfp4 -> bfloat16"] == 9
        assert "hf_quant_config.json" in done.left_behind


def test_dequantising_casts_renames_stacks_and_chooses_layers_as_ever(tmp_path):
    tensors, _ = narrow_tensors()
    write(tmp_path / "made", tensors, QUANTISED)
    asked = {"dtype": torch.float32, "experts": "fused", "prefix": "model."}
    convert(tmp_path / "made", tmp_path / "a", dequantise=True, layers=[1, 3], **asked)
    save_pretrained(from_pretrained(tmp_path / "made", layers=[1, 3], dtype=torch.float32),
                    tmp_path / "b", **asked)  # fmt: skip
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_stays_narrow_is_written_byte_for_byte(tmp_path):
    for kind, options in KINDS.items():
        made = tmp_path / kind / "made"
        tensors, _ = narrow_tensors(**options)
        write(made, tensors, TWIN if kind == "compressed-tensors" else QUANTISED, shards=3)
        (made / "hf_quant_config.json").write_text(json.dumps(HF_QUANT_CONFIG))
        convert(made, tmp_path / kind / "same")
        assert contents(tmp_path / kind / "same") == contents(made)
        convert(made, tmp_path / kind / "one", max_shard_size="1GB")
        assert_same(read_checkpoint(tmp_path / kind / "one"), tensors)
        config = (made / "config.json").read_bytes()
        assert (tmp_path / kind / "one" / "config.json").read_bytes() == config
        audit(from_pretrained(tmp_path / kind / "one"), made)


def test_a_checkpoint_is_converted_in_its_own_place_with_what_tells_its_formats(tmp_path):
    tensors, weights = narrow_tensors()
    write(tmp_path, tensors, QUANTISED, shards=3)
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps(HF_QUANT_CONFIG))
    convert(tmp_path, tmp_path, max_shard_size="1GB", overwrite=True)
    assert_same(read_checkpoint(tmp_path), tensors)
    assert json.loads(beside.read_text()) == HF_QUANT_CONFIG
    convert(tmp_path, tmp_path, dequantise=True, overwrite=True)
    assert not beside.exists()
    assert_same(read_checkpoint(tmp_path), wide_tensors(tensors, weights, torch.bfloat16))
    from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "asked",
    [{"dtype": "float16"}, {"experts": "fused"}, {"prefix": "model."}, {"layers": 2},
     {"adapter": "x"}],
)  # fmt: skip
def test_what_narrow_weights_cannot_become_is_refused_before_anything_is_written(tmp_path, asked):
    write(tmp_path / "made", narrow_tensors()[0])
    with pytest.raises(CheckpointError, match=rf"{next(iter(asked))}=.*--dequantise"):
        convert(tmp_path / "made", tmp_path / "there", **asked)
    assert not (tmp_path / "there").exists()


def test_a_value_beyond_fp16_is_found_before_anything_is_written(tmp_path):
    tensors, _ = narrow_tensors()
    tensors["lm_head.weight_scale_2"] = torch.tensor(1e3)
    write(tmp_path / "made", tensors)
    plan = plan_conversion(tmp_path / "made", tmp_path / "there", dequantise=True, dtype="float16")
    with pytest.raises(CheckpointError, match="lm_head.weight holds values beyond the range"):
        plan.run()
    assert not list((tmp_path / "there").glob("*.safetensors"))


def test_an_opened_checkpoint_shows_weights_and_what_they_are_stored_in(tmp_path):
    tensors, weights = narrow_tensors()
    checkpoint = open_checkpoint(write(tmp_path, tensors))
    assert set(checkpoint.stored) == set(tensors)
    assert set(checkpoint) == set(wide_tensors(tensors, weights, torch.bfloat16))
    assert checkpoint.shape("lm_head.weight") == (64, 128)
    assert checkpoint.stored.shape("lm_head.weight") == (64, 64)
    told = {weight.description for weight in checkpoint.narrow.weights.values()}
    assert told == {"nvfp4 in groups of 16", "fp8 with one scale"}
    values = checkpoint.tensor("lm_head.weight")
    assert torch.equal(values, weights["lm_head.weight"].by_definition(torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_load_onto_a_gpu_gives_the_bits_of_one_onto_a_cpu(tmp_path, kind):
    tensors, _ = narrow_tensors(**KINDS[kind])
    write(tmp_path, tensors)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        here = tensors_of(from_pretrained(tmp_path, dtype=dtype))
        there = from_pretrained(tmp_path, dtype=dtype, device="cuda")
        assert_same({n: t.cpu() for n, t in tensors_of(there).items()}, here)
        audit(there, tmp_path)
