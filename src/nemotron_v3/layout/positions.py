"""Documents from position ids or document numbers: a document starts where they start anew.

Letters: B batch rows, S sequence length, T real tokens.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FIRST = (0, 1)  # positions that a document's first token may have


def fit_positions(position_ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Position ids on the grid `shape`; one row of them holds for all rows.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"position_ids are a {type(position_ids).__name__}: give a tensor")
    given = tuple(position_ids.shape)
    if given == tuple(shape) or given == (1, *shape):
        return position_ids.reshape(shape)
    if len(shape) == 2 and given in ((shape[1],), (1, shape[1])):
        return position_ids.reshape(1, shape[1]).expand(shape)
    raise ValueError(f"position_ids have shape {given}, the tokens {tuple(shape)}: they must match")


def count_on(
    positions: Tensor,
    places: Tensor,
    lengths: Sequence[int],
    *,
    restarts_alone: bool,
) -> tuple[int, ...]:
    """The lengths of the documents where each of `lengths` is cut at positions that start anew.

    Positions go on where they grow by one, or by as many places as lie between two real tokens of a
    document: with padding in between, one may count the real tokens or the places.

    Args:
        positions: `[T]` integers on the host, of the real tokens.
        places: `[T]` int64 on the host, where on the flat grid they stand.
        lengths: of the documents that the positions are read in.
        restarts_alone: cut only where all breaks are restarts, at 0 or at 1; any other numbers are
            no count of documents, and cut nothing. Else every break cuts.
    """
    step = positions.diff()
    breaks = (step != 1) & (step != places.diff())
    borders, end = {0}, 0
    for length in lengths:
        end += length
        borders.add(end)
    at = [i + 1 for i in breaks.nonzero().flatten().tolist() if i + 1 not in borders]
    if restarts_alone and at:
        started = positions[torch.tensor(at, device="cpu")]
        if not bool(torch.isin(started, torch.tensor(FIRST, device="cpu")).all()):
            return tuple(lengths)
    cut, start = [], 0
    remaining = iter(at)
    following = next(remaining, None)
    for length in lengths:
        end, points = start + length, [start]
        while following is not None and following < end:
            points.append(following)
            following = next(remaining, None)
        points.append(end)
        cut += [b - a for a, b in pairwise(points)]
        start = end
    return tuple(cut)


def runs_of(numbers: Tensor, real: Tensor) -> tuple[int, ...]:
    """The lengths of the runs of equal document numbers, each within a row.

    Args:
        numbers: `[B, S]` integers on the host.
        real: `[B, S]` bool, which of them count.
    """
    row = torch.arange(numbers.shape[0], device="cpu")[:, None].expand_as(numbers)[real]
    number = numbers[real]
    starts = torch.ones_like(number, dtype=torch.bool)
    starts[1:] = (number[1:] != number[:-1]) | (row[1:] != row[:-1])
    first = starts.nonzero().flatten().tolist()
    # Where all is padding there is still one document, an empty one.
    return tuple(b - a for a, b in pairwise([*first, number.numel()])) or (0,)
