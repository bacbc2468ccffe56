"""Files from outside: regular ones alone, no more than is allowed, and only what can be written."""

import json
import os
import socket
import time

import pytest

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.config.files import (
    DEEPEST,
    WIDEST,
    open_regular,
    parse_object,
    read_bytes,
    read_object,
    read_text,
)


def nested(depth: int) -> str:
    """An object that holds lists inside one another, with blanks so that it is no bracket bomb."""
    return '{"a":' + "[          " * (depth - 1) + "]          " * (depth - 1) + "}"


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


SPECIAL = {
    "a directory": lambda path: path.mkdir(),
    "a named pipe": make_pipe,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("read", [open_regular, read_bytes, read_text, read_object])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, kind, read):
    SPECIAL[kind](tmp_path / "f")
    with pytest.raises(ValueError, match=f"f: is {kind}: give a regular file"):
        read(tmp_path / "f")


@pytest.mark.parametrize("kind", ["a named pipe", "a device"])
def test_a_config_that_is_no_regular_file(tmp_path, kind):
    SPECIAL[kind](tmp_path / "config.json")
    with pytest.raises(ValueError, match=f"config.json: is {kind}"):
        NemotronV3Config.from_json(tmp_path)


def test_a_link_to_a_regular_file_is_read_and_an_absent_one_is_an_os_error(tmp_path):
    (tmp_path / "f").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to(tmp_path / "f")
    assert read_object(tmp_path / "link") == {"a": 1}
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "other")


def test_no_more_is_read_than_is_allowed(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 10)
    assert read_bytes(tmp_path / "f", 10) == b"x" * 10
    with pytest.raises(ValueError, match="f: 10 bytes, more than the 9 that are read"):
        read_bytes(tmp_path / "f", 9)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10 * 10**9)  # takes no room on the disk
    started = time.monotonic()
    with pytest.raises(ValueError, match="10000000000 bytes, more than"):
        read_object(tmp_path / "large")
    assert time.monotonic() - started < 1


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux has such files")
def test_a_file_that_does_not_tell_its_size_is_bounded_too():
    assert os.stat("/proc/self/status").st_size == 0
    with pytest.raises(ValueError, match="101 bytes, more than the 100"):
        read_bytes("/proc/self/status", 100)


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"\\\\ud800"', '"ü\\u0000"', '"\U0001f600"'])
def test_text_that_can_be_written_is_read(text):
    value = parse_object('{"a": %s}' % text, "x")  # noqa: UP031
    assert value == {"a": json.loads(text)}
    json.dumps(value, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ('{"a": "\\ud800"}', r"half of a surrogate pair, '\\ud800'"),
        ('{"\\uDFFF": 1}', "half of a surrogate pair"),
        ('{"a": [{"b": "x\\udc00\\ud800"}]}', "half of a surrogate pair"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"a": "\ud800"}', "not UTF-8"),  # a str that holds one itself
        ('{"a": 1}'.encode("utf-16"), "byte order mark"),
        ('{"a": 18446744073709551616}', "number 18446744073709551616... of 20 digits is not in 64"),
        ('{"a": -9223372036854775809}', "not in 64 bits"),
        ('{"a": %s}' % ("9" * 10**6), "of 1000000 digits"),
        ('{"a": 1e999}', "number 1e999... is not in 64 bits"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' stands there twice"),
        (nested(DEEPEST + 1), f"more than {DEEPEST} deep"),
        (nested(900), "more than|not a whole JSON"),
        (nested(100_000), "not a whole JSON"),
        ("[" * 100_000, "mostly brackets"),
        ("[1]", "holds a JSON list"),
        ("", "not a whole JSON"),
    ],
)
def test_what_could_not_be_written_again_is_refused(raw, told):
    with pytest.raises(ValueError, match=f"^where: .*{told}"):
        parse_object(raw, "where")


def test_the_largest_numbers_and_the_deepest_object_are_read():
    whole = parse_object('{"a": [18446744073709551615, -9223372036854775808, 1e308]}', "x")
    assert whole == {"a": [2**64 - 1, -(2**63), 1e308]}
    assert parse_object(nested(DEEPEST), "x").keys() == {"a"}


def test_an_integer_outside_64_bits_is_read_where_that_is_asked_for():
    wide = parse_object('{"a": %s}' % ("9" * WIDEST), "x", wide_integers=True)
    assert wide == {"a": 10**WIDEST - 1}
    with pytest.raises(ValueError, match=f"of {WIDEST + 1} digits is too long"):
        parse_object('{"a": %s}' % ("9" * (WIDEST + 1)), "x", wide_integers=True)


def deep(depth: int):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "told"),
    [("\ud800", "surrogate"), (2**64, "64 bits"), (deep(100), "brackets"), (deep(10**5), "deep")],
    ids=["surrogate", "number", "deep", "deeper"],
)
def test_a_mapping_that_no_file_could_hold_is_no_config(value, told):
    with pytest.raises(ValueError, match=told):
        NemotronV3Config.from_dict({"hybrid_override_pattern": "M", "note": value})
