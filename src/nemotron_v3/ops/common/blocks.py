"""How portable forms walk through long arrays: in blocks that stay in a cache.

A pass over an array that does not fit costs several times one over an array that does, and a fresh
large array costs a page fault every 4 KiB besides. So a form takes a block of rows through all its
passes before it turns to the next, and its intermediate arrays live in one `Workspace`.
"""

import math

import torch
from torch import Tensor

from nemotron_v3.ops.common.precision import needs_grad

# Elements of a block's array, of which it has about ten: few enough for a CPU's last-level cache.
# Much less, and starting threads for each pass costs more than the cache saves. Elsewhere few large
# launches are better.
CPU_ELEMENTS, ELEMENTS = 1 << 19, 1 << 26


def block_elements(device: torch.device) -> int:
    """How many elements an array of a block has at most."""
    return CPU_ELEMENTS if device.type == "cpu" else ELEMENTS


def at_once(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an array is one block, and no gradient of it or of the others is asked for."""
    if torch.is_grad_enabled() and needs_grad(x, *others):
        return False
    return x.numel() <= (CPU_ELEMENTS if x.is_cpu else ELEMENTS)


def row_blocks(rows: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """Start and end of each block of `rows` rows of `width` elements."""
    step = max(1, block_elements(device) // max(1, width))
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def rows_for(array: Tensor, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Where to write rows of an array: there, if they are computed in its dtype; see `put_rows`."""
    rows = array[start:end]
    return rows if array.dtype == dtype else torch.empty_like(rows, dtype=dtype)


def put_rows(array: Tensor, start: int, written: Tensor) -> None:
    """Store rows that `rows_for` gave, once they are written."""
    if array.dtype != written.dtype:
        array[start : start + len(written)] = written


class Workspace:
    """Arrays by name that every block writes anew.

    Args:
        like: where they are.
        dtype: what they hold.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self._like, self._dtype = like, dtype
        self._arrays: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An array of this shape; it shares its memory with all earlier ones of its name."""
        view = self._views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = self._like.new_empty(size, dtype=self._dtype)
            elif array.numel() < size:
                array = self._arrays[name] = self._like.new_empty(size, dtype=self._dtype)
                self._views = {key: old for key, old in self._views.items() if key[0] != name}
            some = array[:size] if size < array.numel() else array
            view = self._views[name, shape] = some.view(shape)
        return view
