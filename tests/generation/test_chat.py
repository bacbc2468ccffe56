"""Chat templates, and a conversation whose cache follows it."""

import json

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
SAID = [{"role": "system", "content": "Be {{ brief }}."}, {"role": "user", "content": "<né>"}]
OPTIONS = {"max_new_tokens": 8, "eos_token_id": [ord("~")]}


@pytest.fixture(scope="module")
def model():
    return tiny_model("M*E", vocab_size=256)


def test_messages_are_rendered_as_they_are():
    template = ChatTemplate(APPENDING)
    expected = "<system>Be {{ brief }}.~<user><né>~"
    assert template.render(SAID, add_generation_prompt=False) == expected
    assert template.render(SAID) == expected + "<assistant>"


def test_what_a_template_finds_there():
    source = (
        "{{ bos_token }}{{ tools[0] | tojson }}{{ strftime_now('%Y') | length }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}"
        "{% endfor %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    rendered = template.render(SAID, tools=[{"name": "é<"}])
    assert rendered == '<s>{"name": "é<"}4system'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no ' + messages[0].role) }}", "refuses the messages: no system"),
        ("{{ messages.__class__.__mro__ }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages"),
    ],
)
def test_what_a_template_may_not_do(source, message):
    said = list(SAID)
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source).render(said)
    assert said == SAID


def test_what_is_no_template():
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate("{% for %}")


def test_where_a_checkpoint_keeps_its_template(tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate.load(tmp_path)
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    special = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    for chat_template, file, expected in (
        ("{{ bos_token }}{{ eos_token }}{{ pad_token }}", None, "<s></s>"),
        (named, None, "d"),
        ("one", "{{ bos_token }}two", "<s>two"),
    ):
        about = special | {"chat_template": chat_template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
        if file is not None:
            (tmp_path / "chat_template.jinja").write_text(file)
        assert ChatTemplate.load(tmp_path).render(SAID) == expected


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
