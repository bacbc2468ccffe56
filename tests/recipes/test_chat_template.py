"""The chat template of the recipes: it teaches an end, and asks as it taught."""

from pathlib import Path

import pytest

from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.tokenizer import SEPARATOR_ID, Tokenizer
from nemotron_v3.data.turns import untaught_end

PATH = Path(__file__).parents[2] / "recipes" / "chat.jinja"
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Add 8 and 4."},
    {"role": "assistant", "content": "12."},
    {"role": "user", "content": "And 1?"},
    {"role": "assistant", "content": "13."},
]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder.of(Tokenizer.train(["Add 8 and 4."], 258), str(PATH))


def test_a_chat_reads_so(encoder):
    assert encoder.template.render(MESSAGES, add_generation_prompt=False) == (
        "system: Be short.\nuser: Add 8 and 4.\nassistant: 12.<|endoftext|>"
        "user: And 1?\nassistant: 13.<|endoftext|>"
    )


def test_what_is_asked_is_the_beginning_of_what_was_learnt(encoder):
    whole = encoder.template.render(MESSAGES, add_generation_prompt=False)
    for turn in (2, 4):
        assert whole.startswith(encoder.template.render(MESSAGES[:turn]))


def test_the_assistants_words_and_their_end_are_learnt(encoder):
    text, spans = encoder.template.render_spans(MESSAGES)
    assert [text[a:b] for a, b in spans] == ["12.<|endoftext|>", "13.<|endoftext|>"]
    row = {"messages": MESSAGES}
    assert untaught_end(encoder, (row, "messages"), frozenset({SEPARATOR_ID})) is None
