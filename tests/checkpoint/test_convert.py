"""Conversions between spellings: held to loading and saving, to bits, and to transformers."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_v3.checkpoint import (
    CheckpointError,
    audit,
    convert,
    from_pretrained,
    plan_conversion,
    save_pretrained,
)
from tests.checkpoint.files import (
    assert_same,
    contents,
    fused,
    read_checkpoint,
    released_tensors,
    with_model_prefix,
    write_checkpoint,
)
from tests.models import tiny_config, tiny_model, tokens

PATTERN = "ME*-E"
KINDS = {
    "plain": {},
    "mtp": {"num_nextn_predict_layers": 1},
    "latent": {"moe_latent_size": 20},
    "tied": {"tie_word_embeddings": True},
}


def write_source(directory, kind="plain", spelled="released", dtype=torch.bfloat16, shards=1):
    config = tiny_config(PATTERN, **KINDS[kind])
    tensors = released_tensors(config, dtype)
    if kind == "tied":
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    if spelled == "transformers":
        tensors = fused(with_model_prefix(tensors))
    return write_checkpoint(directory, tensors, config, shards=shards)


sources = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(KINDS)),
        "spelled": st.sampled_from(["released", "transformers"]),
        "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
        "shards": st.sampled_from([1, 3]),
    }
)
options = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            [None, torch.bfloat16, torch.float16, torch.float32, torch.float64]
        ),
        "experts": st.sampled_from([None, "per_expert", "fused"]),
        "prefix": st.sampled_from([None, "backbone.", "model."]),
        "max_shard_size": st.sampled_from([None, "30KB", 10**9]),
        "layers": st.sampled_from([None, 2, (1, 3), (0, 2, 4)]),
    }
)
quickly = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quickly
@given(source=sources, option=options)
def test_it_writes_what_loading_and_saving_write(tmp_path, source, option):
    shutil.rmtree(tmp_path / "work", ignore_errors=True)
    read = write_source(tmp_path / "work" / "read", **source)
    layers = option["layers"]
    done = convert(read, tmp_path / "work" / "converted", **option)
    # fp32 holds every value of the file, so that loading loses nothing.
    model = from_pretrained(read, dtype=torch.float32, layers=layers)
    option = {key: value for key, value in option.items() if key != "layers"}
    save_pretrained(model, tmp_path / "work" / "saved", **option)
    assert contents(tmp_path / "work" / "converted") == contents(tmp_path / "work" / "saved")
    assert done.bytes == sum(
        t.numel() * t.itemsize for t in read_checkpoint(tmp_path / "work" / "saved").values()
    )


@quickly
@given(source=sources, there=options)
def test_there_and_back_every_tensor_has_its_bits(tmp_path, source, there):
    shutil.rmtree(tmp_path / "work", ignore_errors=True)
    read = write_source(tmp_path / "work" / "read", **source)
    # Through a dtype that holds every value, and with all layers.
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    there = there | {"layers": None, "dtype": wide.get(there["dtype"], there["dtype"])}
    convert(read, tmp_path / "work" / "there", **there)
    spelled = source["spelled"] == "released"
    back = {
        "experts": "per_expert" if spelled else "fused",
        "prefix": "backbone." if spelled else "model.",
        "dtype": source["dtype"],
    }
    convert(tmp_path / "work" / "there", tmp_path / "work" / "back", **back)
    before = read_checkpoint(read)
    after = read_checkpoint(tmp_path / "work" / "back")
    always_wide = ("A_log", "D", "dt_bias")  # told a dtype, a save writes these in fp32 or wider
    for name in before:
        if name.rpartition(".")[2] in always_wide:
            after[name] = after[name].to(before[name].dtype)
    assert_same(before, after)


def test_without_options_the_files_are_the_same_to_the_byte(tmp_path):
    for kind, spelled in (("mtp", "released"), ("latent", "transformers")):
        read = write_source(tmp_path / kind / "read", kind, spelled, shards=3)
        convert(read, tmp_path / kind / "written")
        assert contents(read) == contents(tmp_path / kind / "written")


def test_fp64_is_read_as_it_is_written(tmp_path):
    read = write_source(tmp_path / "read")
    convert(read, tmp_path / "wide", dtype=torch.float64)
    wide, narrow = from_pretrained(tmp_path / "wide"), from_pretrained(read, dtype=torch.float64)
    assert wide.model.embeddings.weight.dtype == torch.float64
    assert_same(wide.state_dict(), narrow.state_dict())


def test_in_place_with_overwrite(tmp_path):
    read = write_source(tmp_path / "read", shards=3)
    shutil.copytree(read, tmp_path / "kept")
    (read / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds config\.json.*overwrite"):
        convert(read, read, experts="fused")
    convert(read, read, experts="fused", overwrite=True)
    convert(tmp_path / "kept", tmp_path / "fused", experts="fused")
    assert contents(read) == contents(tmp_path / "fused") | {"tokenizer.json": b"{}"}


def test_what_lies_beside_the_weights_is_copied_and_code_is_not(tmp_path):
    read = write_source(tmp_path / "read")
    beside = {"tokenizer.json": b"{1}", "chat_template.jinja": b"x", "modeling_x.py": b"evil()"}
    for name, raw in beside.items():
        (read / name).write_bytes(raw)
    (read / "extra_templates").mkdir()
    done = convert(read, tmp_path / "written", prefix="model.")
    assert done.copied == ("tokenizer.json", "chat_template.jinja")
    assert done.left_behind == ("extra_templates/", "modeling_x.py")
    written = contents(tmp_path / "written")
    assert {n: written[n] for n in done.copied} == {n: beside[n] for n in done.copied}
    assert "modeling_x.py" not in written


def test_the_result_computes_the_same(tmp_path):
    model = tiny_model(PATTERN, moe_latent_size=20).to(torch.bfloat16).eval()
    save_pretrained(model, tmp_path / "read")
    convert(tmp_path / "read", tmp_path / "written", experts="fused", prefix="model.")
    again = from_pretrained(tmp_path / "written")
    audit(again, tmp_path / "read")
    ids = tokens(2, 40)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize(
    "option",
    [
        {"experts": "fused", "prefix": "model."},
        {"experts": "per_expert", "max_shard_size": "50KB"},
        {"dtype": torch.float32},
    ],
)
def test_transformers_loads_the_result_with_equal_logits(tmp_path, option):
    transformers = pytest.importorskip("transformers")
    save_pretrained(tiny_model(PATTERN, moe_latent_size=20), tmp_path / "read")
    config = json.loads((tmp_path / "read" / "config.json").read_text())
    # As in releases: code that is not carried along is named, and not asked for.
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.NemotronHForCausalLM"}
    (tmp_path / "read" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "read", tmp_path / "written", **option)
    logits = []
    for directory in ("read", "written"):
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / directory, output_loading_info=True, dtype=torch.float32
        )
        assert not any(told.values()), told
        with torch.no_grad():
            logits.append(model.eval()(tokens(2, 20)).logits)
    assert torch.equal(*logits)


def test_progress_never_goes_back_and_ends_at_the_end(tmp_path):
    read = write_source(tmp_path / "read", shards=3)
    told: dict[str, list[tuple[int, int]]] = {}
    done = convert(
        read,
        tmp_path / "written",
        dtype=torch.float16,
        max_shard_size="40KB",
        progress=lambda doing, at, total: told.setdefault(doing, []).append((at, total)),
    )
    assert set(told) == {"checking", "writing", "proving"}
    for steps in told.values():
        assert [at for at, _ in steps] == sorted(at for at, _ in steps)
        assert steps[-1][0] == steps[-1][1]
    assert told["writing"][-1][1] == done.bytes and len(told["writing"]) == len(done.pieces)


def test_the_work_for_a_tensor_does_not_grow_with_their_number(tmp_path, monkeypatch):
    """The largest release has 51,023."""
    read = write_source(tmp_path / "read")
    asked = []
    size = convert.__globals__["nbytes"]
    monkeypatch.setitem(convert.__globals__, "nbytes", lambda p: asked.append(p) or size(p))
    done = convert(read, tmp_path / "written", prefix="model.")
    assert len(asked) < 8 * len(done.pieces)


def test_a_byte_that_the_disk_turns_over_is_found_and_nothing_takes_its_place(
    tmp_path, monkeypatch
):
    read = write_source(tmp_path / "read")
    write = convert.__globals__["write_safetensors"]

    def spoil(path, *rest):
        write(path, *rest)
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 1
        path.write_bytes(raw)

    monkeypatch.setitem(convert.__globals__, "write_safetensors", spoil)
    with pytest.raises(CheckpointError, match="cannot be proven") as caught:
        convert(read, tmp_path / "written", experts="fused")
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "written").exists()


def unequal_head(read):
    tensors = read_checkpoint(read)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_checkpoint(read, tensors, tiny_config(PATTERN, tie_word_embeddings=True))


def too_large_for_fp32(read):
    tensors = {name: tensor.double() for name, tensor in read_checkpoint(read).items()}
    tensors["backbone.norm_f.weight"][3] = 1e39
    write_checkpoint(read, tensors, tiny_config(PATTERN))


def too_large_for_fp16(read):
    tensors = read_checkpoint(read)
    tensors["backbone.layers.4.mixer.experts.7.up_proj.weight"][3, 2] = 1e5
    write_checkpoint(read, tensors, tiny_config(PATTERN))


@pytest.mark.parametrize(
    ("spoil", "option", "message"),
    [
        (None, {"dtype": torch.int8}, "no model is saved in dtype torch.int8"),
        (None, {"experts": "stacked"}, "experts='stacked': give one of"),
        (None, {"prefix": "transformer."}, "prefix='transformer.'"),
        (None, {"max_shard_size": "5XB"}, "max_shard_size='5XB'"),
        (None, {"layers": 9}, "layers=9: the checkpoint has 5 layers"),
        (None, {"layers": (3, 1)}, "rising order"),
        (lambda read: (read / "config.json").unlink(), {}, "no config.json"),
        (
            lambda read: (read / "model.safetensors").write_bytes(b"short"),
            {},
            "too few for a safetensors file",
        ),
        (
            lambda read: tiny_config("ME*-").to_json(read / "config.json"),
            {},
            "belong to another model",
        ),
        (unequal_head, {}, "not equal to the embeddings"),
        (
            too_large_for_fp32,
            {"dtype": torch.float32},
            r"norm_f.* beyond the range of torch.float32",
        ),
        (too_large_for_fp16, {"dtype": torch.float16}, r"7\.up_proj.* beyond the range of torch.f"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path, spoil, option, message, monkeypatch
):
    read = write_source(tmp_path / "read", "tied" if spoil is unequal_head else "plain")
    if spoil:
        spoil(read)
    target = tmp_path / "target"
    monkeypatch.setitem(convert.__globals__, "replacing", None)  # calling it is an error
    with pytest.raises(ValueError, match=message):
        convert(read, target, **option)
    assert not target.exists()


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"],
)
def test_what_is_in_the_target_is_not_replaced_unasked(tmp_path, name):
    read = write_source(tmp_path / "read")
    (read / "tokenizer.json").write_text("new")
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_text("old")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds {name}: .*overwrite"):
        convert(read, target)
    assert contents(target) == {name: b"old", "notes.txt": b"mine"}
    convert(read, target, overwrite=True)
    assert contents(target) == contents(read) | {"notes.txt": b"mine"}


def test_a_target_that_is_a_file_and_a_full_disk_are_refused(tmp_path, monkeypatch):
    read = write_source(tmp_path / "read")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file: give a directory"):
        convert(read, tmp_path / "file", overwrite=True)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match="and 1,000 are free there"):
        convert(read, tmp_path / "deep" / "target")
    assert not (tmp_path / "deep").exists()


def test_a_plan_writes_nothing_and_says_what_will_be(tmp_path):
    read = write_source(tmp_path / "read", "mtp", shards=3)
    before = contents(read)
    plan = plan_conversion(read, tmp_path / "target", layers=(1, 3), experts="fused")
    assert not (tmp_path / "target").exists() and contents(read) == before
    assert plan.config.hybrid_override_pattern == "E-"
    plan.run()
    written = read_checkpoint(tmp_path / "target")
    assert {p.name for p in plan.pieces} == set(written)
    assert {p.name: tuple(p.shape) for p in plan.pieces} == {
        name: tuple(tensor.shape) for name, tensor in written.items()
    }
    assert plan.casts == {"bfloat16 -> bfloat16": 22, "float32 -> float32": 2}
