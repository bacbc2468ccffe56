import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.data.tokenizer import SEPARATOR, SEPARATOR_ID, Tokenizer

TEXTS = [
    "def add(self, a, b):\n    return a + b\n" * 5,
    "class Café:\n\tname = 'naïve 漢字 🙂'\r\n\r\n    x_1 = 0x7f\n" * 5,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def test_vocabulary_holds_the_separator_first_and_every_byte(tokenizer):
    assert tokenizer.encode_documents([""]) == [[SEPARATOR_ID, SEPARATOR_ID]]
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("\x00")) == 1


@given(st.text())
def test_decoding_gives_the_text_back(text):
    tokenizer = Tokenizer.train(TEXTS, 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_that_spells_the_separator_is_text(tokenizer):
    text = f"a {SEPARATOR} b"
    ids = tokenizer.encode(text)
    assert SEPARATOR_ID not in ids
    assert tokenizer.decode(ids) == text


def test_documents_stand_between_separators(tokenizer):
    documents = tokenizer.encode_documents(TEXTS)
    for text, document in zip(TEXTS, documents, strict=True):
        assert document[0] == document[-1] == SEPARATOR_ID
        assert document[1:-1] == tokenizer.encode(text)


def test_a_line_break_and_the_indentation_after_it_are_one_token(tokenizer):
    assert "\n    " in {tokenizer.decode([i]) for i in tokenizer.encode(TEXTS[0])}


def test_saved_tokenizer_reads_the_same_here_in_tokenizers_and_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    ids = tokenizer.encode(TEXTS[1])
    assert Tokenizer.load(tmp_path).encode(TEXTS[1]) == ids
    bare = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert bare.encode(TEXTS[1]).ids == [SEPARATOR_ID, *ids]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[1])["input_ids"] == [SEPARATOR_ID, *ids]
    assert theirs.decode(ids) == TEXTS[1]
    assert theirs.eos_token_id == SEPARATOR_ID


def test_a_saved_one_is_read_as_a_checkpoints_with_the_same_documents(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    read = PretrainedTokenizer.load(tmp_path)
    assert read.frame() == tokenizer.frame() == ([SEPARATOR_ID], [SEPARATOR_ID])
    assert read.encode(TEXTS[1]) == [SEPARATOR_ID, *tokenizer.encode(TEXTS[1])]


def test_training_is_the_same_in_every_process(tokenizer, tmp_path):
    script = (
        "import sys, pathlib; from nemotron_v3.data.tokenizer import Tokenizer;"
        "Tokenizer.train(eval(sys.argv[1]), 300).save(pathlib.Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", script, repr(TEXTS), str(tmp_path)], check=True)
    assert Tokenizer.load(tmp_path).backend.to_str() == tokenizer.backend.to_str()


def test_a_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="vocab_size 256 is too small"):
        Tokenizer.train(TEXTS, 256)


def test_a_foreign_tokenizer_without_the_separator_is_an_error(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="token 0 of the tokeniser is None"):
        Tokenizer.load(tmp_path)
