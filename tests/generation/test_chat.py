"""A conversation: what is rendered, fed and taken from the answers."""

import pytest

from nemotron_v3.generation import Chat, ChatTemplate, generate
from tests.generation.samples import Bytes
from tests.models import tiny_model

APPENDING = """\
{%- for message in messages %}
<{{ message.role }}>{{ message.content }}~
{%- endfor %}
{%- if add_generation_prompt %}
<assistant>
{%- endif %}
"""
# Earlier answers are left out, as some templates do with earlier reasoning.
FORGETFUL = APPENDING.replace("{{ message.content }}", "{{ message.content if loop.last else '' }}")
OPTIONS = {"max_new_tokens": 8, "eos_token_id": [ord("~")]}


@pytest.fixture(scope="module")
def model():
    return tiny_model("M*E", vocab_size=256)


@pytest.mark.parametrize("source", [APPENDING, FORGETFUL], ids=["appending", "forgetful"])
def test_every_answer_is_that_to_the_whole_conversation(model, source):
    template, tokenizer = ChatTemplate(source), Bytes()
    chat = Chat(model, tokenizer, template, "Be brief.", **OPTIONS)
    messages = [{"role": "system", "content": "Be brief."}]
    kept = []
    for text in ("hello", "and?", "so"):
        answer = "".join(token.text for token in chat.say(text))
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.encode(template.render(messages))
        expected = generate(model, prompt, tokenizer=tokenizer, **OPTIONS).text[0]
        assert answer == expected
        messages.append({"role": "assistant", "content": answer})
        kept.append(chat.reused_tokens)
    assert chat.messages == messages
    assert kept[0] == 0


def test_only_what_is_new_is_fed(model, monkeypatch):
    # Answers in plain ASCII, so that their text has the tokens they were made of.
    chat = Chat(model, Ascii(), ChatTemplate(APPENDING), **OPTIONS)
    list(chat.say("hello"))
    held = len("<user>hello~<assistant>") + 7  # all new tokens but the last
    fed = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, x, **kw: fed.append(len(x)) or forward(self, x, **kw)
    )
    list(chat.say("more"))
    assert chat.reused_tokens == held
    assert fed[0] == len("?~<user>more~<assistant>")


def test_an_answer_left_early_leaves_the_conversation_as_it_was(model):
    chat = Chat(model, Bytes(), ChatTemplate(APPENDING), **OPTIONS)
    other = Chat(model, Bytes(), ChatTemplate(APPENDING), **OPTIONS)
    for one in (chat, other):
        list(one.say("hello"))
    next(chat.say("lost"))
    assert chat.messages == other.messages
    assert [t.token_id for t in chat.say("b")] == [t.token_id for t in other.say("b")]


class Ascii(Bytes):
    """Every byte reads as one character, and that character encodes to it."""

    def encode(self, text):
        return list(text.encode("latin-1"))

    def decode(self, ids):
        return bytes(ids).decode("latin-1")
