"""A file that claims what is not so is a ValueError, and the cache as it was."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemotron_v3 import NemotronHybridCache
from tests.models import tiny_model, tokens

MODEL = tiny_model("M*").requires_grad_(False)
WINDOW = 2


def filled(lengths=(9, 4), seed: int = 0, **options) -> NemotronHybridCache:
    cache = NemotronHybridCache(MODEL.config, 2, rollback_window=WINDOW, **options)
    mask = torch.zeros(2, max(lengths))
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    MODEL(tokens(2, max(lengths), seed=seed), mask, past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The tensors, the notes and the header of a file."""
    path = tmp_path_factory.mktemp("parts") / "cache"
    filled().save(path)
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    return load_file(path), notes, json.loads(notes["header"])


def write(path, parts, header=None, tensors=None, text=None, notes=None) -> None:
    held, told, head = parts
    text = json.dumps(head | (header or {})) if text is None else text
    save_file(held | (tensors or {}), path, told | {"header": text} | (notes or {}))


def refused(path, told: str) -> None:
    """`load` raises a ValueError, and the cache goes on as one that never loaded."""
    cache, never = filled((3, 5), seed=1), filled((3, 5), seed=1)
    with pytest.raises(ValueError, match=told):
        cache.load(path)
    assert cache.withheld is None and cache.lengths == never.lengths
    new = tokens(2, 1, seed=2)
    assert torch.equal(*(MODEL(new, past_key_values=c).logits for c in (cache, never)))


def test_the_file_as_it_was_saved_is_loaded(tmp_path, parts):
    write(tmp_path / "f", parts)
    cache = filled((3, 5), seed=1)
    cache.load(tmp_path / "f")
    new = tokens(2, 1, seed=2)
    assert torch.equal(*(MODEL(new, past_key_values=c).logits for c in (cache, filled())))


HUGE = 2**63
HEADERS = {
    "fewer tokens than keys": {"lengths": [5, 4], "floors": [5, 4]},
    "more tokens than keys": {"lengths": [50, 4], "floors": [50, 4]},
    "text": {"lengths": ["9", 4]},
    "a fraction": {"lengths": [9.0, 4]},
    "true": {"lengths": [9, True]},
    "nothing": {"lengths": [9, None]},
    "negative": {"lengths": [9, -4]},
    "huge": {"lengths": [9, HUGE]},
    "not a number": {"lengths": [9, float("nan")]},
    "infinite": {"lengths": [float("inf"), 4]},
    "a list in it": {"lengths": [[9], 4]},
    "one row": {"lengths": [9], "floors": [7]},
    "three rows": {"lengths": [9, 4, 1], "floors": [7, 2, 1]},
    "no list of lengths": {"lengths": 9},
    "text in place of a list": {"lengths": "94", "floors": "72"},
    "floors of another number": {"floors": [7]},
    "floors too low": {"floors": [6, 2]},
    "floors below 0": {"floors": [7, -1]},
    "floors above the length": {"floors": [10, 2]},
    "floors as text": {"floors": ["7", "2"]},
    "a fraction as floor": {"floors": [7.5, 2]},
    "a floor that is no number": {"floors": [float("nan"), 2]},
    "a layer it does not have": {"behind": [2]},
    "a layer named twice": {"behind": [1, 1]},
    "a layer as text": {"behind": ["1"]},
    "true as a layer": {"behind": [True]},
    "a number as layers": {"behind": 1},
    "another window": {"rollback_window": 3},
    "a fraction as window": {"rollback_window": 2.0},
    "another dtype": {"dtype": "bfloat16"},
    "no config": {"config": None},
    "what no cache tells": {"more": 1},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(tmp_path, parts, name):
    write(tmp_path / "f", parts, HEADERS[name])
    refused(tmp_path / "f", str(tmp_path / "f"))


@pytest.mark.parametrize("name", ["lengths", "floors", "config", "dtype", "rollback_window"])
def test_a_header_that_lacks_something(tmp_path, parts, name):
    text = json.dumps({n: v for n, v in parts[2].items() if n != name})
    write(tmp_path / "f", parts, text=text)
    refused(tmp_path / "f", f"does not tell {name}")


def test_a_file_of_before_layers_could_be_left_out_is_loaded(tmp_path, parts):
    text = json.dumps({n: v for n, v in parts[2].items() if n != "behind"})
    write(tmp_path / "f", parts, text=text)
    filled().load(tmp_path / "f")


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "", "{", "9", "[" * 100_000 + "]" * 100_000, '{"lengths": [9], "lengths": [4]}',
     '{"a":' + "[          " * 900 + "]          " * 900 + "}", '{"\\ud800": 1}',
     '{"lengths": [%s]}' % ("9" * 5000)],
)  # fmt: skip
def test_a_header_that_is_none(tmp_path, parts, text):
    write(tmp_path / "f", parts, text=text)
    refused(tmp_path / "f", str(tmp_path / "f"))


def test_another_format(tmp_path, parts):
    write(tmp_path / "f", parts, notes={"format": "nemotron_v3.cache.2"})
    refused(tmp_path / "f", "is no cache")
    save_file(parts[0], tmp_path / "f", {"format": "nemotron_v3.cache.1"})
    refused(tmp_path / "f", "is no cache")


TENSORS = {
    "keys and values of too few places": lambda t: {
        n: t[n][:, :, :5].contiguous() for n in ("1.keys", "1.values")
    },
    "keys of too few places": lambda t: {"1.keys": t["1.keys"][:, :, :5].contiguous()},
    "keys of another rank": lambda t: {"1.keys": t["1.keys"].flatten(2)},
    "keys of more rows": lambda t: {"1.keys": t["1.keys"].repeat(2, 1, 1, 1)},
    "keys without elements": lambda t: {"1.keys": t["1.keys"][:, :, :0].contiguous()},
    "a state without elements": lambda t: {"0.ssm": torch.empty(0)},
    "a state of another dtype": lambda t: {"0.conv": t["0.conv"].double()},
    "a state of integers": lambda t: {"0.ssm": t["0.ssm"].int()},
    "keys of 8 bits": lambda t: {"1.keys": t["1.keys"].to(torch.float8_e4m3fn)},
    "a window of three": lambda t: {"0.past_ssm": torch.cat([t["0.past_ssm"]] * 2, 1)},
    "a tensor that no cache has": lambda t: {"2.keys": torch.ones(1)},
    "another name": lambda t: {"keys": torch.ones(1)},
    "NaN behind the shorter row": lambda t: {"1.keys": _behind(t["1.keys"], float("nan"))},
    "numbers behind the shorter row": lambda t: {"1.values": _behind(t["1.values"], 1.0)},
}


def _behind(tensor, value):
    tensor = tensor.clone()
    tensor[1, :, 4:] = value
    return tensor


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_those_of_the_header(tmp_path, parts, name):
    write(tmp_path / "f", parts, tensors=TENSORS[name](parts[0]))
    refused(tmp_path / "f", str(tmp_path / "f"))


@pytest.mark.parametrize("name", ["0.conv", "0.past_ssm", "1.values"])
def test_a_tensor_that_is_not_there(tmp_path, parts, name):
    tensors, notes, header = parts
    held = {n: t for n, t in tensors.items() if n != name}
    save_file(held, tmp_path / "f", notes)
    refused(tmp_path / "f", f"lacks .'{name}'")


def test_a_tensor_named_twice(tmp_path, parts):
    write(tmp_path / "f", parts)
    raw = (tmp_path / "f").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)["0.conv"]).encode()
    header = header[:-1] + b', "0.conv": ' + entry + b"}"
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    refused(tmp_path / "f", "'0.conv' stands there twice")


@pytest.mark.parametrize("length", [2**60, 2**63, 33 * 2**20, 0])
def test_a_header_of_a_length_that_cannot_be(tmp_path, parts, length):
    write(tmp_path / "f", parts)
    raw = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(length.to_bytes(8, "little") + raw[8:])
    refused(tmp_path / "f", "no whole safetensors file")


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is a named pipe")
    refused(tmp_path, "is a directory")
    refused("/dev/zero", "is a device")
    with pytest.raises(FileNotFoundError):
        filled().load(tmp_path / "nowhere")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="is no regular file"):
            filled().save(path)


def test_a_snapshot_whose_positions_lie_is_refused_too():
    cache = filled()
    snapshot = cache.snapshot()
    for changes in ({"floors": (0, 0)}, {"lengths": (9, -1)}, {"behind": frozenset({7})}):
        lying = type(snapshot)(**vars(snapshot) | changes)
        with pytest.raises(ValueError, match="the snapshot"):
            cache.restore(lying)
    cache.restore(snapshot)


def test_a_layer_that_was_left_out_holds_fewer_keys_and_comes_back_so(tmp_path):
    cache = NemotronHybridCache(MODEL.config, 2)
    MODEL(tokens(2, 3), past_key_values=cache)
    MODEL.model.layers[0](torch.ones(2, 70, 48), past_key_values=cache)
    cache.finish()
    cache.save(tmp_path / "f")
    again = NemotronHybridCache(MODEL.config, 2)
    again.load(tmp_path / "f")
    assert again.lengths == (73, 73) and again._behind == {1}
    assert torch.equal(again.states[1].keys[:, :, :3], cache.states[1].keys[:, :, :3])
