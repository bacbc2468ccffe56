"""The states of a mixer between processes: what each has of a document, put together by all.

Letters: J segments in the order of the sequence, H heads, P head width, N state.

With `a_j` what a segment leaves of a state before it (0 where a document begins inside), `E^_j` the
state it ends with from 0 and `e_j` whether it begins inside a document (Dao and Gu 2024, section
8.2, where a state is handed on from device to device; here all compute all J steps):

    I_j = e_j E_{j-1},         E_j = E^_j + a_j I_j
    F_j = e_{j+1} Gam_{j+1},   Gam_j = G_j + a_j F_j

`I_j` is the state that a segment begins with; `G_j` the gradient of that state within the segment,
`F_j` that of the state it ends with.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron_v3.parallel.collectives import gathered
from nemotron_v3.parallel.shares import Shares


class GroupExchange:
    """The `StateExchange` of one mixer in one pass.

    What comes in is kept: a block that is computed again asks nobody.

    Args:
        shares: who has which segment.
        group: the processes.
        first, last: for each own segment the numbers of its first and its last piece in the call.
    """

    def __init__(self, shares: Shares, group: ProcessGroup, first: list[int], last: list[int]):
        self.shares, self.group, self.first, self.last = shares, group, first, last
        self._initial: Tensor | None = None
        self._decays: list[Tensor] = []  # a_j of every segment, [H, 1, 1]

    def before(self, ends: Tensor, decays: Tensor) -> Tensor:
        if self._initial is not None:
            return self._initial
        borders = [0.0 if self.shares.all[j].has_border else 1.0 for j in self.shares.own]
        keeps = decays.new_tensor(borders)[:, None]
        sent = torch.cat([ends[self.last].flatten(1), decays[self.last] * keeps], 1)
        rows = self._in_order(gathered(sent, self.group))
        H = decays.shape[1]
        self._decays = [row[-H:, None, None] for row in rows]
        segments = self.shares.all
        state, found = torch.zeros_like(ends[0]), []
        for j, row in enumerate(rows):
            begins = state if segments[j].enters else torch.zeros_like(state)
            found.append(begins)
            state = row[:-H].view_as(state) + self._decays[j] * begins
        self._initial = self._at(ends, self.first, found)
        return self._initial

    def behind(self, starts: Tensor) -> Tensor:
        rows = self._in_order(gathered(starts[self.first].flatten(1), self.group))
        segments = self.shares.all
        gradient, found = torch.zeros_like(starts[0]), []
        for j in reversed(range(len(segments))):
            goes_on = j + 1 < len(segments) and segments[j + 1].enters
            ends = gradient if goes_on else torch.zeros_like(gradient)
            found.append(ends)
            gradient = rows[j].view_as(gradient) + self._decays[j] * ends
        return self._at(starts, self.last, found[::-1])

    def _in_order(self, rows: Tensor) -> list[Tensor]:
        """`[R own, ...]` of all processes as one tensor a segment, in the order of the sequence."""
        own, seen, found = len(self.shares.own), [0] * self.shares.size, []
        for share in self.shares.all:
            found.append(rows[share.rank * own + seen[share.rank]])
            seen[share.rank] += 1
        return found

    def _at(self, like: Tensor, pieces: list[int], of_all: list[Tensor]) -> Tensor:
        """What own segments have of all, at their pieces; 0 at the others."""
        out = torch.zeros_like(like)
        for piece, j in zip(pieces, self.shares.own, strict=True):
            out[piece] = of_all[j]
        return out
