"""Functions as tools: the schema that transformers makes of each, as a black box."""

import enum
from typing import Any, Literal, Optional, Union

import pytest

from nemotron_v3.chat import ChatTemplate, parse_answer
from nemotron_v3.chat.tools import schema_of


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


def weather(city: str, days: int = 3, unit: Literal["C", "F"] = "C") -> str:
    """
    Tell the weather.

    It is often rain.

    Args:
        city: The city. (choices: ["Bonn", "Rome"])
        days (int): How many days,
            the present one included: from 1.
        unit: Of temperatures.

    Returns:
        What is to be expected,
        in words.

    Raises:
        ValueError: no such city.
    """


def shapes(
    a: Optional[int],  # noqa: UP045
    b: Union[int, str, None],  # noqa: UP007
    c: list[float] | str,
    d: dict[str, list[bool]],
    e: tuple[int, str],
    f: Any,
    g: list,
    h: Literal[1, "x", None],
    i: "dict | None" = None,
    j: Unit = Unit.CELSIUS,
    k: str | int = 1,
    m: Literal["b", 2, "a"] = 2,
    n: Literal[None, 1] = None,
    o: float | bool | None = None,
) -> list[dict]:
    """Take everything.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
        k: K
        m: M
        n: N
        o: O
    """


def nothing():
    "Do nothing."


class Thing:
    def method(self, x: int) -> None:
        """Add.

        Args:
            x: What is added.
        """


@pytest.mark.parametrize("tool", [weather, shapes, nothing, Thing().method])
def test_schemas_are_those_of_transformers(tool):
    utils = pytest.importorskip("transformers.utils")
    assert schema_of(tool) == utils.get_json_schema(tool)


def undescribed(x: int):
    """D."""


def unannotated(x):
    """D.

    Args:
        x: y
    """


def of_sets(x: set):
    """D.

    Args:
        x: y
    """


def wrong_choices(x: int):
    """D.

    Args:
        x: y (choices: 1 or 2)
    """


def any_number(*x: int):
    """D.

    Args:
        x: y
    """


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (lambda: 0, "no docstring"),
        (undescribed, "'x' lacks a description"),
        (unannotated, "'x' lacks an annotation"),
        (of_sets, "annotation <class 'set'>"),
        (wrong_choices, "choices 1 or 2"),
        (any_number, r"any number of arguments \(\*x: int\)"),
    ],
)
def test_a_function_that_does_not_say_enough_is_refused(tool, reason):
    with pytest.raises(TypeError, match=reason):
        ChatTemplate("{{ tools }}").render([], tools=[tool])


def test_functions_are_tools_of_prompts_and_answers():
    template = ChatTemplate("{{ tools[0].function.name }}")
    assert template.render([], tools=[weather]) == "weather"
    text = (
        "<tool_call>\n<function=weather>\n<parameter=city>\n7\n</parameter>\n"
        "<parameter=days>\n7\n</parameter>\n</function>\n</tool_call>"
    )
    (call,) = parse_answer(text, tools=[weather]).tool_calls
    assert call["function"]["arguments"] == {"city": "7", "days": 7}
