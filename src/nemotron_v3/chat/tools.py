"""Tools that a model may call, as a chat template describes them."""

from collections.abc import Callable
from typing import Any


def schema_of(tool: Callable) -> dict[str, Any]:
    raise TypeError(
        f"the tool {getattr(tool, '__name__', tool)!r} is a function: give its JSON schema"
    )
