"""Layouts by number, for the nodes of a compiled graph.

A graph holds tensors and numbers. Were it to hold the lengths of the documents, it would be
compiled anew for others; so a node is given the layout's number, and looks the layout up when it
runs. Even numbers are layouts, the odd one behind each is its `packed`.
"""

import itertools
import weakref
from collections import OrderedDict
from typing import Any

UNKNOWN = 0  # the number of layouts made inside a graph
KEPT = 256  # layouts of forward passes whose backward pass may still come

_numbers = itertools.count(2, 2)
_all: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_used: "OrderedDict[int, Any]" = OrderedDict()


def new(layout: Any) -> int:
    """A number for a layout."""
    number = next(_numbers)
    _all[number] = layout
    return number


def of_packed(handle: int) -> int:
    """The number of the `packed` of the layout with this one."""
    return handle if handle == UNKNOWN or handle % 2 else handle + 1


def layout_of(handle: int) -> Any:
    """The layout with a number, which is kept for a backward pass from now on.

    Raises:
        RuntimeError: it is gone, or was made in another process.
    """
    number = handle - handle % 2
    layout = _used.pop(number, None) or _all.get(number)
    if layout is None:
        raise RuntimeError(
            f"a compiled step asks for the layout number {handle}, which is gone: keep the "
            f"SequenceLayout of a step until its backward pass is over ({KEPT} steps at most)"
        )
    _used[number] = layout
    if len(_used) > KEPT:
        _used.popitem(last=False)
    return layout.packed if handle % 2 else layout
