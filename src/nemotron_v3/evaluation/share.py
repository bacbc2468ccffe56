"""Which documents one pass takes, and which process takes which."""

import heapq
from collections.abc import Iterable, Iterator, Sequence


def packs(lengths: Sequence[int], documents: Iterable[int], window: int) -> Iterator[list[int]]:
    """Documents in their order, as many together as a pass of `window` tokens has room for.

    One that is longer stands alone, and goes through the model in windows.

    Args:
        lengths: tokens of every document; the last one of each is not fed.
        documents: those that are wanted.
        window: tokens of a pass.
    """
    pack: list[int] = []
    room = window
    for document in documents:
        fed = lengths[document] - 1
        if pack and fed > room:
            yield pack
            pack, room = [], window
        pack.append(document)
        room -= fed
    if pack:
        yield pack


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The numbers of pieces of work for each rank, in their order: the largest first, to whom has
    least."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        load, rank = heapq.heappop(least)
        shares[rank].append(piece)
        heapq.heappush(least, (load + costs[piece], rank))
    return [sorted(share) for share in shares]
