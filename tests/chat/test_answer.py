"""Answers, taken apart."""

import pytest

from nemotron_v3.chat import ChatTemplate, is_thinking, parse_answer
from tests.chat.samples import TOOLS, trl_templates

CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nŁódź\nPL\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Łódź\nPL", "days": 3}},
}
OF_TEXTS = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Łódź\nPL", "days": "3"}},
}


def taken(text, thinking=False, tools=TOOLS):
    answer = parse_answer(text, thinking, tools)
    assert answer.text == text
    return answer.reasoning, answer.content, list(answer.tool_calls)


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("Hello\n", False, (None, "Hello\n", [])),
        ("", True, (None, "", [])),
        ("hm\n</think>\nYes.", True, ("hm", "Yes.", [])),
        ("hm</think>Yes.", True, ("hm", "Yes.", [])),  # Ultra writes no line breaks
        ("\n</think>\nYes.", True, (None, "Yes.", [])),
        ("<think>\nhm\n</think>\n\nYes.", False, ("hm", "Yes.", [])),
        ("I never end", True, ("I never end", "", [])),
        ("a </think> b", False, (None, "a </think> b", [])),
        (f"hm\n</think>\nLook:\n{CALL}\n", True, ("hm", "Look:", [WEATHER])),
        (f"hm\n{CALL}", True, ("hm", "", [WEATHER])),  # a thought that a call ends
        (f"{CALL}\n{CALL}", False, (None, "", [WEATHER, WEATHER])),
        (
            '<tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>',
            False,
            (None, "", [{"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}]),
        ),
        (
            '<TOOLCALL>[{"name": "f"}, {"name": "g", "arguments": {}}]</TOOLCALL>',
            False,
            (
                None,
                "",
                [
                    {"type": "function", "function": {"name": name, "arguments": {}}}
                    for name in "fg"
                ],
            ),
        ),
    ],
)
def test_thoughts_and_calls_are_taken_out(text, thinking, expected):
    assert taken(text, thinking) == expected


def test_an_argument_is_a_text_unless_a_schema_says_otherwise():
    assert taken(CALL, tools=None) == (None, "", [OF_TEXTS])
    wrong = CALL.replace("\n3\n", "\nthree\n")
    assert taken(wrong)[2][0]["function"]["arguments"]["days"] == "three"


@pytest.mark.parametrize(
    "text",
    [
        CALL[:-1],
        CALL.replace("</function>", ""),
        CALL.replace("<parameter=days>", "<parameter=city>"),
        CALL.replace("<function=weather>", "<function=>"),
        CALL.replace("</parameter>", "", 1).replace("</parameter>", ""),
        "<tool_call>\n{\n</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 1}</tool_call>',
        "<tool_call>" + "[" * 10**5 + "</tool_call>",
        "<tool_call>",
    ],
)
def test_a_call_that_is_none_stays_in_the_text(text):
    assert taken(text) == (None, text, [])


def test_many_tags_take_no_longer_than_they_are_long():
    text = "<tool_call>" * 20_000 + "</tool_call>" * 20_000
    assert taken(text) == (None, text, [])


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [("<think>\n", True), ("<think>", True), ("<think></think>", False), ("<think>\na", False)],
)
def test_whether_a_prompt_leaves_a_thought_open(prompt, thinking):
    assert is_thinking(prompt) == thinking
    assert is_thinking("x") is False


FAMILY = [p for p in trl_templates() if p.stem.startswith("nemotron") and "training" not in p.stem]


@pytest.mark.parametrize("path", FAMILY, ids=lambda path: path.stem)
def test_an_answer_that_a_template_wrote_is_read_back(path):
    template = ChatTemplate(path.read_text(encoding="utf-8"))
    asked = [{"role": "user", "content": "weather?"}]
    answer = parse_answer(f"I look.\n</think>\nWait.\n{CALL}\n", True, TOOLS)
    prompt = template.render(asked, tools=TOOLS)
    whole = template.render([*asked, answer.message], tools=TOOLS, add_generation_prompt=False)
    assert is_thinking(prompt) and whole.startswith(prompt)
    again = parse_answer(whole[len(prompt) :].removesuffix("<|im_end|>\n"), True, TOOLS)
    assert again.message == answer.message
