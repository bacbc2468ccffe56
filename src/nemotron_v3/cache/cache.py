"""The hybrid cache: states of every layer that has one, and a position on each row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import LongTensor, Tensor

from nemotron_v3.cache.checks import (
    amounts_of,
    at_least,
    check_conv,
    check_dtype,
    check_keys,
    check_rows,
    check_snapshot,
    check_whole,
    numbers_of,
    shape_of,
)
from nemotron_v3.cache.file import read_snapshot, write_snapshot
from nemotron_v3.cache.make import Sizes, fresh_states
from nemotron_v3.cache.outside import OutsideView
from nemotron_v3.cache.rows import Rows
from nemotron_v3.cache.states import CacheSnapshot, KeyValueState, LayerState, MambaState
from nemotron_v3.cache.step import Transaction
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import capturing, outside_inference_mode

_HALF_WRITTEN = (
    "an operation on the cache was stopped half-way, with some of its tensors written and others "
    "not; restore a snapshot, or make a new cache"
)


class NemotronHybridCache(OutsideView, Rows):
    """Keys and values of attention layers, conv and SSM states of mamba layers, updated in place.

    Row r of the cache belongs to document r of the layout: a row of a batch, padded on any side, or
    a document of a pack. Rows may have different lengths; padding is never stored.

    Args:
        config: of the model; a `NemotronV3Config` or any object with those attributes.
        batch_size: rows.
        dtype: of keys, values and conv states; None is the config's, else torch's default. The SSM
            states have the config's `mamba_ssm_cache_dtype`, fp32 by default.
        device: where the states are; None is torch's default device.
        max_length: tokens a row can hold at most; the buffers then have that size, and stable
            addresses, from the start. None lets them grow by doubling.
        rollback_window: tokens a row can be taken back. Each costs one more copy of the mamba
            states; attention layers can be taken back any number.

    Attributes:
        withheld: why it is not to be used (`withhold`), until `restore`; None where it is.

    Raises:
        ValueError: fewer than one row, a negative window, a length below 1.
    """

    @outside_inference_mode
    def __init__(
        self,
        config: Any,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_length: int | None = None,
        rollback_window: int = 0,
    ):
        self.config: NemotronV3Config = NemotronV3Config.from_any(config, "cache")
        batch_size = at_least("batch_size", batch_size, 1)
        rollback_window = at_least("rollback_window", rollback_window, 0)
        max_length = None if max_length is None else at_least("max_length", max_length, 1)
        self.dtype: torch.dtype = dtype or self.config.dtype or torch.get_default_dtype()
        check_dtype(self.dtype)
        self.max_length = max_length
        self.rollback_window = rollback_window
        self._lengths = [0] * batch_size
        self._floors = [0] * batch_size
        self._step = None
        self._updated = set()
        self._behind = frozenset()
        self.withheld = None
        self._one_token: SequenceLayout | None = None
        self.positions: Tensor = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.states: dict[int, LayerState] = fresh_states(
            Sizes(self.config, batch_size, self.dtype, device, max_length, rollback_window)
        )

    # --- what it holds --------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Tokens of the longest row, whatever layers the model has."""
        return max(self.lengths)

    def __repr__(self) -> str:
        return (
            f"NemotronHybridCache(lengths={list(self.lengths)}, layers={list(self.states)}, "
            f"dtype={self.dtype}, max_length={self.max_length}, "
            f"rollback_window={self.rollback_window}, device={self.device})"
        )

    # --- a forward pass -------------------------------------------------------------------------

    def check(self, config: NemotronV3Config, dtype: torch.dtype, layout: SequenceLayout) -> None:
        """Refuse a model or tokens that do not fit, before anything is changed.

        Raises:
            ValueError: a cache of another config or dtype, another number of rows, a row that would
                pass `max_length`.
            RuntimeError: a forward pass that stopped half-way has left the layers at odds.
        """
        if config is not self.config and shape_of(config) != shape_of(self.config):
            raise ValueError(
                f"the cache was made for another config ({shape_of(self.config)}) than the "
                f"model's ({shape_of(config)}): make one from the model's config"
            )
        if dtype != self.dtype:
            raise ValueError(
                f"the cache holds {self.dtype}, the model is {dtype}: make the cache with the "
                "model's dtype"
            )
        if self.withheld is not None or self._step is not None:
            self._settle()
        check_rows(layout, self._lengths, self.positions.device, self.max_length)

    def step(self, layout: SequenceLayout) -> Transaction:
        """The context of one forward pass's layers: `with cache.step(layout) as step:`.

        `step.begin(layer_idx)` gives a layer its state. The layers of a pass that are called one by
        one share their tokens as well; a layer that comes again starts the next pass.

        Args:
            layout: of the new tokens, one document a row.
        """
        return Transaction(self, layout)

    def one_token_layout(
        self, shape: tuple[int, ...], device: torch.device
    ) -> SequenceLayout | None:
        """The layout of one token a row on a grid `(rows, 1)`, the same one step after step; None
        for other tokens, or tokens elsewhere than the cache."""
        positions, layout = self.positions, self._one_token
        if shape != (positions.shape[0], 1) or device != positions.device:
            return None
        if layout is not None and layout.shape == shape and layout.device == device:
            return layout
        layout = SequenceLayout.of_rows(shape, device)
        fleeting = torch.compiler.is_compiling() or capturing(device)
        if type(layout.cu_seqlens) is Tensor and not fleeting:
            self._one_token = layout
        return layout

    def withhold(self, reason: str) -> None:
        """Mark the cache as invalid until `restore`.

        Forward passes, copies, operations on rows and assignments to states raise a `RuntimeError`
        that says `reason`. Lengths, positions and views of the tensors can still be read.
        """
        self.withheld = reason

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, layout: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[rows, J, S, P]` of a layer; returns all that it holds.

        Raises:
            ValueError: a layer without keys and values, or tensors of another shape.
        """
        rows, _, seq_len, _ = key_states.shape
        layout = layout or SequenceLayout.plain(rows, seq_len, key_states.device)
        k, v = (layout.pack(t.transpose(1, 2)) for t in (key_states, value_states))
        check_keys(self.states.get(layer_idx), layer_idx, k, v)
        with self.step(layout) as step:
            state = step.begin(layer_idx)
            assert isinstance(state, KeyValueState)
            return state.append(k, v)

    def update_conv_state(
        self, layer_idx: int, new_conv_state: Tensor, cache_position: LongTensor | None = None
    ) -> Tensor:
        """Replace a layer's conv state `[rows, C, W]`, or push one column `[rows, C]` into it.

        Raises:
            ValueError: a layer without a conv state, or a tensor of another shape.
            RuntimeError: the cache is withheld.
        """
        self._refuse_withheld()
        check_conv(self.states.get(layer_idx), layer_idx, new_conv_state)
        state = self.states[layer_idx]
        assert isinstance(state, MambaState)
        if new_conv_state.dim() == 2 or new_conv_state.shape[-1] == 1:
            column = new_conv_state.reshape(*state.conv.shape[:2], 1).to(state.conv.dtype)
            new_conv_state = torch.cat([state.conv[..., 1:], column], -1)
        return state.write_conv(new_conv_state)

    # --- moving in time -------------------------------------------------------------------------

    @outside_inference_mode
    def snapshot(self) -> CacheSnapshot:
        """A copy of all it holds."""
        self._settle()
        length = self.get_seq_length()
        states = {i: s.held(length).map(torch.clone) for i, s in self.states.items()}
        return CacheSnapshot(tuple(self._lengths), tuple(self._floors), states, self._behind)

    @torch.no_grad()
    def restore(self, snapshot: CacheSnapshot) -> None:
        """Return to a snapshot of this cache, in the present buffers.

        Also what mends a cache that a failed forward pass left half-way.

        Raises:
            ValueError: a snapshot of another batch or config.
        """
        sizes = (self.batch_size, self.max_length, self.rollback_window)
        check_snapshot(snapshot, self.states, *sizes)
        length, states = max(snapshot.lengths), self._without_graph()
        for layer, state in states.items():  # allocate first: it may fail
            state.make_room(snapshot.states[layer], length)
        with self._writing(states):
            for layer, state in states.items():
                state.load(snapshot.states[layer], length)
            self._set_present(snapshot.lengths, snapshot.floors, snapshot.behind)

    @torch.no_grad()
    def rollback(self, tokens: int | Sequence[int]) -> None:
        """Take back the last tokens of every row: as many each, or as many as a list says.

        Raises:
            ValueError: further back than the row has tokens, or than `rollback_window` reaches.
        """
        self._settle()
        amounts = amounts_of(tokens, self.batch_size)
        mamba = any(isinstance(state, MambaState) for state in self.states.values())
        for row, (held, back) in enumerate(zip(self._lengths, amounts, strict=True)):
            if not 0 <= back <= held:
                raise ValueError(f"row {row} holds {held} tokens: {back} cannot be taken back")
            reachable = held - back in (0, held) or held - back >= self._floors[row]
            if mamba and not reachable:
                raise ValueError(
                    f"row {row} can be taken back {held - self._floors[row]} tokens, not {back}: "
                    "make the cache with a larger rollback_window, or keep a snapshot"
                )
        lengths = [held - back for held, back in zip(self._lengths, amounts, strict=True)]
        moved = [row for row, back in enumerate(amounts) if back]
        fresh = self._index([row for row in moved if lengths[row] == 0])
        back = [row for row in moved if lengths[row]]
        rows, positions = self._index(back), self._index([lengths[row] for row in back])
        states = self._without_graph()
        writes = [state.taking_back(fresh, rows, positions) for state in states.values()]
        with self._writing(states):
            for write in writes:
                write()
            self._set_lengths(lengths)
            self._floors = [min(f, n) for f, n in zip(self._floors, lengths, strict=True)]

    def crop(self, length: int) -> None:
        """Take back what each row holds beyond `length` tokens.

        Raises:
            ValueError: a negative length, or what `rollback` raises.
        """
        at_least("length", length, 0)
        self.rollback([max(0, held - length) for held in self.lengths])

    def clear(self, row: int) -> None:
        """Make one row fresh."""
        self._settle()
        check_whole("row", [row])
        if not 0 <= row < self.batch_size:
            raise ValueError(f"row {row} is outside the cache's {self.batch_size} rows")
        self.rollback([held if r == row else 0 for r, held in enumerate(self._lengths)])

    def detach(self) -> None:
        """Cut the states from the graph that made them: truncated backpropagation through time.

        Raises:
            RuntimeError: the cache is withheld.
        """
        self._refuse_withheld()
        self.states.update(self._map(Tensor.detach))

    @torch.no_grad()
    def take_over(self, lengths: Sequence[int], write: Callable[[int, LayerState], None]) -> None:
        """Hold more tokens than before: `write` puts a layer's state, by its number, in place.

        For whoever moved the rows on elsewhere, and kept the states of the rollback window too.
        Stopped half-way, the cache is withheld.

        Args:
            lengths: tokens that each row holds now.
        """
        states = self._without_graph()
        with self._writing(states):
            for layer, state in states.items():
                write(layer, state)
            self._step = None
            self._updated.clear()
            floors = zip(self._floors, lengths, strict=True)
            self._floors = [max(floor, n - self.rollback_window) for floor, n in floors]
            self._set_lengths(lengths)

    # --- rows -----------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Put rows in another order, in place (beam search)."""
        order = numbers_of("beam_idx", beam_idx)
        if tuple(order.shape) != (self.batch_size,):
            raise ValueError(
                f"beam_idx has shape {tuple(order.shape)}, the cache {self.batch_size} rows"
            )
        reordered = self.select(order)
        states = self._without_graph()
        with torch.no_grad(), self._writing(states):
            for layer, state in states.items():
                for name, tensor in state.tensors().items():
                    tensor.copy_(getattr(reordered.states[layer], name))
            self._set_lengths(reordered._lengths)
            self._floors = reordered._floors

    # --- on disk --------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write all it holds to one safetensors file, which appears only when it is whole."""
        write_snapshot(path, self.snapshot(), self._kind())

    def load(self, path: str | PathLike[str]) -> None:
        """Take over what `save` wrote.

        Raises:
            ValueError: a file that is no cache, or one of another config, batch, dtype or window,
                or longer than `max_length`, or whose header and tensors contradict each other; the
                cache is as it was then.
        """
        sizes = (self.batch_size, self.max_length, self.rollback_window)
        self.restore(read_snapshot(path, self.states, self._kind(), *sizes))

    # --- inside ---------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, states: dict[int, LayerState]) -> Iterator[None]:
        """A context for writes that belong together, into `states`, which become the cache's. If
        they are interrupted, the cache stays withheld."""
        self.withheld = _HALF_WRITTEN
        self.states.update(states)
        yield
        self.withheld = None

    def _without_graph(self) -> dict[int, LayerState]:
        """The states to write values into that no graph knows: a graph keeps its own tensors."""
        return self._map(lambda t: t.detach().clone() if t.requires_grad else t)

    def _kind(self) -> dict[str, Any]:
        """What a file must say to be one of this cache."""
        return {
            "config": shape_of(self.config),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rollback_window": self.rollback_window,
        }

    def _set_present(
        self, lengths: Sequence[int], floors: Sequence[int], behind: frozenset[int]
    ) -> None:
        """Be between two passes, at these positions."""
        self._step = None
        self._updated.clear()
        self._set_lengths(lengths)
        self._floors, self._behind = list(floors), behind

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)
        if not any(self._lengths):
            self._behind = frozenset()
        self.positions.copy_(torch.tensor(self._lengths, device="cpu"))
