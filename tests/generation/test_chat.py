"""A conversation: what is rendered, fed and taken from the answers."""

import pytest
import torch

from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.data.tokenizer import Tokenizer
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


THINKING = """\
{%- if tools %}[{{ tools[0].name }}]{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}|{{ m.content }}~{% endfor %}
{{- '<think>' if enable_thinking | default(true) else '<think></think>' }}
"""


def telling(text):
    """A model that says `text`, one byte a token, whatever it is asked."""
    model = tiny_model("M", vocab_size=256)
    said = list(text.encode("latin-1"))

    def put(module, args, out):
        out = torch.zeros_like(out)
        token = said.pop(0) if said else ord("~")
        out[..., token] = 9.0
        return out

    model.lm_head.register_forward_hook(put)
    return model


def test_variables_and_tools_reach_the_template(model):
    tools = [{"name": "look"}]
    noted = Noting()
    variables = {"enable_thinking": False}
    chat = Chat(
        model, noted, ChatTemplate(THINKING), tools=tools, template_variables=variables, **OPTIONS
    )
    list(chat.say("a"))
    assert noted.texts[-1] == "[look]<user>|a~<think></think>"
    list(chat.say("b", role="tool", enable_thinking=True))
    assert noted.texts[-1].startswith("[look]<user>|a~<assistant>|")
    assert noted.texts[-1].endswith("<tool>|b~<think>")


def test_an_answer_is_taken_apart():
    call = (
        "<tool_call>\n<function=look>\n<parameter=at>\nit\n</parameter>\n</function>\n</tool_call>"
    )
    model = telling(f"hm\n</think>\nWait.\n{call}")
    options = OPTIONS | {"max_new_tokens": 200}
    chat = Chat(model, Ascii(), ChatTemplate(THINKING), **options)
    list(chat.say("a"))
    made = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    assert (chat.answer.reasoning, chat.answer.content) == ("hm", "Wait.")
    assert chat.messages[-1] == {
        "role": "assistant", "content": "Wait.", "reasoning_content": "hm", "tool_calls": [made],
    }  # fmt: skip


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thought_ends_with_its_budget(budget):
    options = OPTIONS | {"max_new_tokens": 40}
    model = telling("t" * budget + "yes~")
    chat = Chat(model, Ascii(), ChatTemplate(THINKING), thinking_budget=budget, **options)
    came = list(chat.say("a"))
    close = "\n</think>\n"
    assert chat.answer.text == "".join(t.text for t in came) == "t" * budget + close + "yes"
    assert (chat.answer.reasoning, chat.answer.content) == ("t" * budget or None, "yes")
    assert [t.finish_reason for t in came] == [None] * (len(came) - 1) + ["stop"]
    expected = list(("t" * budget + close + "yes~").encode())
    assert [t.token_id for t in came] == expected
    assert chat._cache.lengths == (len("<user>|a~<think>") + len(expected) - 1,)


@pytest.mark.parametrize("budget", [0, 3])
def test_a_thought_that_the_answer_opens_ends_with_its_budget(budget):
    options = OPTIONS | {"max_new_tokens": 40}
    thought = "<think>" + "t" * budget
    chat = Chat(
        telling(thought + "yes~"),
        Ascii(),
        ChatTemplate(APPENDING),
        thinking_budget=budget,
        **options,
    )
    list(chat.say("a"))
    assert chat.answer.text == thought + "\n</think>\nyes"
    assert (chat.answer.reasoning, chat.answer.content) == ("t" * budget or None, "yes")
    plain = Chat(
        telling("no <think>t~"), Ascii(), ChatTemplate(APPENDING), thinking_budget=0, **options
    )
    assert "".join(token.text for token in plain.say("a")) == "no <think>t"


def test_a_thought_within_its_budget_is_left_alone():
    options = OPTIONS | {"max_new_tokens": 40}
    model = telling("hm</think>a long answer~")
    chat = Chat(model, Ascii(), ChatTemplate(THINKING), thinking_budget=12, **options)
    list(chat.say("a"))
    assert (chat.answer.reasoning, chat.answer.content) == ("hm", "a long answer")


def test_mistakes_are_named_before_anything_is_said(model):
    template = ChatTemplate(THINKING)
    for error, options, message in (
        (TypeError, {"enable_thinking": False}, "enable_thinking"),
        (ValueError, {"num_return_sequences": 2}, "one answer at a time"),
        (ValueError, {"thinking_budget": -1}, "at least 0, got -1"),
        (TypeError, {"thinking_budget": 1.5}, "must be an int, got 1.5"),
        (ValueError, {"template_variables": {"messages": []}}, "cannot be called 'messages'"),
    ):
        with pytest.raises(error, match=message):
            Chat(model, Bytes(), template, **options)
    chat = Chat(model, Bytes(), template, thinking_budget=30, max_new_tokens=40)
    with pytest.raises(ValueError, match="leave nothing of 40 new tokens"):
        list(chat.say("a"))
    with pytest.raises(ValueError, match="half a character"):
        list(Chat(model, Bytes(), template, **OPTIONS).say("a\ud800"))


class Noting(Bytes):
    """Notes what it is given to encode."""

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return super().encode(text)


@pytest.mark.parametrize("budget", [None, 1])
def test_a_chat_has_what_its_template_writes_and_no_token_around_it(model, budget):
    """No chat in training begins with one."""
    made = Tokenizer.train(["a b"], 258).backend
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}<think>")
    prompts = []
    for adds in (True, False):
        tokenizer = PretrainedTokenizer(made, add_special_tokens=adds)
        assert tokenizer.encode("a")[: 1 + adds].count(0) == adds
        chat = Chat(model, tokenizer, template, max_new_tokens=12, thinking_budget=budget)
        answer = [token.token_id for token in chat.say("a b")]
        prompts.append((answer, chat._held))
    assert prompts[0] == prompts[1] and 0 not in prompts[0][1]
