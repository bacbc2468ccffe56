"""Text that grows token by token, and where it stops."""

import pytest

from nemotron_v3.generation import generate, stream
from nemotron_v3.generation.stopping import Detokenizer, Row, StopStrings
from tests.generation.samples import Bytes, prompts
from tests.models import tiny_model


class Words:
    """A tokenizer like sentencepiece's: a token carries its space, the text's first loses it."""

    words = ("▁a", "▁b", "c", "")  # the last reads as nothing, like a special token

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")


def pieces(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids]


@pytest.mark.parametrize("text", ["plain", "né", "日本語", "a🙂b🙂", "e\u0301"])
def test_characters_come_whole(text):
    given = pieces(Bytes(), text.encode())
    assert "".join(given) == text
    assert [piece for piece in given if piece] == list(text)  # each with its last byte


def test_bytes_that_are_no_text_are_told_as_soon_as_nothing_can_complete_them():
    given = pieces(Bytes(), b"a" + b"\x80" * 9 + b"b")
    assert "".join(given) == "a" + "\ufffd" * 9 + "b"
    assert "".join(given[:7]) == "a" + "\ufffd" * 3


def test_a_characters_bytes_after_bytes_that_are_none():
    given = pieces(Bytes(), b"\x80\x80\x80\x80" + "€".encode() + b".")
    assert "".join(given) == "\ufffd" * 4 + "€."


def test_spaces_between_tokens_are_kept():
    ids = [0, 1, 2, 3, 0, 3, 3, 1]
    assert "".join(pieces(Words(), ids)) == Words().decode(ids) == "a bc a b"


@pytest.mark.parametrize("cut", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("say END now", ["END"], "say "),
        ("ENENDX", ["END"], "EN"),
        ("aab", ["ab", "aab"], ""),
        ("never", ["ends"], "never"),
        ("almost EN", ["END"], "almost EN"),
    ],
)
def test_stop_strings_in_pieces_of_any_size(text, stops, expected, cut):
    stopper, told = StopStrings(stops), ""
    for at in range(0, len(text), cut):
        told += stopper.push(text[at : at + cut])
        if stopper.stopped:
            break
    assert told + stopper.flush() == expected


def test_the_stop_string_that_is_complete_first_wins():
    stopper = StopStrings(["one two", "tw"])
    assert stopper.push("one t") == ""
    assert stopper.push("w") == "one " and stopper.stopped


def test_a_row_ends_for_the_first_reason_that_comes():
    def fed(text, most=100, eos=(), stops=()):
        row = Row(frozenset(eos), most, Bytes(), stops)
        told = ""
        for token in text.encode():
            told += row.push(token)
            if row.finish_reason:
                break
        assert told == row.text
        return row.text, bytes(row.tokens).decode(errors="replace"), row.finish_reason

    assert fed("abc", most=2) == ("ab", "ab", "length")
    assert fed("abc", most=2, eos=[ord("b")]) == ("a", "ab", "stop")
    assert fed("abc", stops=["bc"]) == ("a", "abc", "stop")
    assert fed("abc", stops=["bd"]) == ("abc", "abc", None)
    assert fed("ab", stops=["bd"]) == ("a", "ab", None)
    assert fed("abc", most=2, stops=["bd"]) == ("ab", "ab", "length")
    assert fed("ab~", eos=[ord("~")], stops=["bc"]) == ("ab", "ab~", "stop")
    assert fed("a€", most=3) == ("a", "a\ufffd", "length")


def test_generation_stops_at_a_string_across_tokens_and_keeps_its_token():
    model = tiny_model(vocab_size=256, pattern="M*E")
    rows = prompts((4, 6, 5))
    options = {"max_new_tokens": 30, "tokenizer": Bytes(), "eos_token_id": []}
    free = generate(model, rows, **options)
    # A string that ends in the middle of row 1, two characters long.
    text = free.text[1]
    stop = text[10:12]
    out = generate(model, rows, stop_strings=["\0never", stop], **options)
    assert out.finish_reason[1] == "stop"
    assert out.text[1] == text[: text.find(stop)]
    assert len(out.new_tokens[1]) < 30
    for row in range(3):
        assert free.new_tokens[row][: len(out.new_tokens[row])] == out.new_tokens[row]
        if stop in free.text[row]:
            assert out.text[row] == free.text[row][: free.text[row].find(stop)]
            read = Bytes().decode(out.new_tokens[row])
            assert stop in read and stop not in Bytes().decode(out.new_tokens[row][:-1])
        else:
            assert out.text[row] == free.text[row]
    told = [""] * 3
    for token in stream(model, rows, stop_strings=["\0never", stop], **options):
        told[token.row] += token.text
    assert tuple(told) == out.text
