"""Whether a chat teaches the end of an answer, and what a template's special tokens are."""

import json

import pytest

from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.options import Source
from nemotron_v3.data.tokenizer import SEPARATOR, SEPARATOR_ID, Tokenizer
from nemotron_v3.data.turns import Kinds, kinds_in, untaught_end
from tests.data.samples import END, EOS, byte_tokenizer, chat, write_jsonl

FOR = "{% for m in messages %}{{ m.role }}: "
ANSWER = "{% generation %}{{ m.content }}BEHIND{% endgeneration %}{% endfor %}"
ENDED = FOR + ANSWER.replace("BEHIND", "{{ eos_token }}")
ROW = (chat("how?", "so", "why?", "for that"), "messages")


def tokenizer():
    made = byte_tokenizer()
    made.special_tokens = {"eos_token": "<eos>", "bos_token": "<start>"}
    return made


@pytest.mark.parametrize("place", ["text", "file", "folder", "foreign file"])
def test_a_template_names_the_special_tokens_of_the_tokenizer(place, tmp_path):
    """Wherever it stands; also beside a tokenizer_config.json of somebody else's."""
    told = ENDED
    if place != "text":
        (tmp_path / "chat_template.jinja").write_text(ENDED)
        told = str(tmp_path / "chat_template.jinja") if "file" in place else str(tmp_path)
    if place == "foreign file":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    encoder = Encoder.of(tokenizer(), told)
    assert encoder.template.render([{"role": "user", "content": "a"}]) == "user: a<eos>"


def test_what_the_tokenizer_does_not_name_is_as_the_folder_says(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ unk_token }}|{{ eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    template = Encoder.of(tokenizer(), str(tmp_path / "t.jinja")).template
    assert template.render([]) == "<unk>|<eos>"


def test_a_chat_reads_the_separator_that_its_template_writes_and_a_text_does_not(tmp_path):
    made = Tokenizer.train(["so it is " * 9], 262)
    path = write_jsonl(tmp_path / "both.jsonl", [ROW[0], {"text": f"so {SEPARATOR} it"}])
    encoder = Encoder.of(made, ENDED)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    from nemotron_v3.data.read import Record

    found = encoder.documents(iter([Record(n, r) for n, r in enumerate(records, 1)]), "text").ids
    chat_ids, text_ids = found
    assert [n for n in chat_ids if n >= 0].count(SEPARATOR_ID) == 4
    assert text_ids.count(SEPARATOR_ID) == 2 and made.decode(text_ids[1:-1]) == f"so {SEPARATOR} it"
    assert made.backend.encode_special_tokens


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_template_that_ends_answers_in_an_end_token_is_fine(train_on):
    encoder = Encoder.of(tokenizer(), ENDED, train_on)
    assert untaught_end(encoder, ROW, frozenset({EOS})) is None


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (FOR + ANSWER.replace("BEHIND", ""), "write {{ eos_token }} behind the assistant's"),
        (
            FOR + "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}",
            "put what ends it inside the template's {% generation %} tag",
        ),
        (
            FOR + ANSWER.replace("BEHIND", "<|im_end|>\n"),
            "'<|im_end|>', which is no token of the tokenizer, but 10",
        ),
        (FOR + ANSWER.replace("BEHIND", "<end>"), f"token {END}: write eos_token_id [256, {END}]"),
    ],
    ids=["none", "outside the tag", "no token", "another token"],
)
def test_a_template_that_teaches_no_end_is_told_of_with_the_way_out(template, told):
    found = untaught_end(Encoder.of(tokenizer(), template), ROW, frozenset({EOS}))
    assert found is not None and told in found and "stops at 256 ('<eos>')" in found


def test_what_sources_hold_is_seen_in_their_first_records(tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "a"}])
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": []}, ROW[0]])
    (tmp_path / "a.txt").write_text("a")
    assert kinds_in([Source(str(texts))]) == Kinds(True, None)
    assert kinds_in([Source(str(tmp_path / "a.txt"))]) == Kinds(True, None)
    assert kinds_in([Source(str(chats))]) == Kinds(False, (ROW[0], "text"))
    assert kinds_in([Source("not there")]) == Kinds(False, None)
