"""A prompt that several processes read together, and one whole cache of it where it is asked for.

Letters: T own tokens, R processes, J key/value heads, P head width, C convolved channels, W taps, H
mamba heads, N state; pieces of documents as in `Shares.pieces`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.cache.states import KeyValueState, LayerState, MambaState, unknown_state
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import on_device
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.ops.common.exchange import StateExchange
from nemotron_v3.parallel.collectives import gathered
from nemotron_v3.parallel.context_carry import ContextCarry, Recurrent, places_of
from nemotron_v3.parallel.shares import Shares


def check_empty(
    cache: NemotronHybridCache, config: NemotronV3Config, dtype: torch.dtype, layout: SequenceLayout
) -> None:
    """Raises ValueError for a cache that cannot take what several processes read.

    Args:
        config, dtype: of the model.
        layout: of all tokens.
    """
    cache.check(config, dtype, layout)
    if any(cache.lengths):
        raise ValueError(
            f"the cache holds {cache.lengths} tokens, and processes that share a prompt begin with "
            "none: give a fresh cache, and the whole prompt"
        )
    if cache.rollback_window:
        raise ValueError(
            f"the cache's rollback_window is {cache.rollback_window}, and the states after each of "
            "the last tokens of a prompt are not kept where it is shared: give a cache without one"
        )


@torch.no_grad()
def prefill(
    model: NemotronV3ForCausalLM,
    shares: Shares,
    group: ProcessGroup,
    input_ids: Tensor,
    cache: NemotronHybridCache | None,
) -> None:
    """Read this process's tokens; put what all of them leave into a cache.

    Args:
        input_ids: int64 `[T]`, this process's.
        cache: see `check_empty`; None where this process needs none.
    """
    carry = _Keeping(shares, group, asks=cache is not None)
    # The whole model's call, which gathers its weights where they are sharded.
    model(input_ids, context=ForwardContext(shares.local, carry=carry), targets=None)
    states = {layer: carry.states(layer) for layer in sorted(carry.parts)}
    if cache is None:
        return

    def write(layer: int, state: LayerState) -> None:
        if isinstance(state, KeyValueState):
            _write_keys(state, shares, carry.keys.pop(layer))
        elif isinstance(state, MambaState):
            conv, ssm = states.pop(layer)
            state.conv.copy_(conv)
            state.ssm.copy_(ssm)
        else:
            raise unknown_state(layer, state)

    cache.take_over(shares.layout.lengths, write)


def _write_keys(state: KeyValueState, shares: Shares, everyone: Tensor) -> None:
    """Put gathered keys and values `[R most, 2, J, P]` where a cache has them."""
    layout, most = shares.layout, len(everyone) // shares.size
    state.reserve(max(layout.lengths))
    for row, (start, length) in enumerate(zip(layout.offsets, layout.lengths, strict=False)):
        if length:
            places = places_of(shares, start, start + length, most)
            both = everyone.index_select(0, on_device(places, everyone.device)).unbind(1)
            for buffer, new in zip((state.keys, state.values), both, strict=True):
                buffer[row, :, :length] = new.transpose(0, 1)


@dataclass(frozen=True)
class _Endings:
    """Where documents end: for each process the numbers of its pieces that do, and of which."""

    shares: Shares

    @cached_property
    def of_ranks(self) -> list[list[tuple[int, int]]]:
        """By rank: piece and document."""
        shares, layout = self.shares, self.shares.layout
        ends = {
            start + length: document
            for document, (start, length) in enumerate(
                zip(layout.offsets, layout.lengths, strict=False)
            )
            if length
        }
        found = []
        for rank in range(shares.size):
            its = shares.of_rank(rank)
            stops = [
                (its.all[j].start + stop, length)
                for j, pieces in zip(its.own, its.pieces, strict=True)
                for stop, length in zip(accumulate(pieces), pieces, strict=True)
            ]
            found.append([(i, ends[at]) for i, (at, n) in enumerate(stops) if n and at in ends])
        return found

    @cached_property
    def own(self) -> list[int]:
        """This process's pieces."""
        return [piece for piece, _ in self.of_ranks[self.shares.rank]]

    @cached_property
    def most(self) -> int:
        return max(map(len, self.of_ranks))

    @cached_property
    def places(self) -> tuple[list[int], list[int]]:
        """Documents, and where each stands among the gathered ones."""
        both = [
            (document, rank * self.most + place)
            for rank, its in enumerate(self.of_ranks)
            for place, (_, document) in enumerate(its)
        ]
        return [document for document, _ in both], [place for _, place in both]


class _Keeping(ContextCarry):
    """A `ContextCarry` that keeps what layers leave to the tokens behind.

    Attributes:
        keys: `[R most, 2, J, P]` of each attention layer, keys and values of all tokens; where this
            process asks for them.
        parts: of each mixer the states after the pieces at borders, and after the others.
    """

    def __init__(self, shares: Shares, group: ProcessGroup, asks: bool):
        super().__init__(shares, group)
        self.asks, self.endings = asks, _Endings(shares)
        self.keys: dict[int, Tensor] = {}
        self.parts: dict[int, dict[bool, tuple[Tensor, Tensor]]] = {}

    def recurrent(self, mixer: Any) -> "_Kept":
        return _Kept(self, mixer)

    def attend(
        self, layer_idx: int | None, q: Tensor, k: Tensor, v: Tensor, *, impl: str
    ) -> Tensor:
        if not self.shares.cuts:
            self._gathered(layer_idx, k, v)
        return super().attend(layer_idx, q, k, v, impl=impl)

    def _gathered(self, layer_idx: int | None, k: Tensor, v: Tensor) -> Tensor:
        everyone = super()._gathered(layer_idx, k, v)
        if self.asks:
            assert layer_idx is not None
            self.keys[layer_idx] = everyone
        return everyone

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """A mixer's states after each document, `[n_docs, C, W]` and `[n_docs, H, P, N]`, of which
        every process has some."""
        parts, endings = self.parts.pop(layer), self.endings
        # Numbers of pieces as they were scanned: those at borders, and then the others.
        order = [*self.borders.numbers, *self.borders.inner_numbers]
        if True not in parts:
            order = list(range(len(order)))
        own = [order.index(piece) for piece in endings.own]
        documents, places = endings.places
        found = []
        for tensors in zip(*(parts[at] for at in (True, False) if at in parts), strict=True):
            scanned = torch.cat(tensors)
            ended = scanned.index_select(0, _index(own, scanned))
            ended = F.pad(ended, (0, 0) * (ended.dim() - 1) + (0, endings.most - len(ended)))
            of_all = gathered(ended, self.group).index_select(0, _index(places, scanned))
            whole = of_all.new_zeros(self.shares.layout.num_documents, *of_all.shape[1:])
            found.append(whole.index_copy_(0, _index(documents, scanned), of_all))
        conv, ssm = found
        return conv, ssm


class _Kept(Recurrent):
    """The states of a mixer in a share, of which those that documents end with are kept."""

    carry: _Keeping

    def read(self, tokens: Tensor, in_graph: bool) -> dict[str, Any]:
        told = super().read(tokens, in_graph)
        if not self.at_borders:
            return {}  # the final states come back
        mixer = self.mixer
        xBC = tokens.narrow(1, mixer.intermediate_size, mixer.conv_dim)
        self._conv = _last_inputs(xBC, told["conv_states"], self.carry.borders.lengths)
        self._exchange = told["exchange"] = _Ending(told["exchange"])
        return told

    def write(self, conv: Tensor, ssm: Tensor) -> None:
        if self.at_borders:
            assert self._exchange.ends is not None
            conv, ssm = self._conv, self._exchange.ends
        self.carry.parts.setdefault(self.mixer.layer_idx, {})[self.at_borders] = conv, ssm


class _Ending:
    """A `StateExchange` that notes the states that pieces end with."""

    def __init__(self, exchange: StateExchange):
        self.exchange = exchange
        self.ends: Tensor | None = None

    def before(self, ends: Tensor, decays: Tensor) -> Tensor:
        initial = self.exchange.before(ends, decays)
        self.ends = ends + decays[:, :, None, None] * initial
        return initial

    def behind(self, starts: Tensor) -> Tensor:
        return self.exchange.behind(starts)


def _last_inputs(xBC: Tensor, before: Tensor, lengths: Sequence[int]) -> Tensor:
    """`[n_pieces, C, W]`, the conv states after pieces: of their inputs and the states before."""
    W = before.shape[-1]
    pieces = zip(before, xBC.split(list(lengths)), strict=True)
    return torch.stack([torch.cat([b, x[-W:].t()], 1)[:, -W:] for b, x in pieces])


def _index(numbers: list[int], like: Tensor) -> Tensor:
    return on_device(torch.tensor(numbers, dtype=torch.int64, device="cpu"), like.device)
