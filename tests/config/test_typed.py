"""Objects of JSON as dataclasses, each value of its type."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from nemotron_v3.config.typed import from_object


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: list[int]

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("sizes are none")


@dataclass(frozen=True)
class Outer:
    rate: float
    best: float | None
    on: bool
    parts: list[Inner]
    more: dict[str, str]
    whatever: Any


TOLD = {
    "rate": 1,
    "best": None,
    "on": True,
    "parts": [{"name": "a", "sizes": [1, 2], "told besides": 5}],
    "more": {"x": "y"},
    "whatever": [None],
}


def test_an_object_is_its_dataclass():
    made = from_object(Outer, TOLD, "file")
    assert made == Outer(1.0, None, True, [Inner("a", [1, 2])], {"x": "y"}, [None])
    assert type(made.rate) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": "1"}, "file.rate is '1': a number is needed"),
        ({"rate": None}, "file.rate is None: a number is needed"),
        ({"rate": True}, "file.rate is True: a number is needed"),
        ({"best": "x"}, "file.best is 'x': a number is needed"),
        ({"on": 1}, "file.on is 1: true or false is needed"),
        ({"parts": {}}, "file.parts is {}: a list is needed"),
        ({"parts": [{"name": "a"}]}, r"file.parts\[0\] lacks sizes"),
        ({"parts": [{"name": "a", "sizes": [1, 2.0]}]}, r"file.parts\[0\].sizes\[1\] is 2.0"),
        ({"parts": [{"name": "a", "sizes": []}]}, "sizes are none"),
        ({"parts": [5]}, r"file.parts\[0\] is 5: an object is needed"),
        ({"more": {"x": 1}}, "file.more.x is 1: text is needed"),
        ({"more": []}, r"file.more is \[\]: an object is needed"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_place(change, message):
    with pytest.raises(ValueError, match=message):
        from_object(Outer, TOLD | change, "file")


def test_null_is_nan_where_that_is_said():
    made = from_object(Outer, TOLD | {"rate": None}, "file", null_is_nan=True)
    assert math.isnan(made.rate) and made.best is None


def test_what_is_no_object_is_refused():
    with pytest.raises(ValueError, match=r"file is \[\]: an object"):
        from_object(Outer, [], "file")
