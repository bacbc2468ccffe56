"""A checkpoint's files are regular ones, and what it holds can be written again."""

import os

import pytest
import torch
from safetensors.torch import save_file

from nemotron_v3 import from_pretrained, save_pretrained
from nemotron_v3.checkpoint import CheckpointError, convert, open_checkpoint
from tests.models import tiny_config, tiny_model

CONFIG = tiny_config("M")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def whole(path, shards: int = 1):
    save_pretrained(tiny_model("M"), path, **({"max_shard_size": "20KB"} if shards > 1 else {}))
    return path


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def huge(path):
    with path.open("wb") as file:
        file.truncate(10 * 10**9)  # takes no room on the disk


@pytest.mark.parametrize("make", [pipe, device, huge, os.mkdir])
@pytest.mark.parametrize("name", ["config.json", INDEX, SINGLE])
def test_what_is_no_file_of_a_checkpoint_is_refused_at_once(tmp_path, name, make):
    whole(tmp_path, shards=2 if name == INDEX else 1)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX])
def test_a_directory_in_the_place_of_a_file_stops_a_save_before_anything_is_removed(tmp_path, name):
    config = (whole(tmp_path / "old") / "config.json").read_bytes()
    (tmp_path / "old" / name).unlink(missing_ok=True)
    (tmp_path / "old" / name).mkdir()
    held = sorted(os.listdir(tmp_path / "old"))
    with pytest.raises(CheckpointError, match=f"{name} is a directory: move it away"):
        save_pretrained(tiny_model("M"), tmp_path / "old")
    assert sorted(os.listdir(tmp_path / "old")) == held
    if name != "config.json":
        assert (tmp_path / "old" / "config.json").read_bytes() == config


def test_tensors_without_elements_are_carried_from_a_load_to_a_conversion(tmp_path):
    model = tiny_model("M")
    model.mtp = {
        "mtp.none": torch.empty(0, 5),
        "mtp.thin": torch.empty(3, 0, 2**40, dtype=torch.int64),
    }
    save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    save_pretrained(again, tmp_path / "c")
    for folder in "bc":
        held = {n: (t.shape, t.dtype) for n, t in from_pretrained(tmp_path / folder).mtp.items()}
        assert held == {n: (t.shape, t.dtype) for n, t in model.mtp.items()}


def test_a_weight_without_elements_is_another_shape(tmp_path):
    released = open_checkpoint(whole(tmp_path / "a"))
    tensors = {name: released.tensor(name).clone() for name in released}
    name = next(iter(tensors))
    (tmp_path / "b").mkdir()
    CONFIG.to_json(tmp_path / "b")
    save_file(tensors | {name: torch.empty(0)}, tmp_path / "b" / SINGLE)
    with pytest.raises(CheckpointError, match=name):
        from_pretrained(tmp_path / "b")
