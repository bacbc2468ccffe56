"""What an interrupted evaluation left, and what of it cannot be gone on with."""

import json

import pytest

from nemotron_v3.evaluation.journal import Journal
from nemotron_v3.evaluation.tally import Partial, Tally

PART = {"nats": 0.1, "tokens": 3, "place_nats": [0.3, 0.7], "place_tokens": [1, 2]}


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path / "e.json.partial", 0)
    made.open({"paths": ["a"]}, resume=False)
    return made


def line(**changes) -> bytes:
    return json.dumps({"documents": [1], "parts": [PART]} | changes).encode() + b"\n"


def test_a_line_is_read_as_it_was_written_to_the_bit(journal):
    journal.write("0-0", [1], [Partial.from_dict(PART)])
    tally = Tally(2)
    journal.read("0-0", tally)
    assert (tally.nats.tolist(), tally.tokens.tolist()) == ([0.0, 0.1], [0, 3])
    assert tally.place_nats[:2].tolist() == [0.3, 0.7]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"[]\n", "an object is needed"),
        (line(documents=[2]), "there is no document 2: the source has 2"),
        (line(documents=[-1]), "there is no document -1"),
        (line(documents=[0, 1]), "2 documents have 1 scores"),
        (line(documents="1"), "a list is needed"),
        (line(parts=[PART | {"nats": "x"}]), "nats is 'x'"),
        (line(parts=[PART | {"tokens": 4}]), "tokens is 4"),
        (line(parts=[PART | {"place_nats": [0.1]}]), "equally many"),
        (line(parts=[PART | {"place_nats": [0.0] * 99, "place_tokens": [0] * 99}]), "at most 48"),
    ],
)
def test_a_line_that_none_can_have_is_refused_with_its_file(journal, written, message):
    (journal.folder / "0-0.rank-0.jsonl").write_bytes(line(documents=[0]) + written)
    with pytest.raises(ValueError, match=message) as error:
        journal.read("0-0", Tally(2))
    assert "0-0.rank-0.jsonl" in str(error.value) and "begin anew" in str(error.value)


def test_a_result_that_is_none_is_refused_with_its_file(journal):
    (journal.folder / "checkpoint-0.json").write_text('{"name": "a"}')
    with pytest.raises(ValueError, match=r"checkpoint-0\.json is not what .* lacks path"):
        journal.finished(0)


def test_a_place_in_a_document_that_is_none_is_refused_with_its_file(journal):
    (journal.folder / "0-0.document-0.json").write_text('{"states": 5, "part": {}}')
    with pytest.raises(ValueError, match=r"document-0\.json is not what .*states is 5"):
        journal.kept("0-0", 0, None)
