import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from nemotron_v3.data import Tokenizer
from nemotron_v3.data.pretrained import PretrainedTokenizer


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of single bytes, which puts <s> before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    )
    backend.add_special_tokens(["<s>", "<end>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_text_goes_there_and_back(folder):
    tokenizer = PretrainedTokenizer.load(folder)
    ids = tokenizer.encode("né 🙂")
    assert ids[0] == 256 and len(ids) == 1 + len("né 🙂".encode())
    assert tokenizer.decode(ids) == "né 🙂"
    assert tokenizer.decode(ids[:-1]) == "né \ufffd"


def test_special_tokens_are_added_or_not_and_read_where_they_are_spelt(folder):
    assert PretrainedTokenizer.load(folder).encode("<end>") == [256, 257]
    plain = PretrainedTokenizer.load(folder, add_special_tokens=False)
    assert plain.encode("<s><end>") == [256, 257]
    assert plain.decode([256, 257]) == ""


def test_a_document_is_encoded_as_the_tokenizer_that_was_trained_encodes_it(tmp_path):
    texts = ["say what you mean", "", "<|endoftext|> is text"]
    trained = Tokenizer.train(texts, 270)
    trained.save(tmp_path)
    read = PretrainedTokenizer.load(tmp_path)
    plain = texts[:2]
    assert read.encode_documents(plain) == trained.encode_documents(plain)
    for text, ids in zip(texts, read.encode_documents(texts), strict=True):
        before, behind = read.frame()
        assert ids[: len(before)] == before and ids[len(ids) - len(behind) :] == behind
        assert ids[-1] == read.eos_token_id == 0
        assert ids[: -len(behind)] == read.encode(text)  # a prompt is a document without its end
    with pytest.raises(ValueError, match="half a character"):
        read.encode_documents(["fine", "\ud800"])


def test_a_folder_without_one_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        PretrainedTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "number"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, 257),
        ({"special_tokens_map.json": {"eos_token": {"content": "<end>"}}}, 257),
        ({"tokenizer_config.json": {"eos_token": "<unknown>"}}, None),
    ],
)
def test_a_documents_end_is_the_eos_token_of_the_checkpoint(folder, files, number):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tokenizer = PretrainedTokenizer.load(folder)
    assert tokenizer.eos_token_id == number
    assert tokenizer.frame() == ([256], [] if number is None else [number])


def test_a_frame_that_ends_with_the_eos_token_has_it_once(folder):
    backend = PretrainedTokenizer.load(folder).backend
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 256), ("<end>", 257)]
    )
    assert PretrainedTokenizer(backend, eos_token_id=257).frame() == ([256], [257])
    assert PretrainedTokenizer(backend, False, eos_token_id=257).frame() == ([], [257])
