"""Sizes of tiles, by dtype. M, N are rows and columns of a tile, K its inner width."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nemotron_v3.ops.common.host import interpreted, power_of_two


class Tiles(NamedTuple):
    """How one product is cut, as its kernel is compiled.

    Attributes:
        m, n, k: sizes of a tile.
        stages: depth of the software pipeline over K.
        warps: warps of a program.
        descriptor: what lies in rows of its own (a matrix; rows that are not gathered) comes by the
            tensor memory access unit, where it is aligned.
        parts: how many parts of a tile what follows the product is done in, one after the other.
        precision: of `tl.dot` on fp32 operands.
    """

    m: int
    n: int
    k: int
    stages: int
    warps: int
    descriptor: bool = False
    parts: int = 1
    precision: str = "tf32"


@dataclass(frozen=True)
class Plan:
    """Tiles of the products of forward and backward; those over rows have the same M."""

    up: Tiles
    down: Tiles
    down_backward: Tiles
    up_backward: Tiles
    weights: Tiles

    @property
    def tile(self) -> int:
        return self.up.m

    def thin(self, rank: int) -> Tiles:
        """Of a product of rows with `rank` columns: reading the rows bounds it."""
        return self.up._replace(n=_width(rank), warps=4, parts=1)

    def thin_weights(self, rank: int, *, tall: bool) -> Tiles:
        """Of a gradient with `rank` rows, or as many columns where `tall`."""
        size = {"n": _width(rank)} if tall else {"m": 64}
        return self.weights._replace(**size, descriptor=False)

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Plan":
        if interpreted():
            rows = Tiles(32, 64, 32, 1, 4, descriptor=True, parts=2, precision="ieee")
            return cls(rows, rows, rows, rows, rows._replace(m=64))
        if dtype == torch.float32:
            rows = Tiles(64, 64, 32, 2, 4, precision="ieee")
            return cls(rows, rows, rows, rows, rows)
        # What multiprocessors read through the second-level cache bounds all of them: a wide tile
        # reads least. A weight's gradient sums over few rows, so that the start and the end of a
        # tile weigh more: two programs on a multiprocessor cover each other's.
        gathered = Tiles(128, 256, 64, 4, 8, parts=4)
        dense = gathered._replace(descriptor=True)
        weights = Tiles(128, 128, 64, 3, 4, descriptor=True)
        return cls(gathered, dense, dense, dense, weights)


def _width(rank: int) -> int:
    """Of a tile across a low rank: a product on tensor cores has at least 16 columns."""
    return min(64, max(16, power_of_two(rank)))
