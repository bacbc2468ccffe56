import errno
import json
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemotron_v3.data import read, tokenize, write
from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.options import Source
from nemotron_v3.data.store import LENGTHS, SIZES, TOKENS
from nemotron_v3.data.tokenize import open_store
from tests.data.samples import EOS, TEMPLATE, byte_tokenizer, chat, ids, packed, write_jsonl

BROKEN = [{"text": f"line {n}"} for n in range(1, 12)]


def documents(data) -> list[list[int]]:
    """All documents of the stores, in the order of their files."""
    with data:
        return [
            store.read(start, length).tolist()
            for store in data._stores
            for start, length in zip(store.starts.tolist(), store.lengths.tolist(), strict=True)
        ]


def refused(tmp_path, *sources, **options) -> str:
    """The error, after which nothing is left in the cache."""
    with pytest.raises(ValueError) as error:
        packed(tmp_path, *sources, **options)
    assert [p.name for p in (tmp_path / "cache").glob("*") if p.suffix != ".lock"] == []
    return str(error.value)


def test_a_broken_line_is_named_and_the_others_are_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", BROKEN)
    lines = path.read_text().splitlines()
    lines[6] = lines[6][:-3]
    path.write_text("\n".join(lines))
    data = packed(tmp_path, path)
    (bad,) = data.report().bad
    assert (bad.file, bad.line) == (str(path), 7)
    assert str(bad).startswith(f"{path}:7: not JSON: ")
    assert f"    {path}:7: not JSON" in str(data.report())
    expected = [ids(row["text"]) for n, row in enumerate(BROKEN, 1) if n != 7]
    assert documents(data) == expected


def test_lines_are_counted_through_units_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "UNIT_BYTES", 32)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "x"}, 3, {"text": "y" * 50}, {"text": "z"}])
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": "x"}] * 9 + [4] + [{"text": "x"}])
    with packed(tmp_path, tmp_path / "in") as data:
        found = [(Path(bad.file).name, bad.line) for bad in data.report().bad]
    assert found == [("a.jsonl", 2), ("b.jsonl", 10)]


def test_too_many_bad_lines_stop_before_anything_is_kept(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] + [{"body": "y"}] * 101)
    told = refused(tmp_path, path)
    assert "more than 100 bad lines" in told
    assert f"{path}:2: no field 'text': there are 'body'" in told and "and 96 more" in told
    write_jsonl(path, [{"text": "x"}] + [{"body": "y"}] * write.MOST_BAD)
    with packed(tmp_path, path) as data:
        assert len(data.report().bad) == write.MOST_BAD


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"", "holds no document to train on (1 empty)"),
        ("a.txt", b" \n\n", "(1 empty)"),
        ("a.jsonl", b"", "(no lines)"),
        ("a.jsonl", b"\n\n", "(no lines)"),
        ("a.txt", bytes(range(256)) * 20, "a.txt: holds NUL bytes"),
        ("a.txt", b"text\xff\xfe", "a.txt: not UTF-8: byte 0xff at 4"),
        ("a.txt", "text".encode("utf-16"), "a.txt: holds NUL bytes: a binary file, or text in UTF"),
        ("a.jsonl", b"\x7fELF\x00\n\x01\x02", "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"body": "x"}', "a.jsonl:1: no field 'text': there are 'body'"),
        ("a.parquet", b"PAR1 no", "a.parquet is no Parquet file that can be read"),
    ],
)
def test_a_file_without_a_document_says_why(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    assert message in refused(tmp_path, tmp_path / name)


def test_a_binary_file_among_others_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"\0\1\2")
    (tmp_path / "in" / "b.txt").write_text("hello")
    (tmp_path / "in" / "c.txt").write_text("")
    data = packed(tmp_path, tmp_path / "in")
    report = data.report()
    assert [(Path(b.file).name, b.line) for b in report.bad] == [("a.txt", 0)]
    assert report.sources[0].empty == 1
    assert documents(data) == [ids("hello")]


def test_a_long_text_is_read_in_parts_and_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "UNIT_BYTES", 64)
    (tmp_path / "in").mkdir()
    text = "".join(f"{n} line\n  indented\n" for n in range(100))
    (tmp_path / "in" / "a.txt").write_text(text)
    # A part that is no text takes the whole document along, and leaves those around it.
    (tmp_path / "in" / "b.txt").write_bytes(text.encode()[:500] + b"\xff" + text.encode())
    (tmp_path / "in" / "c.txt").write_text("end")
    data = packed(tmp_path, tmp_path / "in")
    assert "byte 0xff at 500" in str(data.report())
    assert documents(data) == [ids(text), ids("end")]


def test_parquet_gives_its_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    texts = [f"row {n}" for n in range(1200)] + [None, ""]
    table = pyarrow.table({"other": list(range(1202)), "body": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    data = packed(tmp_path, Source(str(tmp_path / "a.parquet"), field="body"))
    assert [(b.line, b.why[:27]) for b in data.report().bad] == [
        (1201, "the field 'body' is None: n")
    ]
    assert data.report().sources[0].empty == 1
    assert documents(data) == [ids(text) for text in texts[:1200]]
    # Pages that were lost: the file is named, whatever pyarrow says.
    raw = (tmp_path / "a.parquet").read_bytes()
    end = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    (tmp_path / "b.parquet").write_bytes(raw[:4] + bytes(end - 4) + raw[end:])
    with pytest.raises((OSError, ValueError), match=r"b\.parquet"):
        packed(tmp_path, Source(str(tmp_path / "b.parquet"), field="body"))
    told = refused(tmp_path / "x", tmp_path / "a.parquet")
    assert "has no column 'text': give the field of one of other, body" in told


def test_parquet_gives_chats(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [chat("hi", "yes"), chat("why?", "so", "hm", "ok")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", rows)
    by_format = [
        documents(packed(tmp_path, tmp_path / name, chat_template=TEMPLATE))
        for name in ("a.parquet", "a.jsonl")
    ]
    assert by_format[0] == by_format[1] and len(by_format[0]) == 2


def test_a_saved_data_set_gives_the_rows_of_its_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = {"train": [f"row {n}" for n in range(600)], "test": ["x"]}
    parts = {k: datasets.Dataset.from_dict({"text": v}) for k, v in texts.items()}
    parts["train"] = parts["train"].add_column("other", list(range(600)))
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    for split, expected in texts.items():
        data = packed(tmp_path, Source(str(tmp_path / "set"), split=split))
        assert documents(data) == [ids(text) for text in expected]
    told = refused(tmp_path / "x", Source(str(tmp_path / "set"), split="dev"))
    assert "has no split 'dev': there are train, test" in told
    told = refused(tmp_path / "x", Source(str(tmp_path / "none"), "datasets"))
    assert "the datasets library cannot load" in told


def test_chats_need_a_template_that_fits(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("hi", "yes")])
    assert f"{path}: it holds chats (messages), and there is no chat template" in refused(
        tmp_path, path
    )
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "marks no assistant's words" in refused(tmp_path, path, chat_template=plain)
    write_jsonl(path, [chat("hi")])
    assert "(1 without a word of the assistant's)" in refused(
        tmp_path, path, chat_template=TEMPLATE
    )
    assert "chat_template is 'none.jinja': give a template's file" in refused(
        tmp_path, path, chat_template="none.jinja"
    )


def test_a_template_comes_from_a_file_or_a_folder(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("hi", "yes")])
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + "{{ eos_token }}")
    about = {"eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    found = [
        documents(packed(tmp_path, path, chat_template=str(place)))
        for place in (tmp_path, tmp_path / "chat_template.jinja")
    ]
    assert found[0] == found[1] and found[0][0][-1] == ~EOS


def test_tokens_are_found_again_and_made_anew_where_something_changed(tmp_path, monkeypatch):
    made = []

    def counted(*arguments):
        made.append(1)
        make(*arguments)

    make = tokenize._make
    monkeypatch.setattr(tokenize, "_make", counted)
    path = write_jsonl(tmp_path / "a.jsonl", BROKEN)
    for options in ({}, {"seed": 1}, {"tokens_per_row": 64}, {"workers": 1}):
        packed(tmp_path, path, **options).close()
    assert len(made) == 1
    packed(tmp_path, path, train_on="all").close()
    write_jsonl(path, [*BROKEN, {"text": "more"}])
    assert documents(packed(tmp_path, path))[-1] == ids("more")
    assert len(made) == 3


def test_two_that_want_the_same_at_once_make_it_once(tmp_path, monkeypatch):
    made = []

    def slowly(*arguments):
        made.append(1)
        time.sleep(0.3)
        make(*arguments)

    make = tokenize._make
    monkeypatch.setattr(tokenize, "_make", slowly)
    path = write_jsonl(tmp_path / "a.jsonl", BROKEN)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: documents(packed(tmp_path, path)), range(3)))
    assert made == [1] and found[0] == found[1] == found[2] and len(found[0]) == len(BROKEN)


@pytest.mark.parametrize("file", [TOKENS, LENGTHS, SIZES, "about.json"])
def test_a_damaged_store_is_made_anew(tmp_path, file):
    path = write_jsonl(tmp_path / "a.jsonl", BROKEN)
    packed(tmp_path, path).close()
    (damaged,) = (tmp_path / "cache").glob(f"*/{file}")
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert documents(packed(tmp_path, path)) == [ids(row["text"]) for row in BROKEN]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", BROKEN)
    packed(tmp_path, path).close()
    (store,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    store.rename(store.with_name(f".{store.name}.01234567.tmp"))
    assert len(documents(packed(tmp_path, path))) == len(BROKEN)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {store.name, f"{store.name}.lock"}


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", BROKEN)

    def full(self, ids):
        self._tokens.write(ids[: len(ids) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left.*set NEMO"):
        patch.setattr(write.StoreWriter, "_append", full)
        packed(tmp_path, path)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(documents(packed(tmp_path, path))) == len(BROKEN)


def test_a_file_does_not_stand_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "UNIT_BYTES", 2**15)
    line = "alpha beta gamma\n"
    (tmp_path / "a.txt").write_text(line * (2**21 // len(line)))
    tracemalloc.start()
    try:
        with packed(tmp_path, tmp_path / "a.txt", tokens_per_row=4096) as data:
            tokens, peak = data.report().tokens, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tokens == (tmp_path / "a.txt").stat().st_size + 1
    # A token a byte: a list of all of them would take 8 bytes each.
    assert peak < 2 * tokens


def test_the_bytes_of_each_document_are_those_of_its_targets_text(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "UNIT_BYTES", 40)
    texts = ["ä plain text", "x"]
    lines = write_jsonl(tmp_path / "a.jsonl", [*({"text": t} for t in texts), chat("hm", "€ yes")])
    long = "One line of a text, in umläuts.\n" * 9
    (tmp_path / "b.txt").write_text("\ufeff" + long, encoding="utf-8")
    encoder = Encoder.of(byte_tokenizer(), TEMPLATE)
    kept = []
    for path in (lines, tmp_path / "b.txt"):
        store, _ = open_store(Source(str(path)), encoder, 0, tmp_path / "cache")
        kept += store.sizes.tolist()
        store.close()
    expected = [*texts, "€ yes<end>", long]
    assert kept == [len(text.encode()) for text in expected]
