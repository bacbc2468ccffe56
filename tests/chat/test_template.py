"""What a chat template may do, what it may cost, and where a checkpoint keeps it."""

import dataclasses
import enum
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from nemotron_v3.chat import ChatTemplate, renderer

SAID = [{"role": "system", "content": "Be {{ brief }}."}, {"role": "user", "content": "<né>"}]
FAULTS = {
    "{{ 1 / 0 }}": "line 1: ZeroDivisionError",
    "a\n{{ 1 + 'a' }}": "line 2: TypeError",
    "{{ range(10**9) }}": "OverflowError: Range too big",
    "{{ messages[0].content.nothing.more }}": "has no attribute 'nothing'",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% include 'other' %}": "no loader",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ undefined_function() }}": "is undefined",
    "{{ messages | tojson(indent='a', nothing=1) }}": "TypeError",
    "{{ {}['a']['b'] }}": "has no attribute 'a'",
}
COSTS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * messages | length * 10**10 }}",
    "a doubled text": (
        "{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}"
    ),
    "a list": "{{ messages * 10**9 }}",
    "a width": "{{ '%99999999999d' % messages | length }}",
    "a centred text": "{{ messages[0].content | center(10**11) }}",
    "a power": "{{ messages | length ** (9 ** (9 ** 9)) }}",
    "much text": "{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "a constant": "{{ 'a' * 10**10 }}",
}


def test_messages_are_rendered_as_they_are():
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}~{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    expected = "<system>Be {{ brief }}.~<user><né>~"
    assert template.render(SAID, add_generation_prompt=False) == expected
    assert template.render(SAID) == expected + "<assistant>"


def test_what_a_template_finds_there():
    template = ChatTemplate(
        "{{ bos_token }}{{ tools[0] | tojson }}{{ strftime_now('%Y') | length }}",
        {"bos_token": "<s>"},
    )
    assert template.render(SAID, tools=[{"name": "é<"}]) == '<s>{"name": "é<"}4'


@pytest.mark.parametrize("source", FAULTS)
def test_an_error_in_a_template_is_the_templates_fault(source):
    with pytest.raises(ValueError, match=f"^the chat template is at fault.*{FAULTS[source]}"):
        ChatTemplate(source).render(SAID)
    assert len(SAID) == 2


@pytest.mark.parametrize("cost", COSTS)
def test_what_a_template_costs_is_bounded(cost, monkeypatch):
    monkeypatch.setattr(renderer, "SECONDS", 1)
    began = time.process_time()
    with pytest.raises(ValueError, match="the chat template is at fault|is no chat template"):
        ChatTemplate(COSTS[cost]).render(SAID)
    assert time.process_time() - began < 1  # none of it is spent here
    assert ChatTemplate("{{ messages[1].role }}").render(SAID) == "user"


def test_a_process_that_the_system_does_not_bound_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(renderer, "SECONDS", 1000)
    monkeypatch.setattr(renderer, "PATIENCE", 0.5)
    with pytest.raises(ValueError, match="at fault"):
        ChatTemplate(COSTS["loops"]).render(SAID)


def test_a_process_that_has_gone_is_started_anew():
    template = ChatTemplate("{{ messages[1].role }}")
    renderer._process._child.kill()
    renderer._process._child.wait()
    assert template.render(SAID) == "user"


def test_threads_and_forks_get_their_own_texts():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    wrong = []

    def render(name):
        for number in range(30):
            text = f"{name} {number}"
            if template.render([{"role": "user", "content": text}]) != text:
                wrong.append(text)

    threads = [threading.Thread(target=render, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORKS = """
import os, sys
from nemotron_v3.chat import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}")
child = os.fork()
name = "child" if child == 0 else "parent"
for number in range(50):
    text = f"{name} {number}"
    assert template.render([{"role": "user", "content": text}]) == text
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_share_its_parents_process():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_refusal_has_the_templates_words_in_one_printable_line():
    source = "{{ raise_exception('not\n' ~ messages[0].role ~ '\\x1b[31m') }}"
    with pytest.raises(ValueError) as caught:
        ChatTemplate(source).render(SAID)
    assert str(caught.value) == r"the chat template refuses the messages: not system\x1b[31m"
    with pytest.raises(ValueError, match="refuses the messages$"):
        ChatTemplate("{{ raise_exception() }}").render(SAID)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{", "{% nothing %}", "{% generation %}", "(" * 9 + "{{ (" * 9]
)
def test_what_is_no_template(source):
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate(source)


class Role(enum.StrEnum):
    USER = "user"


@dataclasses.dataclass
class Said:
    role: str
    content: str
    name: str | None = None


def test_messages_are_plain_data_for_a_template():
    template = ChatTemplate("{{ messages }}")
    rendered = template.render([Said(Role.USER, "a"), {"role": "x", "content": ("b", {1})}])
    assert (
        rendered == "[{'role': 'user', 'content': 'a'}, {'role': 'x', 'content': ('b', '<set>')}]"
    )
    for wrong in (["text"], "text", {"role": "user"}):
        with pytest.raises(TypeError, match="message"):
            template.render(wrong)
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested"):
        template.render([{"role": "user", "content": endless}])


def test_half_characters_pass_as_they_are():
    said = [{"role": "user", "content": "a\ud800"}]
    assert ChatTemplate("{{ messages[0].content }}\udc80").render(said) == "a\ud800\udc80"


@pytest.mark.parametrize("wrong", [5, "a", {"name": "a"}])
def test_tools_and_documents_are_lists(wrong):
    for name in ("tools", "documents"):
        with pytest.raises(ValueError, match=f"{name} is .*: give a list"):
            ChatTemplate("").render(SAID, **{name: wrong})


def test_a_template_by_name():
    template = ChatTemplate({"default": "d", "tool_use": "t", "rag": "r"})
    assert template.render(SAID) == "d"
    assert template.render(SAID, tools=[]) == "t"
    assert ChatTemplate({"default": "d", "rag": "r"}, name="rag").render(SAID, tools=[]) == "r"
    with pytest.raises(ValueError, match="no chat template 'x': there are default, rag"):
        ChatTemplate({"default": "d", "rag": "r"}, name="x")
    with pytest.raises(ValueError, match="chat templates rag and none called default"):
        ChatTemplate({"rag": "r"}).render(SAID)


def test_where_a_checkpoint_keeps_its_template(tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate.load(tmp_path)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    special = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    special["model_max_length"] = int(1e30)  # as transformers writes that there is none
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": "?", "eos_token": "no"}')
    all_tokens = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}"
    for chat_template, file, expected, with_tools in (
        (all_tokens, None, "<s></s>?", "<s></s>?"),
        (named, None, "d", "t"),
        (named, "{{ bos_token }}two", "<s>two", "<s>two"),
    ):
        about = special | {"chat_template": chat_template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
        if file is not None:
            (tmp_path / "chat_template.jinja").write_text(file)
        assert ChatTemplate.load(tmp_path).render(SAID) == expected
        assert ChatTemplate.load(tmp_path).render(SAID, tools=[]) == with_tools
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("three")
    assert ChatTemplate.load(tmp_path).render(SAID, tools=[]) == "three"
    assert ChatTemplate.load(tmp_path, name="tool_use").render(SAID) == "three"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_files_that_are_none_are_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: is a named pipe"):
        ChatTemplate.load(tmp_path)
    os.unlink(tmp_path / name)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{name}: is a device"):
        ChatTemplate.load(tmp_path)
    os.unlink(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{name}: not UTF-8"):
        ChatTemplate.load(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**25)
    with pytest.raises(ValueError, match=f"{name}: .* bytes, more than"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 10**5, '{"a": ' + "1" * 5000 + "}", '{"chat_template": 1}']
)
def test_a_tokenizer_config_that_is_none(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "marks"),
    [
        ("{% generation %}x{% endgeneration %}", True),
        ("{%-  generation-%}x{%- endgeneration %}", True),
        ({"default": "x", "tool_use": "{%+ generation %}x{% endgeneration %}"}, True),
        ("{% set generation = 1 %}{{ generation }} generation", False),
        ("{% if add_generation_prompt %}x{% endif %}", False),
    ],
)
def test_whether_a_template_marks_the_assistants_words(source, marks):
    assert ChatTemplate(source).marks_assistant is marks


def test_templates_that_render_alike_have_one_fingerprint():
    first, again, other, token = (
        ChatTemplate(source, tokens).fingerprint()
        for source, tokens in (("x", {}), ({"default": "x"}, None), ("y", {}), ("x", {"a": "b"}))
    )
    assert first == again and len({first, other, token}) == 3
