"""The fixed buffers of a batch: places for rows, each free, active, or ended and kept as it was.

Letters: R slots; W conv taps, C convolved channels; H mamba heads, P head width, N state; J
key/value heads; w tokens of a rollback window.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.cache.states import KeyValueState, LayerState, MambaState, unknown_state
from nemotron_v3.ops.decode_mamba2.ring import conv_of, ring_of

MOST_ENDS = 16  # tokens that end a row; with more, `forward` decodes


class MambaSlots(NamedTuple):
    """`conv` `[R, W, C]`: the input of position p at place `p % W`; `ssm` `[R, H, P, N]`.

    `past_conv` `[R + 1, w, W, C]` and `past_ssm` `[R + 1, w, H, P, N]` are both as they were behind
    each of the last w tokens, the state of p tokens at place `p % w`. Behind the slots is a place
    for what nobody keeps.
    """

    conv: Tensor
    ssm: Tensor
    past_conv: Tensor
    past_ssm: Tensor

    def remember(self, rows: Tensor, positions: Tensor) -> None:
        """Keep the present states as those of so many tokens, in `rows` of the past."""
        if window := self.past_conv.shape[1]:
            place = rows, positions % window
            self.past_conv.index_put_(place, self.conv)
            self.past_ssm.index_put_(place, self.ssm)


class KeyValueSlots(NamedTuple):
    """`[R, J, capacity, P]` each, a row's tokens from place 0 on and zeros behind them."""

    keys: Tensor
    values: Tensor


class Slots:
    """What a step of R rows reads and writes, at addresses that never change.

    Attributes:
        rows: R.
        capacity: tokens that a row can hold.
        window: tokens that a row can be taken back.
        tokens: int64 `[R]`, fed by the next step.
        positions: int64 `[R]`, tokens that each row holds.
        active: int32 `[R]`, 0 where a step is to change nothing.
        ends: int64 `[MOST_ENDS]`, tokens behind which a row is not active any more, or -1.
        mamba, attention: the layers that have them, by number.
    """

    def __init__(self, cache: NemotronHybridCache, rows: int, capacity: int):
        self.rows: int = rows
        self.capacity: int = capacity
        self.window: int = cache.rollback_window
        device = cache.device
        self.tokens: Tensor = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions: Tensor = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active: Tensor = torch.zeros(rows, dtype=torch.int32, device=device)
        self.ends: Tensor = torch.full((MOST_ENDS,), -1, dtype=torch.int64, device=device)
        self._numbers = torch.arange(rows, device=device)
        self.mamba: dict[int, MambaSlots] = {}
        self.attention: dict[int, KeyValueSlots] = {}
        for layer, state in cache.states.items():
            if isinstance(state, MambaState):
                self.mamba[layer] = self._of_mamba(state)
            elif isinstance(state, KeyValueState):
                self.attention[layer] = self._of_attention(state)
            else:
                raise unknown_state(layer, state)

    def _of_mamba(self, state: MambaState) -> MambaSlots:
        _, C, W = state.conv.shape
        ssm = state.ssm.new_zeros(self.rows, *state.ssm.shape[1:])
        more = (self.rows + 1, self.window) if self.window else (0, 0)
        return MambaSlots(
            state.conv.new_zeros(self.rows, W, C),
            ssm,
            state.conv.new_zeros(*more, W, C),
            ssm.new_zeros(*more, *ssm.shape[1:]),
        )

    def _of_attention(self, state: KeyValueState) -> KeyValueSlots:
        _, J, _, P = state.keys.shape
        shape = (self.rows, J, self.capacity, P)
        return KeyValueSlots(state.keys.new_zeros(shape), state.values.new_zeros(shape))

    @property
    def nbytes(self) -> int:
        layers = (*self.mamba.values(), *self.attention.values())
        return sum(tensor.nbytes for layer in layers for tensor in layer)

    def remember(self) -> None:
        """Keep the states of active rows as those of the tokens that they hold."""
        if self.window:
            rows = torch.where(self.active != 0, self._numbers, self.rows)
            for state in self.mamba.values():
                state.remember(rows, self.positions)

    def _past_positions(self, positions: Tensor) -> Tensor:
        """How many tokens each place of a window stands for, `[n, w]`; below 0 for none."""
        last = positions[:, None] - 1
        return last - (last - torch.arange(self.window, device=last.device)) % self.window

    def load(self, cache: NemotronHybridCache, ends: list[int]) -> None:
        """Take the rows of a cache over, all of them active, into the first slots."""
        n, length = cache.batch_size, max(cache.lengths)
        self.positions.zero_()[:n] = cache.positions
        self.active.zero_()[:n] = 1
        padded = ends + [-1] * (MOST_ENDS - len(ends))
        self.ends.copy_(torch.tensor(padded, device="cpu"))
        for layer, state in cache.states.items():
            if isinstance(state, MambaState):
                slots = self.mamba[layer]
                slots.conv[:n] = ring_of(state.conv, cache.positions)
                slots.ssm[:n] = state.ssm
                if self.window:
                    past = self._past_positions(cache.positions).flatten()
                    ring = ring_of(state.past_conv.flatten(0, 1), past)
                    slots.past_conv[:n] = ring.unflatten(0, (n, self.window))
                    slots.past_ssm[:n] = state.past_ssm
            elif isinstance(state, KeyValueState):
                held = min(length, state.capacity)
                pairs = zip(self.attention[layer], (state.keys, state.values), strict=True)
                for slot, tensor in pairs:
                    slot[:n, :, :held] = tensor[:, :, :held]
                    slot[:n, :, held:] = 0

    def store(self, cache: NemotronHybridCache, lengths: list[int]) -> None:
        """Give the rows back to the cache that they came from, `lengths` tokens each."""
        n, longest = cache.batch_size, max(lengths)
        positions = torch.tensor(lengths, dtype=torch.int64, device="cpu").to(cache.device)

        def write(layer: int, state: LayerState) -> None:
            if isinstance(state, MambaState):
                slots = self.mamba[layer]
                state.conv.copy_(conv_of(slots.conv[:n], positions))
                state.ssm.copy_(slots.ssm[:n])
                if self.window:
                    past = self._past_positions(positions).flatten()
                    conv = conv_of(slots.past_conv[:n].flatten(0, 1), past)
                    state.past_conv.copy_(conv.unflatten(0, (n, self.window)))
                    state.past_ssm.copy_(slots.past_ssm[:n])
            elif isinstance(state, KeyValueState):
                state.reserve(longest)
                pairs = zip(self.attention[layer], (state.keys, state.values), strict=True)
                for slot, tensor in pairs:
                    tensor[:, :, :longest] = slot[:n, :, :longest]

        cache.take_over(lengths, write)
