"""What one layer remembers: keys and values, or the two states of a Mamba-2 mixer.

Letters: rows of the batch, J key/value heads, P head width, C convolved channels, W conv taps, H
mamba heads, N state; L tokens held, w tokens of the rollback window.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.cache.tokens import Step
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import kept, outside_inference_mode

SMALLEST_BUFFER = 64  # tokens; below it a doubling buffer would be copied at every other step


@dataclass
class LayerState:
    """Tensors whose first dimension is the batch's rows.

    Attributes:
        step: the new tokens of the pass that moves it on.
        overwritten: whether something was written in this step that `undo` cannot take back.
    """

    step: Step = field(init=False, repr=False, compare=False)
    overwritten: bool = field(default=False, init=False, repr=False, compare=False)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that the constructor takes, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A state of this kind whose tensors are `function` of these."""
        return type(self)(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def held(self, length: int) -> Self:
        """A view of the first `length` tokens if the state grows with them; else itself."""
        return self

    def make_room(self, other: Self, length: int) -> None:
        """Make room for another state of `length` tokens, so that `load` asks for no memory."""

    def check_like(self, other: Self, layer: int) -> None:
        """Raises ValueError unless another state could stand in this one's place at some length."""
        for name, tensor in self.held(0).tensors().items():
            its = getattr(other.held(0), name)
            if (its.shape, its.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"{name} of layer {layer} is {tuple(its.shape)} in {its.dtype} there, "
                    f"{tuple(tensor.shape)} in {tensor.dtype} here: another config, dtype or window"
                )

    def load(self, other: Self, length: int) -> None:
        """Take over the values of another state of `length` tokens, into the present buffers, which
        have room for them."""
        for name, tensor in self.held(length).tensors().items():
            tensor.copy_(getattr(other, name))

    def pair(self) -> tuple[Tensor, Tensor]:
        """The two tensors that a step moves on; both kinds of state have two."""
        raise NotImplementedError

    def undo(self, before: tuple[Tensor, Tensor], positions: Tensor) -> bool:
        """Take back what a step has written. False if the old values are gone.

        Args:
            before: the `pair` that it began with.
            positions: int64 `[rows]`, tokens each row held then.
        """
        raise NotImplementedError

    def taking_back(self, fresh: Tensor, rows: Tensor, positions: Tensor) -> Callable[[], None]:
        """What makes rows `fresh` (int64 `[m]`), and returns `rows` to what they held at
        `positions` (int64 `[n]` each, above 0), once it is called.

        The memory for it is asked for here, so that the call does not fail half-way for want of it.
        """
        raise NotImplementedError


@dataclass
class KeyValueState(LayerState):
    """Keys and values `[rows, J, capacity, P]`, each row's tokens from place 0 on, no padding.

    A buffer keeps its address until it must grow, which doubles it. What lies behind a row's own
    length is 0: attention gives it weight 0, and 0 times an old NaN would be NaN.
    """

    keys: Tensor
    values: Tensor

    @property
    def capacity(self) -> int:
        # The smaller one: an interrupt may have come between the growth of both.
        return min(self.keys.shape[2], self.values.shape[2])

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def held(self, length: int) -> Self:
        return self.map(lambda tensor: tensor[:, :, :length])

    def make_room(self, other: Self, length: int) -> None:
        self.reserve(min(length, other.capacity))  # a layer that was left out of a step holds fewer

    @outside_inference_mode
    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a row."""
        if length > self.capacity:
            self.keys, self.values = (
                F.pad(tensor, (0, 0, 0, max(0, length - tensor.shape[2])))
                for tensor in (self.keys, self.values)
            )

    def load(self, other: Self, length: int) -> None:
        length = min(length, other.capacity)
        super().load(other, length)
        for tensor in self.tensors().values():
            tensor[:, :, length:] = 0

    def undo(self, before: tuple[Tensor, Tensor], positions: Tensor) -> bool:
        self.keys, self.values = before
        places = torch.arange(self.capacity, device=positions.device)
        new = (places >= positions[:, None])[:, None, :, None]  # [rows, 1, capacity, 1]
        for tensor in before:
            if not tensor.requires_grad:  # a tensor with a graph is never written into
                tensor.masked_fill_(new, 0)
        return True

    def taking_back(self, fresh: Tensor, rows: Tensor, positions: Tensor) -> Callable[[], None]:
        ends = positions.new_full(self.keys.shape[:1], self.capacity)
        ends.index_fill_(0, fresh, 0).index_copy_(0, rows, positions)
        places = torch.arange(self.capacity, device=rows.device)
        gone = (places >= ends[:, None])[:, None, :, None]  # [rows, 1, capacity, 1]

        def write() -> None:
            for tensor in self.tensors().values():
                tensor.masked_fill_(gone, 0)

        return write

    def append(self, k: Tensor, v: Tensor, in_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Store packed keys and values `[T, J, P]`; all that is held, `[rows, J, L, P]` each.

        L is the longest row's length; a shorter row has 0 behind its own.

        Args:
            k, v: of the new tokens of the step.
            in_graph: a graph of the caller's will hold what comes back, such as that of a query
                which is trained where keys and values are not.
        """
        step = self.step
        needed = max(step.ends)
        if needed > self.capacity:
            self.reserve(max(needed, 2 * self.capacity, SMALLEST_BUFFER))
        # Both alike: the graph of attention holds the keys for the values' sake, and vice versa.
        in_graph = torch.is_grad_enabled() and (in_graph or k.requires_grad or v.requires_grad)
        self.keys = _put(self.keys, k.to(self.keys.dtype), step, in_graph)
        self.values = _put(self.values, v.to(self.values.dtype), step, in_graph)
        return self.keys[:, :, :needed], self.values[:, :, :needed]


def _put(buffer: Tensor, new: Tensor, step: Step, in_graph: bool) -> Tensor:
    """`new` `[T, J, P]` at its places: in place, or in a new buffer where autograd must see it.

    A buffer with a graph is never written to: its backward pass may still come.
    """
    if buffer.requires_grad or in_graph:
        rows, positions = step.places
        heads = torch.arange(buffer.shape[1], device=buffer.device)
        return kept(buffer.index_put((rows[:, None], heads, positions[:, None]), new))
    if step.uniform is not None:
        start, length = step.uniform
        by_row = new.view(buffer.shape[0], length, *new.shape[1:]).transpose(1, 2)
        buffer[:, :, start : start + length] = by_row
    else:
        rows, positions = step.places
        buffer[rows, :, positions] = new
    return buffer


@dataclass
class MambaState(LayerState):
    """Conv state `[rows, C, W]`, before activation, newest last; SSM state `[rows, H, P, N]`.

    With a rollback window of w tokens the states after each of the last w positions stand in
    `past_conv` `[rows, w, C, W]` and `past_ssm` `[rows, w, H, P, N]`, at place `position % w`.
    """

    conv: Tensor
    ssm: Tensor
    past_conv: Tensor
    past_ssm: Tensor

    @property
    def window(self) -> int:
        return self.past_conv.shape[1]

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.conv, self.ssm

    def for_one_token(self) -> tuple[Tensor, Tensor] | None:
        """Both states, for an op that overwrites them with the next ones; None unless each row gets
        one token, and no graph needs what it holds."""
        step, conv, ssm = self.step, self.conv, self.ssm
        if step.layout.uniform_length != 1 or conv.requires_grad or ssm.requires_grad:
            return None
        if step.window:
            self.remember(step.layout.seq_idx.long(), step.positions)
        self.overwritten = True
        return conv, ssm

    def pieces(self) -> Iterator[tuple[Tensor | None, SequenceLayout]]:
        """The new tokens to scan one after the other: their places (None: all), and how they lie.

        With a rollback window the states before each of the last tokens are kept on the way.
        """
        if not self.step.window or not self.step.layout.num_tokens:
            yield None, self.step.layout
            return
        for piece in self.step.pieces:
            self.remember(piece.rows, piece.positions)
            yield piece.tokens, piece.layout

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """The outputs of the pieces, in the order in which the tokens were given."""
        return torch.cat(list(parts)).index_select(0, self.step.piece_order)

    def read(self, tokens: Tensor, in_graph: bool) -> dict[str, Tensor]:
        """Both states, as a scan takes them."""
        return {"conv_states": self.conv, "ssm_states": self.ssm}

    def write(self, conv: Tensor, ssm: Tensor) -> None:
        """The states after a step: in place, or as new tensors where autograd must see them."""
        tracked = torch.is_grad_enabled() and (conv.requires_grad or ssm.requires_grad)
        if tracked or self.has_graph:
            conv, ssm = conv.to(self.conv.dtype), ssm.to(self.ssm.dtype)
            self.conv, self.ssm = kept(conv), kept(ssm)
        else:
            self.overwritten = True
            self.conv.copy_(conv)
            self.ssm.copy_(ssm)

    def write_conv(self, conv: Tensor) -> Tensor:
        """Another conv state, in place or as a new tensor as in `write`."""
        if self.has_graph or (torch.is_grad_enabled() and conv.requires_grad):
            self.conv = kept(conv.to(self.conv.dtype, copy=True))
        else:
            self.conv.copy_(conv)
        return self.conv

    @property
    def has_graph(self) -> bool:
        """Whether a backward pass may come through the states, so that they must stay as they are.

        Both: an in-place operation may not tell them apart.
        """
        return self.conv.requires_grad or self.ssm.requires_grad

    def remember(self, rows: Tensor, positions: Tensor) -> None:
        """Keep the present states of `rows` as those after `positions` tokens."""
        self.overwritten: bool = True
        place = positions % self.window
        self.past_conv[rows, place] = self.conv.detach()[rows]
        self.past_ssm[rows, place] = self.ssm.detach()[rows]

    def undo(self, before: tuple[Tensor, Tensor], positions: Tensor) -> bool:
        if self.overwritten:
            return False
        self.conv, self.ssm = before
        return True

    def taking_back(self, fresh: Tensor, rows: Tensor, positions: Tensor) -> Callable[[], None]:
        back = None
        if rows.numel():
            place = positions % self.window
            back = self.past_conv[rows, place], self.past_ssm[rows, place]

        def write() -> None:
            for tensor in (self.conv, self.ssm):
                tensor.index_fill_(0, fresh, 0)
            if back is not None:
                self.conv.index_copy_(0, rows, back[0])
                self.ssm.index_copy_(0, rows, back[1])

        return write


def unknown_state(layer: int, state: LayerState) -> TypeError:
    """What to raise where a kind of state has no branch of its own, so that none is left out."""
    return TypeError(f"layer {layer} has a {type(state).__name__}, which is not known here")


def join(states: Sequence[LayerState]) -> LayerState:
    """States of several batches as one, row after row."""
    buffers = [state for state in states if isinstance(state, KeyValueState)]
    if buffers:  # then all states are of this kind
        capacity = max(state.capacity for state in buffers)
        states = [
            state.map(lambda t, more=capacity - state.capacity: F.pad(t, (0, 0, 0, more)))
            for state in buffers
        ]
    parts = [state.tensors() for state in states]
    return type(states[0])(**{name: torch.cat([p[name] for p in parts]) for name in parts[0]})


@dataclass(frozen=True)
class CacheSnapshot:
    """What a cache held at one moment; give it to `restore`, as often as wanted."""

    lengths: tuple[int, ...]
    floors: tuple[int, ...]
    states: dict[int, LayerState]
    behind: frozenset[int] = frozenset()
