"""Conversations, tools and templates that the tests of chat share."""

from importlib.util import find_spec
from pathlib import Path

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city, é<b>.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "which one"},
                    "days": {"type": "integer", "enum": [1, 3, 7], "default": 1},
                    "where": {"type": "object", "properties": {"lat": {"type": "number"}}},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {"name": "weather", "arguments": {"city": "Łódź", "days": 3, "where": {"lat": 51.8}}}
CONVERSATIONS = {
    "one question": [{"role": "user", "content": "hé <b>?"}],
    "a system message": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "  why?  "},
    ],
    "thoughts": [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2", "reasoning_content": "easy\n"},
        {"role": "user", "content": "and 2 + 2?"},
        {"role": "assistant", "content": "4", "thinking": "hm"},
    ],
    "thoughts in the text": [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n2"},
        {"role": "user", "content": "sure?"},
    ],
    "tool calls": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "I look.",
            "tool_calls": [{"type": "function", "id": "c0000001", "function": CALL}],
        },
        {"role": "tool", "content": '{"sun": true}', "name": "weather", "tool_call_id": "c0000001"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "thanks"},
    ],
    "an empty answer": [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "?"},
    ],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

# Each leans on another part of the dialect.
OWN = {
    "tojson and its options": (
        "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|"
        "{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True) }}|"
        "{{ messages[0] | tojson(separators=(',', ':')) }}|{{ {'a<': 1.5} | tojson | safe }}"
    ),
    "the generation tag": (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}\n"
        "  {% generation %}\n  {{ m.content }}{{ eos_token }}\n  {% endgeneration %}\n"
        "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    ),
    "the generation tag without blanks": (
        "{% for m in messages %} {%- generation -%} {{ m.content }} {%- endgeneration -%} "
        "{% endfor %}"
    ),
    "breaks and continues": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}[{{ loop.index0 }}{{ m.content }}]"
        "{% endfor %}"
    ),
    "blocks and the blanks around them": (
        "{{ bos_token }}\n  {% for m in messages %}\n    {% if m.content %}\n{{ m.content }}\n"
        "    {% endif %}\n  {%- endfor +%}\n{% if add_generation_prompt %}\n<a>\n{% endif %}\n"
    ),
    "a namespace": (
        "{% set ns = namespace(last=-1, n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.last }}/{{ ns.n }}"
    ),
    "macros": (
        "{% macro line(m, depth=0) %}{{ '  ' * depth }}{{ m.role | upper }}: "
        "{{ m.content | trim | default('-', true) }}{{ caller() if caller else '' }}\n"
        "{% endmacro %}"
        "{% for m in messages %}{{ line(m, loop.index0) }}{% endfor %}"
        "{% call line(messages[0]) %}!{% endcall %}"
    ),
    "variables": (
        "{{ enable_thinking is defined }}{{ enable_thinking }}{{ tools is defined }}"
        "{{ tools is none }}{{ documents is none }}{{ missing is defined }}{{ missing }}"
        "{{ pad_token }}{{ eos_token }}{{ add_generation_prompt }}"
    ),
    "thinking": (
        "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{{ m.keys() | list }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{{ '<think>\\n' if enable_thinking | default(true) else '<think></think>' }}{% endif %}"
    ),
    "tools": (
        "{% if tools %}{% for tool in tools %}{{ tool.function.name }}("
        "{% for name, about in tool.function.parameters.properties | items %}{{ name }}: "
        "{{ about.type }}{{ ', ' if not loop.last }}{% endfor %})\n{{ tool | tojson(indent=4) }}"
        "{% endfor %}{% endif %}{% for m in messages if m.tool_calls %}{{ m.tool_calls }}"
        "{% endfor %}"
    ),
    "strings": (
        "{% for m in messages %}{% set c = m.content | default('', true) | string %}"
        "{{ c.split('</think>')[-1].strip() }}{{ c[::-1][:5] }}{{ '%s|%05.1f' % (c, 1.25) }}"
        "{{ c is string }}{{ c.startswith('<') }}{{ [1, (2, 3), {'k': none}] }}"
        "{{ c | replace('<', '&') }}{{ c ~ 1 ~ true }}{% endfor %}"
    ),
    "what it refuses": (
        "{% if messages[0].role != 'user' %}{{ raise_exception('first ' ~ messages[0].role) }}"
        "{% endif %}{{ messages | map(attribute='content') | join(', ') }}{{ range(3) | sum }}"
    ),
}


def trl_templates() -> list[Path]:
    """The templates in the installed trl, as files to be read; none without it."""
    found = find_spec("trl")
    if found is None:
        return []
    return sorted(Path(found.submodule_search_locations[0], "chat_templates").glob("*.jinja"))
