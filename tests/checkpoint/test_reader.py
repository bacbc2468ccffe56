import json
import os

import pytest
import torch
from safetensors.torch import save_file

from nemotron_v3.checkpoint import CheckpointError, open_checkpoint
from tests.checkpoint.files import assert_same, released_tensors, write_checkpoint
from tests.models import tiny_config

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors():
    return released_tensors(tiny_config())


def change_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_the_library_wrote_it(tmp_path, tensors, shards):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, shards=shards))
    assert len(checkpoint) == len(tensors)
    assert_same({name: checkpoint.tensor(name) for name in checkpoint}, tensors)
    for name in checkpoint:
        checkpoint.drop(name)
    assert_same({name: checkpoint.tensor(name) for name in checkpoint}, tensors)


def test_tensors_at_odd_places_are_read_too(tmp_path):
    listing = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "BF16", "shape": [], "data_offsets": [11, 13]},
    }
    header = json.dumps(listing).encode()
    expected = {
        "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "b": torch.tensor([1.5, -2.5]),
        "c": torch.tensor(3.0, dtype=torch.bfloat16),
    }
    raw = b"".join(bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in expected.values())
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert_same({name: checkpoint.tensor(name) for name in checkpoint}, expected)


def test_a_tensor_outlives_the_file_and_its_reader(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors)
    held = open_checkpoint(tmp_path).tensor("lm_head.weight")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(held, tensors["lm_head.weight"])


def test_writing_into_a_tensor_leaves_the_file_alone(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors)
    before = (tmp_path / "model.safetensors").read_bytes()
    open_checkpoint(tmp_path).tensor("lm_head.weight").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "file",
    ["../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", "..\\a.safetensors",
     "C:a.safetensors", "a\0.safetensors", ".a.safetensors", "a.bin", "", 3, None, ["a"]],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_its_directory(tmp_path, tensors, file):
    write_checkpoint(tmp_path, tensors, shards=2)
    change_index(tmp_path, lambda index: index["weight_map"].update({"lm_head.weight": file}))
    with pytest.raises(CheckpointError, match="not plain names of .safetensors files"):
        open_checkpoint(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, shards=2)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = list(tensors)

    def change(index):
        del index["weight_map"][names[0]]
        index["weight_map"][names[1]] = first
        index["weight_map"]["backbone.layers.9.norm.weight"] = second

    change_index(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert set(caught.value.problems) == {
        f"{names[0]} is in {first} but not in the index",
        f"{names[1]} is not in {first}, where the index puts it",
        f"backbone.layers.9.norm.weight is not in {second}, where the index puts it",
    }


def test_a_tensor_in_two_shards_is_refused(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    part = {name: tensors[name] for name in list(tensors)[1::2]}
    save_file(part | {"lm_head.weight": tensors["lm_head.weight"]}, file)
    with pytest.raises(CheckpointError, match="lm_head.weight is in both"):
        open_checkpoint(tmp_path)


def test_an_absent_shard_is_named(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', "[]", "nonsense", ""])
def test_an_index_without_a_map_is_refused(tmp_path, tensors, index):
    write_checkpoint(tmp_path, tensors, shards=2)
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match="index.json"):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors: truncated"):
        open_checkpoint(tmp_path)


def test_two_heads_in_one_directory_are_refused(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, shards=2)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="both model.safetensors and"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_by_name_and_never_opened(tmp_path, name):
    tiny_config().to_json(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=f"{name}, a pickle.*safetensors"):
        open_checkpoint(tmp_path)


def test_a_pickle_under_a_safetensors_name_is_seen_through(tmp_path, tensors):
    tiny_config().to_json(tmp_path)
    torch.save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a zip archive, as torch.save"):
        open_checkpoint(tmp_path)


def test_an_empty_directory_a_file_and_a_hub_name_get_a_way_out(tmp_path, tensors):
    with pytest.raises(CheckpointError, match="has no config.json"):
        open_checkpoint(tmp_path)
    tiny_config().to_json(tmp_path)
    with pytest.raises(CheckpointError, match="no model.safetensors and no"):
        open_checkpoint(tmp_path)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="give the directory it lies in"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="nothing is fetched from the network"):
        open_checkpoint("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")


def test_an_unreadable_file_is_a_checkpoint_error(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="model.safetensors: is a directory"):
        open_checkpoint(tmp_path)


def test_a_config_of_a_thousand_keys_is_refused(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors, {f"k{i}": i for i in range(1001)})
    with pytest.raises(CheckpointError, match="1001 keys"):
        open_checkpoint(tmp_path)
