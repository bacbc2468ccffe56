import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_v3.data import read
from nemotron_v3.data.find import File, find_files
from nemotron_v3.data.options import Source
from nemotron_v3.data.read import read_records, read_text_part, units_of
from tests.data.samples import write_jsonl

sizes = st.integers(4, 200)


def file_of(path) -> File:
    return find_files(Source(str(path))).files[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("read")


@given(st.lists(st.text(alphabet="aé\\n漢 ", max_size=20), max_size=20), sizes, st.booleans())
def test_each_line_is_read_once_whatever_the_units(folder, texts, size, ends):
    raw = b"\n".join(
        json.dumps({"text": t}, ensure_ascii=False).encode() if t else b"" for t in texts
    )
    path = folder / "lines.jsonl"
    path.write_bytes(raw + b"\n" * ends)
    before, read.UNIT_BYTES = read.UNIT_BYTES, size
    try:
        units = units_of(file_of(path), "text")
        found, line = [], 0
        for unit in units:
            records = list(read_records(unit, "text"))
            assert [r.line for r in records] == list(range(1, len(records) + 1))
            found += [(line + r.line, r.value["text"]) for r in records if r.value is not None]
            assert not any(r.why for r in records)
            line += len(records)
    finally:
        read.UNIT_BYTES = before
    assert found == [(number, t) for number, t in enumerate(texts, 1) if t]


@given(st.text(alphabet="ab é漢\n\t.", max_size=200), st.integers(32, 80))
def test_the_parts_of_a_text_are_the_text_and_begin_at_lines(folder, text, size):
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    before, read.UNIT_BYTES = read.UNIT_BYTES, size
    try:
        parts = [read_text_part(unit) for unit in units_of(file_of(path), "text")]
    finally:
        read.UNIT_BYTES = before
    assert "".join(parts) == text


def test_a_part_begins_at_a_line_that_begins_with_a_letter_or_digit(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "UNIT_BYTES", 40)
    (tmp_path / "a.txt").write_text("\u3000x\n  y\nz漢\n" * 3 + "漢\n1\n")
    units = units_of(file_of(tmp_path / "a.txt"), "text")
    parts = [read_text_part(unit) for unit in units]
    assert len(parts) > 1 and all(part[0].isalnum() for part in parts[1:] if part)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    (unit,) = units_of(file_of(tmp_path / "a.txt"), "text")
    assert read_text_part(unit) == "hello"
    (unit,) = units_of(file_of(tmp_path / "b.jsonl"), "text")
    assert [r.value for r in read_records(unit, "text")] == [{"text": "hello"}]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"text": 1', "not JSON: Expecting ',' delimiter at column 11"),
        (b"[1]", "a JSON list, not an object"),
        (b"\xff\xfe", "not UTF-8: byte 0xff at 0"),
        (b"[" * 100_000, "not JSON that can be read: maximum recursion depth"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON that can be read: Exceeds the limit"),
        (b'{"text": "a", "text": "b"}', "the key 'text' stands there twice"),
        (b'{"text": "a", "tools": [{"b": 1, "b": 2}]}', "the key 'b' stands there twice"),
    ],
)
def test_a_line_that_is_no_object_says_why(tmp_path, raw, why):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + raw + b'\n{"text": "y"}\n')
    (unit,) = units_of(file_of(tmp_path / "a.jsonl"), "text")
    first, second, third = read_records(unit, "text")
    assert (first.value, third.value) == ({"text": "x"}, {"text": "y"})
    assert second.value is None and second.line == 2 and why in second.why


def test_a_line_that_is_too_long_is_read_over(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "LONGEST_LINE", 100)
    monkeypatch.setattr(read, "UNIT_BYTES", 50)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("x", "y" * 500, "z")])
    records = [r for unit in units_of(file_of(path), "text") for r in read_records(unit, "text")]
    assert [r.value and r.value["text"] for r in records] == ["x", None, "z"]
    assert records[1].why == "longer than 100 bytes"


def test_a_file_that_changes_is_not_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (unit,) = units_of(file_of(path), "text")
    write_jsonl(path, [{"text": "y"}, {"text": "z"}])
    with pytest.raises(RuntimeError, match=r"a\.jsonl changed while it was read"):
        list(read_records(unit, "text"))


def names(source: Source) -> list[str]:
    return [file.name for file in find_files(source).files]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a/c.md", "a/d.jsonl", ".git/e.txt", "f.py", "a/g.py", "h.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_a_folder_means_its_files_of_known_formats_in_order(tree):
    found = find_files(Source(str(tree)))
    assert [(f.name, f.format) for f in found.files] == [
        ("a/c.md", "text"),
        ("a/d.jsonl", "jsonl"),
        ("b.txt", "text"),
        ("h.parquet", "parquet"),
    ]
    assert found.left_out == {".py": 2}
    assert names(Source(str(tree), "text")) == ["a/c.md", "b.txt"]


def test_a_glob_means_what_it_matches(tree):
    assert names(Source(f"{tree}/**/*.py", "text")) == ["a/g.py", "f.py"]
    with pytest.raises(ValueError, match=r"no format is known by the ending '\.py'"):
        find_files(Source(f"{tree}/**/*.py"))
    with pytest.raises(ValueError, match="matches no file"):
        find_files(Source(f"{tree}/*.jsonl"))


def test_what_is_not_there_is_named(tree):
    with pytest.raises(ValueError, match=r"none\.txt does not exist: give a file"):
        find_files(Source(str(tree / "none.txt")))
    (tree / "only").mkdir()
    (tree / "only" / "x.csv").write_text("1")
    with pytest.raises(ValueError, match=r"only holds no file that ends in .*\(others: 1 of \.csv"):
        find_files(Source(str(tree / "only")))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="neither a regular file nor a folder"):
        find_files(Source(str(tmp_path / "pipe.txt")))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_left_out_of_a_folder_is_counted(tree):
    os.mkfifo(tree / "pipe.txt")
    (tree / "away.txt").symlink_to(tree / "nowhere.txt")
    (tree / "more").symlink_to(tree / "a")
    (tree / "same.txt").symlink_to(tree / "b.txt")
    found = find_files(Source(str(tree)))
    assert found.left_out == {
        ".py": 2,
        "links to folders or nothing": 2,
        "pipes, sockets or devices": 1,
    }
    assert "same.txt" in names(Source(str(tree)))


@pytest.mark.parametrize("twice", ["text", "tools"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path, twice):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array(["one"]), pyarrow.array(["two"]), pyarrow.array(["three"])]
    parquet.write_table(
        pyarrow.table(columns, names=["text", twice, twice]), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=f"columns '{twice}': give one"):
        units_of(file_of(tmp_path / "a.parquet"), "text")
