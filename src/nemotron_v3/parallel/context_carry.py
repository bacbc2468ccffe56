"""What a process's share of the tokens needs of the others', in one pass.

Letters: T own tokens, R processes, L keys, H query heads, J key/value heads, P head width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import on_device
from nemotron_v3.parallel.collectives import Gather
from nemotron_v3.parallel.halo import Halo
from nemotron_v3.parallel.shares import Shares
from nemotron_v3.parallel.state_exchange import GroupExchange


class ContextCarry:
    """The `Carry` of a pass over a share.

    Args:
        shares: who has which tokens.
        group: the processes.
    """

    def __init__(self, shares: Shares, group: ProcessGroup):
        self.shares, self.group = shares, group
        self.borders = _Borders(shares)
        self._mixers: dict[int, tuple[Halo, GroupExchange]] = {}

    def recurrent(self, mixer: Any) -> "Recurrent":
        return Recurrent(self, mixer)

    def attend(
        self, layer_idx: int | None, q: Tensor, k: Tensor, v: Tensor, *, impl: str
    ) -> Tensor:
        shares = self.shares
        if not shares.cuts:
            return ops.attention(q, k, v, layout=shares.local, impl=impl)
        everyone = self._gathered(layer_idx, k, v)  # [R most, 2, J, P]
        parts, at = [], 0
        for j, pieces in zip(shares.own, shares.pieces, strict=True):
            if shares.all[j].enters:
                here = slice(at, at + pieces[0])
                parts.append(self._behind(q[here], everyone, j, impl))
                at, pieces = here.stop, pieces[1:]
            if pieces:
                here = slice(at, at + sum(pieces))
                layout = SequenceLayout.from_lengths(pieces, q.device)
                parts.append(ops.attention(q[here], k[here], v[here], layout=layout, impl=impl))
                at = here.stop
        y = torch.cat(parts)
        # All processes take part in the way back, also those that read nothing of the others.
        return y if any(shares.all[j].enters for j in shares.own) else _TakesPart.apply(y, everyone)

    def of_mixer(self, layer_idx: int, taps: int) -> tuple[Halo, GroupExchange]:
        """Both exchanges of a mixer, the same ones where a block is computed again."""
        if layer_idx not in self._mixers:
            borders = self.borders
            where = self.shares, self.group, borders.first, borders.last
            self._mixers[layer_idx] = Halo(*where, borders.lengths, taps), GroupExchange(*where)
        return self._mixers[layer_idx]

    def _gathered(self, layer_idx: int | None, k: Tensor, v: Tensor) -> Tensor:
        """Keys and values of all processes, each filled up to as many tokens."""
        most = max(self.shares.tokens_of(rank) for rank in range(self.shares.size))
        both = torch.stack([k, v], 1)
        return Gather.apply(F.pad(both, (0, 0, 0, 0, 0, 0, 0, most - len(k))), self.group)

    def _behind(self, q: Tensor, everyone: Tensor, j: int, impl: str) -> Tensor:
        """The tokens that go on with a document attend to all of it that comes before."""
        shares, share = self.shares, self.shares.all[j]
        if not len(q):
            return _TakesPart.apply(q, everyone)
        most = len(everyone) // shares.size
        places = places_of(shares, share.start - share.before, share.start + len(q), most)
        keys, values = everyone.index_select(0, on_device(places, q.device)).unbind(1)
        return ops.cached_attention(
            q,
            *(t.transpose(0, 1)[None] for t in (keys, values)),
            layout=SequenceLayout.from_lengths([len(q)], q.device),
            starts=(share.before,),
            positions=on_device([share.before], q.device),
            impl=impl,
        )


class _TakesPart(torch.autograd.Function):
    """The first argument, as if the second had to do with it: its gradient is 0, and computed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, other: Tensor) -> Tensor:
        ctx.like = other.new_zeros(()).expand(other.shape)
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, ctx.like


def places_of(shares: Shares, start: int, end: int, most: int) -> Tensor:
    """Where the packed tokens `start` to `end` lie among the gathered ones."""
    runs, seen = [], [0] * shares.size
    for share in shares.all:
        first, stop = max(start, share.start), min(end, share.end)
        if first < stop:
            origin = share.rank * most + seen[share.rank] - share.start
            runs.append(torch.arange(origin + first, origin + stop, device="cpu"))
        seen[share.rank] += share.end - share.start
    return torch.cat(runs)


class _Borders:
    """The pieces at the borders of own segments, and the documents that lie whole between them.

    Attributes:
        lengths: of the pieces at borders.
        numbers, inner_numbers: of those and of the others among all own pieces.
        first, last: for each own segment, the numbers of its first and last piece among those.
        places: of their tokens among the own ones, or None where they are all.
        inner: the places and lengths of the others.
    """

    def __init__(self, shares: Shares):
        self.lengths: list[int] = []
        self.first: list[int] = []
        self.last: list[int] = []
        outer: list[Tensor] = []
        inner: list[Tensor] = []
        self.inner_lengths: list[int] = []
        self.numbers: list[int] = []
        self.inner_numbers: list[int] = []
        at = 0
        for pieces in shares.pieces:
            self.first.append(len(self.lengths))
            for i, length in enumerate(pieces):
                run = torch.arange(at, at + length, device="cpu")
                at += length
                at_border = i in (0, len(pieces) - 1)
                numbers = self.numbers if at_border else self.inner_numbers
                numbers.append(len(self.numbers) + len(self.inner_numbers))
                if at_border:
                    self.lengths.append(length)
                    outer.append(run)
                else:
                    self.inner_lengths.append(length)
                    inner.append(run)
            self.last.append(len(self.lengths) - 1)
        device = shares.layout.device
        self.places = on_device(torch.cat(outer), device) if inner else None
        self.inner = on_device(torch.cat(inner), device) if inner else None
        self.layout = SequenceLayout.from_lengths(self.lengths, device)

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        if self.places is None or self.inner is None:
            return torch.cat(list(parts))
        order = torch.cat([self.places, self.inner]).argsort()
        return torch.cat(list(parts)).index_select(0, order)


class Recurrent:
    """The `RecurrentState` of a mixer in a share: its states come from the group, and go there."""

    has_graph = False

    def __init__(self, carry: ContextCarry, mixer: Any):
        self.carry, self.mixer = carry, mixer
        self.at_borders = False

    def for_one_token(self) -> None:
        """A share is no decode step."""

    def pieces(self) -> Iterator[tuple[Tensor | None, SequenceLayout]]:
        """Pieces at the borders, then whole documents; all at once where nothing is cut."""
        borders, shares = self.carry.borders, self.carry.shares
        if not shares.cuts:
            yield None, shares.local
            return
        self.at_borders = True
        yield borders.places, borders.layout
        self.at_borders = False
        if borders.inner is not None:
            layout = SequenceLayout.from_lengths(borders.inner_lengths, shares.layout.device)
            yield borders.inner, layout

    def read(self, tokens: Tensor, in_graph: bool) -> dict[str, Any]:
        if not self.at_borders:
            return {"return_final_states": False}
        mixer = self.mixer
        halo, exchange = self.carry.of_mixer(mixer.layer_idx, mixer.conv_kernel_size)
        xBC = tokens.narrow(1, mixer.intermediate_size, mixer.conv_dim)
        return {"conv_states": halo.states(xBC), "exchange": exchange}

    def write(self, conv: Tensor, ssm: Tensor) -> None:
        """The exchange has done it."""

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        return self.carry.borders.in_order(parts)
