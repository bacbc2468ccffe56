"""The fixed buffers of a batch: places for rows, each free, active, or ended and kept as it was.

Letters: R slots; W conv taps, C convolved channels; H mamba heads, P head width, N state; J
key/value heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.cache.states import KeyValueState, LayerState, MambaState
from nemotron_v3.ops.decode_mamba2.ring import conv_of, ring_of

MOST_ENDS = 16  # tokens that end a row; with more, `forward` decodes


class MambaSlots(NamedTuple):
    """`conv` `[R, W, C]`: the input of position p at place `p % W`; `ssm` `[R, H, P, N]`."""

    conv: Tensor
    ssm: Tensor


class KeyValueSlots(NamedTuple):
    """`[R, J, capacity, P]` each, a row's tokens from place 0 on and zeros behind them."""

    keys: Tensor
    values: Tensor


class Slots:
    """What a step of R rows reads and writes, at addresses that never change.

    Attributes:
        rows: R.
        capacity: tokens that a row can hold.
        tokens: int64 `[R]`, fed by the next step.
        positions: int64 `[R]`, tokens that each row holds.
        active: int32 `[R]`, 0 where a step is to change nothing.
        ends: int64 `[MOST_ENDS]`, tokens behind which a row is not active any more, or -1.
        mamba, attention: the layers that have them, by number.
    """

    def __init__(self, cache: NemotronHybridCache, rows: int, capacity: int):
        self.rows: int = rows
        self.capacity: int = capacity
        device = cache.device
        self.tokens: Tensor = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions: Tensor = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active: Tensor = torch.zeros(rows, dtype=torch.int32, device=device)
        self.ends: Tensor = torch.full((MOST_ENDS,), -1, dtype=torch.int64, device=device)
        self.mamba: dict[int, MambaSlots] = {}
        self.attention: dict[int, KeyValueSlots] = {}
        for layer, state in cache.states.items():
            if isinstance(state, MambaState):
                self.mamba[layer] = self._of_mamba(state)
            elif isinstance(state, KeyValueState):
                self.attention[layer] = self._of_attention(state)

    def _of_mamba(self, state: MambaState) -> MambaSlots:
        _, C, W = state.conv.shape
        ssm = state.ssm.new_zeros(self.rows, *state.ssm.shape[1:])
        return MambaSlots(state.conv.new_zeros(self.rows, W, C), ssm)

    def _of_attention(self, state: KeyValueState) -> KeyValueSlots:
        _, J, _, P = state.keys.shape
        shape = (self.rows, J, self.capacity, P)
        return KeyValueSlots(state.keys.new_zeros(shape), state.values.new_zeros(shape))

    @property
    def nbytes(self) -> int:
        layers = (*self.mamba.values(), *self.attention.values())
        return sum(tensor.nbytes for layer in layers for tensor in layer)

    def load(self, cache: NemotronHybridCache, ends: list[int]) -> None:
        """Take the rows of a cache over, all of them active, into the first slots."""
        n, length = cache.batch_size, max(cache.lengths)
        self.positions.zero_()[:n] = cache.positions
        self.active.zero_()[:n] = 1
        padded = ends + [-1] * (MOST_ENDS - len(ends))
        self.ends.copy_(torch.tensor(padded, device="cpu"))
        for layer, state in cache.states.items():
            if isinstance(state, MambaState):
                self.mamba[layer].conv[:n] = ring_of(state.conv, cache.positions)
                self.mamba[layer].ssm[:n] = state.ssm
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
                state.conv.copy_(conv_of(self.mamba[layer].conv[:n], positions))
                state.ssm.copy_(self.mamba[layer].ssm[:n])
            elif isinstance(state, KeyValueState):
                state.reserve(longest)
                pairs = zip(self.attention[layer], (state.keys, state.values), strict=True)
                for slot, tensor in pairs:
                    tensor[:, :, :longest] = slot[:n, :, :longest]

        cache.take_over(lengths, write)
