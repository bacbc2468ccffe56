import io
import json

import pytest
import torch
from safetensors.torch import save

from nemotron_v3.checkpoint import CheckpointError
from nemotron_v3.checkpoint.header import MAX_JSON_BYTES, parse_json, read_header


def file_of(listing, data: bytes = b"", length: int | None = None) -> bytes:
    header = listing if isinstance(listing, bytes) else json.dumps(listing).encode()
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def parse(content: bytes):
    return read_header(io.BytesIO(content), len(content), "a.safetensors")


def claim(begin: int, end: int, shape=None, dtype: str = "F32"):
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def test_it_agrees_with_the_library_that_wrote_the_file():
    tensors = {
        "b": torch.zeros(3, 2, dtype=torch.bfloat16),
        "a": torch.zeros((), dtype=torch.float64),
        "nothing": torch.zeros(0, 5),
        "flags": torch.zeros(3, dtype=torch.bool),
    }
    content = save(tensors, metadata={"format": "pt", "note": "ü"})
    entries, notes = parse(content)
    assert notes == {"format": "pt", "note": "ü"}
    assert {n: e.shape for n, e in entries.items()} == {n: t.shape for n, t in tensors.items()}
    sizes = {n: e.end - e.begin for n, e in entries.items()}
    assert sizes == {n: t.numel() * t.itemsize for n, t in tensors.items()}
    assert [e.begin for e in entries.values()] == sorted(e.begin for e in entries.values())
    assert list(entries.values())[-1].end == len(content)


GOOD = claim(0, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        (b"\x00" * 8, "not a whole JSON document"),
        (file_of({"a": GOOD}, b"1234567"), "truncated"),
        (file_of({"a": GOOD}, b"123456789"), "1 bytes after"),
        (file_of({"a": GOOD}, b"12345678", length=2**63), "truncated or not safetensors"),
        (file_of({"a": GOOD}, b"12345678", length=9), "not a whole JSON document"),
        (file_of(b"[1]"), "holds a JSON list"),
        (file_of(b"null"), "holds a JSON NoneType"),
        (file_of(b'{"a": 1, "a": 2}'), "'a' stands there twice"),
        (file_of(b'{"a\xff": 1}'), "not UTF-8"),
        (file_of(b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "mostly brackets"),
        (
            file_of(b'{"a": ' + b'[{"                    ":' * 9000 + b"1" + b"}]" * 9000 + b"}"),
            "not a whole JSON document",
        ),
        (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "5000 digits"),
        (file_of({"a": 3}), "needs dtype, shape and data_offsets"),
        (file_of({"a": GOOD | {"more": 1}}, b"12345678"), "nothing else"),
        (file_of({"a": GOOD | {"dtype": "F31"}}, b"12345678"), "unknown dtype 'F31'"),
        (file_of({"a": GOOD | {"dtype": ["F32"]}}, b"12345678"), "unknown dtype"),
        (file_of({"a": GOOD | {"shape": [-2]}}, b"12345678"), "not a list of sizes"),
        (file_of({"a": GOOD | {"shape": [2.0]}}, b"12345678"), "not a list of sizes"),
        (file_of({"a": GOOD | {"shape": [True, 2]}}, b"12345678"), "not a list of sizes"),
        (file_of({"a": GOOD | {"shape": [1] * 9}}, b"12345678"), "not a list of sizes"),
        (file_of({"a": GOOD | {"shape": [2**61, 2**61]}}, b"12345678"), "does not take"),
        (file_of({"a": claim(0, 0, [0, 2**40, 2**40])}), "is not in 64 bits"),
        (file_of({"a": GOOD | {"shape": [3]}}, b"12345678"), "does not take the 8 bytes"),
        (file_of({"a\ud800": GOOD}, b"12345678"), r"surrogate pair, '.ud800'"),
        (file_of({"a": GOOD, "__metadata__": {"note": "\udfff"}}, b"12345678"), "surrogate pair"),
        (file_of({"a": GOOD | {"data_offsets": [8, 0]}}, b"12345678"), "does not take the -8"),
        (file_of({"a": GOOD | {"data_offsets": [0]}}, b"12345678"), "not two positions"),
        (file_of({"a": GOOD | {"data_offsets": [-8, 0]}}, b"12345678"), "not two positions"),
        (file_of({"a": GOOD, "b": claim(4, 12)}, b"1" * 12), "'b' overlaps"),
        (file_of({"a": GOOD, "b": claim(0, 8)}, b"1" * 8), "overlaps"),
        (file_of({"a": GOOD, "b": claim(12, 16)}, b"1" * 16), "'b' follows a gap"),
        (file_of({"__metadata__": {"a": 1}}), "strings to strings"),
        (file_of({"__metadata__": []}), "strings to strings"),
        (b"PK\x03\x04aaaaaaaa", "a zip archive, as torch.save"),
        (b"\x80\x02}q\x00(XXXX", "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    ],
)
def test_a_false_claim_is_refused_with_its_reason(content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(content)
    assert "a.safetensors" in str(caught.value)


def test_a_header_longer_than_any_real_one_is_refused_before_it_is_read():
    class Endless(io.RawIOBase):
        def read(self, size=-1):
            assert size == 8, "the header itself must not be read"
            return (MAX_JSON_BYTES + 1).to_bytes(8, "little")

    with pytest.raises(CheckpointError, match="a header of 33554433 bytes"):
        read_header(Endless(), 2**40, "a.safetensors")


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length):
    notes = {"pad": ""}
    notes["pad"] = "x" * (length - len(json.dumps({"__metadata__": notes})))
    text = json.dumps({"__metadata__": notes}).encode()
    assert len(text) == length and parse(file_of(text)) == ({}, notes)


def test_json_may_hold_the_bare_infinity_of_released_configs():
    assert parse_json(b'{"time_step_limit": [0.0, Infinity]}', "x") == {
        "time_step_limit": [0.0, float("inf")]
    }
