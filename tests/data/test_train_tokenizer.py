import pytest

from nemotron_v3.data import read, train_tokenizer
from nemotron_v3.data.options import Source
from nemotron_v3.data.tokenizer import Tokenizer
from tests.data.samples import chat, write_jsonl

TEXTS = ["def add(self, a):\n    return a\n" * 5, "größer als 漢字 🙂 " * 9]


def vocabulary(tokenizer: Tokenizer) -> str:
    return tokenizer.backend.to_str()


def test_it_is_the_tokenizer_of_the_documents_texts(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0], newline="")
    lines = [{"text": TEXTS[1]}, {"body": "z" * 99}, 3, {"text": "\ud800"}, chat(*TEXTS)]
    write_jsonl(tmp_path / "b.jsonl", lines)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\0")
    found = train_tokenizer.train_tokenizer([Source(str(tmp_path))], 300)
    assert vocabulary(found) == vocabulary(Tokenizer.train([*TEXTS, *TEXTS], 300))


def test_of_large_files_parts_are_taken_that_are_spread_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "UNIT_BYTES", 1000)
    monkeypatch.setattr(train_tokenizer, "UNIT_BYTES", 1000)
    texts = [letter * 999 + "\n" for letter in "abcdefgh"]
    (tmp_path / "a.txt").write_text("".join(texts), newline="")
    found = train_tokenizer.train_tokenizer([Source(str(tmp_path / "a.txt"))], 270, 4000)
    assert vocabulary(found) == vocabulary(Tokenizer.train(texts[::2], 270))


def test_without_a_text_it_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"a\.txt hold no text to make a tokenizer of"):
        train_tokenizer.train_tokenizer([Source(str(tmp_path / "a.txt"))], 300)
