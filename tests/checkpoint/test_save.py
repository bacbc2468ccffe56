import errno
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from nemotron_v3 import NemotronV3Config
from nemotron_v3.checkpoint import (
    CheckpointError,
    audit,
    from_pretrained,
    open_checkpoint,
    save_pretrained,
    writer,
)
from nemotron_v3.checkpoint.plan import tensors_of
from tests.checkpoint.files import (
    assert_same,
    contents,
    fused,
    read_checkpoint,
    released_tensors,
    renamed,
    with_model_prefix,
    write_checkpoint,
)
from tests.models import tiny_config, tiny_model

CONFIG = tiny_config(moe_latent_size=20, num_nextn_predict_layers=1)
RELEASED = {
    "architectures": ["NemotronHForCausalLM"],
    "time_step_limit": [0.0, float("inf")],
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def tensors():
    return released_tensors(CONFIG)


SPELLINGS = {
    "released": dict,
    "fused": fused,
    "model prefix": with_model_prefix,
    "fused, model prefix": lambda tensors: with_model_prefix(fused(tensors)),
    "all bf16": lambda tensors: {n: t.to(torch.bfloat16) for n, t in tensors.items()},
    "all fp32": lambda tensors: {n: t.float() for n, t in tensors.items()},
    "gate in fp32": lambda tensors: {
        n: t.float() if n.endswith("gate.weight") else t for n, t in tensors.items()
    },
    "one expert in fp16": lambda tensors: {
        n: t.half() if ".experts.3.up" in n else t for n, t in tensors.items()
    },
}


# Loading these in the config's bf16 is a cast that loses values: a test of its own.
WIDE = ("all fp32", "gate in fp32", "one expert in fp16")


@pytest.mark.filterwarnings("ignore:.*kept as they are")
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [(s, d) for s in SPELLINGS for d in (None, torch.float32, torch.float64) if d or s not in WIDE],
)
def test_loaded_and_saved_the_files_are_the_same_to_the_byte(
    tmp_path, tensors, spelling, shards, dtype
):
    config = json.loads(json.dumps(CONFIG.to_dict())) | RELEASED
    source = write_checkpoint(tmp_path / "a", SPELLINGS[spelling](tensors), config, shards)
    save_pretrained(from_pretrained(source, dtype=dtype), tmp_path / "b")
    assert contents(tmp_path / "b") == contents(source)


def test_a_load_that_narrows_keeps_dtypes_and_says_so_in_its_report(tmp_path, tensors):
    wide = SPELLINGS["all fp32"](tensors)
    config = CONFIG.replace(dtype=torch.bfloat16)
    model = from_pretrained(write_checkpoint(tmp_path / "a", wide, config))
    assert model.checkpoint_origin.report.casts["float32 -> bfloat16"] > 50
    save_pretrained(model, tmp_path / "b")
    kept = {n: t.dtype for n, t in read_checkpoint(tmp_path / "b").items()}
    assert kept == {n: t.dtype for n, t in wide.items()}


def test_the_misspelt_embeddings_are_written_under_the_name_that_everybody_reads(tmp_path, tensors):
    wrong = renamed(tensors, lambda name: name.replace("embeddings", "embedding"))
    model = from_pretrained(write_checkpoint(tmp_path / "a", wrong, CONFIG, shards=2))
    save_pretrained(model, tmp_path / "b")
    assert_same(read_checkpoint(tmp_path / "b"), tensors)


@pytest.mark.parametrize("layers", [3, [0, 4, 6]])
def test_a_smaller_model_is_a_whole_checkpoint(tmp_path, tensors, layers):
    model = from_pretrained(write_checkpoint(tmp_path / "a", tensors, CONFIG), layers=layers)
    save_pretrained(model, tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    assert_same(tensors_of(again), tensors_of(model))
    assert_same(again.mtp, model.mtp)
    assert again.config.layers_block_type == model.config.layers_block_type
    dtypes = {t.dtype for n, t in read_checkpoint(tmp_path / "b").items() if "A_log" in n}
    assert dtypes == {torch.bfloat16}


# ---- dtypes on disk


def test_a_tensor_keeps_the_dtype_it_was_read_in_while_its_values_survive(tmp_path, tensors):
    write_checkpoint(tmp_path / "a", tensors, CONFIG)
    model = from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    mixers = [model.model.layers[i].mixer for i in (0, 4)]
    mixers[0].A_log.data[0] += 1e-6  # needs fp32
    mixers[1].A_log.data[0] = 0.5  # fits bf16
    mixers[0].D.data[0] = float("inf")
    mixers[1].dt_bias.data[0] = float("nan")
    save_pretrained(model, tmp_path / "b")
    written = read_checkpoint(tmp_path / "b")
    changed = {n for n in written if written[n].dtype != tensors[n].dtype}
    assert changed == {"backbone.layers.0.mixer.A_log"}
    assert written["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    audit(model, tmp_path / "b")


def test_a_trained_model_in_fp32_is_written_in_fp32_and_so_says_its_config(tmp_path, tensors):
    config = CONFIG.replace(dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "a", tensors, config)
    model = from_pretrained(tmp_path / "a", dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(1 + 2**-20)
    save_pretrained(model, tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    assert again.config.dtype == torch.float32
    assert_same(tensors_of(again), tensors_of(model))
    assert_same(again.mtp, model.mtp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_dtype_that_is_asked_for_never_narrows_what_is_fp32_by_contract(tmp_path, dtype):
    model = tiny_model(dtype=torch.float32)
    save_pretrained(model, tmp_path, dtype=dtype)
    written = read_checkpoint(tmp_path)
    wide = ("A_log", "D", "dt_bias", "e_score_correction_bias")
    for name, tensor in written.items():
        expected = torch.promote_types(dtype, torch.float32) if name.endswith(wide) else dtype
        assert tensor.dtype == expected, name
    assert NemotronV3Config.from_json(tmp_path).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_is_written_as_released_files_are(tmp_path, dtype):
    model = tiny_model().to(dtype)
    save_pretrained(model, tmp_path)
    assert read_checkpoint(tmp_path).keys() == released_tensors(model.config).keys()
    again = from_pretrained(tmp_path)
    assert_same(tensors_of(again), tensors_of(model))
    assert again.config.dtype == dtype  # the config said nothing, or something else
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# ---- spelling on request


@pytest.mark.parametrize("experts", ["per_expert", "fused"])
@pytest.mark.parametrize("prefix", ["backbone.", "model."])
@pytest.mark.parametrize("respell", [dict, fused])
def test_any_spelling_becomes_any_other(tmp_path, tensors, respell, prefix, experts):
    source = write_checkpoint(tmp_path / "a", respell(tensors), CONFIG)
    save_pretrained(from_pretrained(source), tmp_path / "b", experts=experts, prefix=prefix)
    expected = tensors if experts == "per_expert" else fused(tensors)
    expected = expected if prefix == "backbone." else with_model_prefix(expected)
    assert_same(read_checkpoint(tmp_path / "b"), expected)
    assert_same(tensors_of(from_pretrained(tmp_path / "b")), tensors_of(from_pretrained(source)))


@pytest.mark.parametrize(("size", "limit"), [("20KB", 20_000), (9_000, 9_000), ("0.02MiB", 20_971)])
def test_shards_stay_below_the_size_asked_for(tmp_path, tensors, size, limit):
    model = from_pretrained(write_checkpoint(tmp_path / "a", tensors, CONFIG))
    save_pretrained(model, tmp_path / "b", max_shard_size=size)
    assert_same(read_checkpoint(tmp_path / "b"), tensors)
    checkpoint = open_checkpoint(tmp_path / "b")
    assert len(checkpoint.shards) > 2
    for shard in checkpoint.shards.values():
        sizes = [entry.end - entry.begin for entry in shard.entries.values()]
        assert sum(sizes) <= limit or len(sizes) == 1
        assert all(entry.begin % 4 == 0 for entry in shard.entries.values() if entry.dtype == "F32")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    total = sum(t.numel() * t.itemsize for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == tensors.keys()


@pytest.mark.parametrize(
    "bad",
    [
        {"max_shard_size": "5 parsecs"},
        {"max_shard_size": 0.1},
        {"max_shard_size": -5},
        {"max_shard_size": 0},
        {"max_shard_size": True},
        {"experts": "stacked"},
        {"prefix": "transformer."},
        {"dtype": torch.int8},
        {"dtype": torch.float8_e5m2},
    ],
)
def test_an_option_that_is_not_offered_is_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(CheckpointError):
        save_pretrained(tiny_model("M"), tmp_path / "b", **bad)
    assert not (tmp_path / "b").exists()


def test_a_tied_head_is_written_as_it_was_read_and_for_a_fresh_model(tmp_path, tensors):
    config = CONFIG.replace(tie_word_embeddings=True)
    equal = tensors | {"lm_head.weight": tensors["backbone.embeddings.weight"]}
    absent = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    for k, stored in enumerate((equal, absent)):
        source = write_checkpoint(tmp_path / f"{k}", stored, config)
        save_pretrained(from_pretrained(source), tmp_path / f"{k}-saved")
        assert contents(tmp_path / f"{k}-saved") == contents(source)
    save_pretrained(tiny_model("M", tie_word_embeddings=True), tmp_path / "fresh")
    written = read_checkpoint(tmp_path / "fresh")
    assert torch.equal(written["lm_head.weight"], written["backbone.embeddings.weight"])


# ---- what cannot be saved


def adapter(model):
    model.model.layers[0].mixer.in_proj.lora_A = nn.Parameter(torch.ones(2, 2))


def wrong_shape(model):
    model.model.norm_f.weight = nn.Parameter(torch.ones(3))


def no_values(model):
    model.to("meta")


def removed(model):
    del model.lm_head.weight


def float8(model):
    model.lm_head.weight = nn.Parameter(
        model.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )


def odd_carried(model):
    model.mtp = {"layers.0": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapter, "in_proj.lora_A is no tensor of the config: merge or remove adapters"),
        (wrong_shape, r"norm_f.weight is \(3,\), the config asks for \(48,\)"),
        (no_values, "on the meta device and has no values"),
        (removed, "lm_head.weight is not in the model"),
        (float8, "lm_head.weight is torch.float8_e4m3fn"),
        (odd_carried, "layers.0 in model.mtp"),
    ],
)
def test_a_model_that_would_not_load_again_is_refused(tmp_path, change, message):
    save_pretrained(tiny_model("M"), tmp_path)
    before = contents(tmp_path)
    model = tiny_model("M")
    change(model)
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(model, tmp_path)
    assert contents(tmp_path) == before


def test_a_wrapper_around_the_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="a Sequential cannot be saved"):
        save_pretrained(nn.Sequential(tiny_model("M")), tmp_path)


# ---- the directory


def test_other_files_stay_and_stale_weights_go(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, CONFIG, shards=3)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("not ours")
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "config.json").write_text("{}")
    model = from_pretrained(tmp_path)
    save_pretrained(model, tmp_path, max_shard_size="1GB")
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin",
        "checkpoint-500",
    }  # fmt: skip
    assert (tmp_path / "checkpoint-500" / "config.json").exists()
    assert_same(read_checkpoint(tmp_path), tensors)
    save_pretrained(model, tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(read_checkpoint(tmp_path), tensors)


def test_saving_over_the_source_keeps_the_carried_tensors_readable(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, CONFIG, shards=2)
    before = contents(tmp_path)
    model = from_pretrained(tmp_path)
    for _ in range(2):
        save_pretrained(model, tmp_path)
        assert contents(tmp_path) == before
    assert_same(model.mtp, {n: t for n, t in tensors.items() if n.startswith("mtp.")})


def test_a_directory_of_links_keeps_what_they_lead_to(tmp_path, tensors):
    """As a download cache lays a checkpoint out: names that are links to blobs."""
    blobs = write_checkpoint(tmp_path / "blobs", tensors, CONFIG)
    before = contents(blobs)
    (tmp_path / "snapshot").mkdir()
    for blob in blobs.iterdir():
        (tmp_path / "snapshot" / blob.name).symlink_to(blob)
    model = from_pretrained(tmp_path / "snapshot")
    model.lm_head.weight.data.zero_()
    save_pretrained(model, tmp_path / "snapshot")
    assert contents(blobs) == before
    audit(model, tmp_path / "snapshot")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, tensors, monkeypatch):
    write_checkpoint(tmp_path, tensors, CONFIG, shards=2)
    before = contents(tmp_path)
    model = from_pretrained(tmp_path)
    write, room = writer._write, [20]

    def fill_up(file, block):
        room[0] -= 1
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, block)

    monkeypatch.setattr(writer, "_write", fill_up)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))
    room[0] = 20
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_directorys_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file: give a directory"):
        save_pretrained(tiny_model("M"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_large_tensors_are_written_block_by_block(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK", 7)
    source = write_checkpoint(tmp_path / "a", tensors, CONFIG)
    model = from_pretrained(source, dtype=torch.float32)
    audit(model, source)
    save_pretrained(model, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(source)


def test_a_transposed_parameter_is_written_in_its_own_order(tmp_path):
    model = tiny_model("M")
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    save_pretrained(model, tmp_path)
    assert torch.equal(read_checkpoint(tmp_path)["lm_head.weight"], weight)
