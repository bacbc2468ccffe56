import copy
import io

import pytest
import torch

from nemotron_v3.checkpoint import (
    CheckpointError,
    audit,
    from_pretrained,
    open_checkpoint,
    reader,
    save_pretrained,
)
from nemotron_v3.checkpoint.plan import tensors_of
from nemotron_v3.model.dtypes import FP32_NAMES
from tests.checkpoint.files import (
    assert_same,
    fused,
    released_tensors,
    renamed,
    with_model_prefix,
    write_checkpoint,
)
from tests.models import tiny_config, tokens

CONFIG = tiny_config(moe_latent_size=20, num_nextn_predict_layers=1)


@pytest.fixture
def tensors():
    return released_tensors(CONFIG)


def in_memory(tensors, dtype):
    """What a model of `dtype` must hold, by the rules of the docs and not by the code's."""
    held = {}
    for name, tensor in with_model_prefix(fused(tensors)).items():
        if not name.startswith("mtp."):
            wide = name.rsplit(".", 1)[1] in FP32_NAMES and dtype != torch.float64
            held[name] = tensor.to(torch.float32 if wide else dtype)
    return held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("respell", [dict, fused, with_model_prefix])
def test_every_tensor_is_the_files_cast_once(tmp_path, tensors, respell, dtype):
    write_checkpoint(tmp_path, respell(tensors), CONFIG, shards=2)
    model = from_pretrained(tmp_path, dtype=dtype)
    assert_same(tensors_of(model), in_memory(tensors, dtype))
    assert_same(model.state_dict(), in_memory(tensors, dtype))
    assert_same(model.mtp, {n: t for n, t in tensors.items() if n.startswith("mtp.")})
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_the_report_counts_what_was_done(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, CONFIG)
    report = from_pretrained(tmp_path, dtype=torch.bfloat16).checkpoint_origin.report
    built = {n: t for n, t in tensors.items() if not n.startswith("mtp.")}
    assert report.tensors == len(built)
    assert report.elements == sum(t.numel() for t in built.values())
    assert report.casts == {
        "bfloat16 -> bfloat16": len(built) - 8,
        "bfloat16 -> float32": 3 * 2,  # A_log, D, dt_bias of two mamba blocks
        "float32 -> float32": 2,  # e_score_correction_bias of two mixtures
    }
    assert set(report.carried) == {n for n in tensors if n.startswith("mtp.")}
    assert report.left_out == 0


@pytest.mark.parametrize(
    ("told", "stored", "expected"),
    [
        (torch.float16, torch.bfloat16, torch.float16),
        (None, torch.bfloat16, torch.bfloat16),
        (None, torch.float32, torch.float32),
    ],
)
def test_the_dtype_is_the_configs_or_that_of_most_of_the_file(tmp_path, told, stored, expected):
    config = CONFIG.replace(dtype=told)
    write_checkpoint(tmp_path, released_tensors(config, stored), config)
    assert from_pretrained(tmp_path).lm_head.weight.dtype == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat61"])
def test_a_dtype_that_no_model_has_is_refused(tmp_path, tensors, dtype):
    write_checkpoint(tmp_path, tensors, CONFIG)
    with pytest.raises(ValueError, match=r"give bfloat16, float16, float32, float64"):
        from_pretrained(tmp_path, dtype=dtype)


def test_a_loaded_model_computes_what_its_weights_say(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, CONFIG)
    model = from_pretrained(tmp_path, dtype=torch.float32)
    ids = tokens(2, 40)
    logits = model(ids).logits
    model.model.layers[1].mixer.experts.up_proj.data.zero_()
    assert not torch.equal(model(ids).logits, logits)
    assert torch.equal(from_pretrained(tmp_path, dtype=torch.float32)(ids).logits, logits)


@pytest.mark.parametrize("layers", [3, [0, 1, 2], (0, 4), range(1, 7), [5]])
def test_some_of_the_layers_are_a_smaller_model(tmp_path, tensors, layers):
    write_checkpoint(tmp_path, tensors, CONFIG)
    model = from_pretrained(tmp_path, dtype=torch.float32, layers=layers)
    chosen = range(layers) if isinstance(layers, int) else layers
    blocks = tuple(CONFIG.layers_block_type[i] for i in chosen)
    assert model.config.layers_block_type == blocks
    assert model.config.num_hidden_layers == len(blocks)
    whole = in_memory(tensors, torch.float32)
    expected = {n: t for n, t in whole.items() if ".layers." not in n}
    for new, old in enumerate(chosen):
        start = f"model.layers.{old}."
        for name in whole:
            if name.startswith(start):
                expected[f"model.layers.{new}.{name.removeprefix(start)}"] = whole[name]
    assert_same(tensors_of(model), expected)
    origin = model.checkpoint_origin
    assert origin.layers == tuple(chosen)
    assert origin.report.tensors + origin.report.left_out + len(model.mtp) == len(tensors)


@pytest.mark.parametrize("layers", [0, 8, -1, [], [7], [-1], [1, 1], [2, 1], [True], ["0"], [1.0]])
def test_layers_that_are_not_there_are_refused(tmp_path, tensors, layers):
    write_checkpoint(tmp_path, tensors, CONFIG)
    with pytest.raises(ValueError, match=r"layers="):
        from_pretrained(tmp_path, layers=layers)


def test_a_tied_head_is_absent_or_equal(tmp_path, tensors):
    config = CONFIG.replace(tie_word_embeddings=True)
    equal = tensors | {"lm_head.weight": tensors["backbone.embeddings.weight"]}
    absent = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    for k, stored in enumerate((equal, absent)):
        model = from_pretrained(write_checkpoint(tmp_path / str(k), stored, config))
        assert torch.equal(model.lm_head.weight, tensors["backbone.embeddings.weight"])
        assert "lm_head.weight" not in model.state_dict()
    with pytest.raises(CheckpointError, match="lm_head.weight is not equal to the embeddings"):
        from_pretrained(write_checkpoint(tmp_path / "unequal", tensors, config))
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        from_pretrained(write_checkpoint(tmp_path / "untied", absent, CONFIG))


def test_the_misspelt_embeddings_are_read(tmp_path, tensors):
    wrong = renamed(tensors, lambda name: name.replace("embeddings", "embedding"))
    model = from_pretrained(write_checkpoint(tmp_path, wrong, CONFIG))
    assert torch.equal(model.model.embeddings.weight, tensors["backbone.embeddings.weight"])


def test_all_differences_are_listed_at_once(tmp_path, tensors):
    layer = "backbone.layers.1.mixer."
    changed = dict(tensors)
    del changed["backbone.norm_f.weight"]
    for expert in (0, 3, 4, 7):
        del changed[f"{layer}experts.{expert}.up_proj.weight"]
    changed[f"{layer}experts.8.down_proj.weight"] = torch.zeros(20, 24)
    changed[f"{layer}gate.weight"] = torch.zeros(8, 47)
    changed[f"{layer}gate.bias"] = torch.zeros(8)
    changed["backbone.embedding.weight"] = tensors["backbone.embeddings.weight"]
    changed["backbone.layers.0.mixer.D"] = torch.zeros(6, dtype=torch.int32)
    changed["rotary.inv_freq"] = torch.zeros(2)
    write_checkpoint(tmp_path, changed, CONFIG)
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path)
    twice = {p for p in caught.value.problems if p.startswith("twice: ")}
    assert set(caught.value.problems) - twice == {
        "missing: model.norm_f.weight (backbone.norm_f.weight on disk), shape (48,)",
        "missing: experts 0, 3-4, 7 of model.layers.1.mixer.experts.up_proj",
        f"unexpected: {layer}experts.8.down_proj.weight, the config has 8 experts",
        f"shape: {layer}gate.weight is (8, 47), the config asks for (8, 48)",
        f"unexpected: {layer}gate.bias, which the config gives no place",
        "dtype: backbone.layers.0.mixer.D holds I32, not BF16, F16, F32 or F64",
        "unexpected: rotary.inv_freq, which the config gives no place",
    }
    assert len(twice) == 1
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_a_file_in_two_spellings_is_refused(tmp_path, tensors):
    both = tensors | {"model.norm_f.weight": tensors["backbone.norm_f.weight"]}
    both |= {n: t for n, t in fused(tensors).items() if "layers.1.mixer.experts" in n}
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(write_checkpoint(tmp_path, both, CONFIG))
    text = str(caught.value)
    assert "names begin with both backbone. and model." in text
    assert "experts are stored both one by one and stacked" in text
    assert "twice: " in text


def test_another_number_of_layers_is_refused_before_a_model_is_built(tmp_path, tensors):
    config = CONFIG.replace(hybrid_override_pattern="M" * 5000)
    write_checkpoint(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match="describes layers 0 to 4999, the tensors 7 layers"):
        from_pretrained(tmp_path)


def test_another_models_weights_are_refused(tmp_path):
    llama = {
        "model.embed_tokens.weight": torch.zeros(2, 2),
        "model.layers.0.self_attn.q": torch.ones(2),
    }
    with pytest.raises(CheckpointError, match="belong to another model"):
        from_pretrained(write_checkpoint(tmp_path / "weights", llama, CONFIG))
    write_checkpoint(tmp_path / "config", llama, {"model_type": "llama"})
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        from_pretrained(tmp_path / "config")


def test_a_config_that_no_model_can_be_built_from_is_refused(tmp_path, tensors):
    config = CONFIG.replace(hidden_size=2**62)
    with pytest.raises(CheckpointError, match="no model can be built from config.json"):
        from_pretrained(write_checkpoint(tmp_path, tensors, config))


def test_a_loaded_model_can_be_copied_pickled_and_trained(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, CONFIG)
    with torch.inference_mode():  # must not leak into the parameters
        model = from_pretrained(tmp_path, dtype=torch.float32)
    for twin in (copy.deepcopy(model), torch.load(saved(model), weights_only=False)):
        assert_same(tensors_of(twin), tensors_of(model))
        assert_same(twin.mtp, model.mtp)
        assert twin.checkpoint_origin == model.checkpoint_origin
    model.train()
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def saved(model) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_carried_tensors_stay_in_the_file_until_they_are_touched(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, CONFIG)
    model = from_pretrained(tmp_path)
    assert model.mtp.keys() == {n for n in tensors if n.startswith("mtp.")}
    (tmp_path / "model.safetensors").unlink()
    assert_same(model.mtp, {n: t for n, t in tensors.items() if n.startswith("mtp.")})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_is_loaded_straight_onto_a_gpu(tmp_path, tensors, dtype):
    write_checkpoint(tmp_path, tensors, CONFIG, shards=2)
    model = from_pretrained(tmp_path, dtype=dtype, device="cuda")
    assert {t.device.type for t in tensors_of(model).values()} == {"cuda"}
    assert_same(tensors_of(model), in_memory(tensors, dtype))
    audit(model, tmp_path)
    save_pretrained(model, tmp_path / "saved")
    audit(from_pretrained(tmp_path / "saved", dtype=dtype), tmp_path)


def test_a_checkpoint_replaced_while_it_is_opened_is_read_again(tmp_path, tensors, monkeypatch):
    write_checkpoint(tmp_path, tensors, CONFIG)
    find = reader._find_narrow
    moments = []

    def replace_once(directory, config, stored):
        moments.append(config)
        if len(moments) == 1:
            changed = CONFIG.replace(routed_scaling_factor=9.0)
            changed.to_json(directory)
        return find(directory, config, stored)

    monkeypatch.setattr(reader, "_find_narrow", replace_once)
    assert open_checkpoint(tmp_path).config["routed_scaling_factor"] == 9.0
    assert len(moments) == 2
