"""What lies before a segment of a sequence, and the gradients that come back to it.

The segments are computed twice: in the order of time without a graph, and backwards with the graph
of one segment at a time. Between them are kept the states that a segment hands to the next one, and
the keys and values of attention, whose gradients are collected on the way back.

Letters: T packed tokens of all segments, n of one, H query heads, J key/value heads, P head width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.segments import Segment

States = tuple[Tensor, Tensor]  # of a mixer's convolution and scan


class SegmentCarry:
    """The `Carry` of all segments of a sequence.

    Args:
        tokens: T.
        keep: what is done with a state that is kept for the way back.
    """

    def __init__(self, tokens: int, keep: Callable[[Tensor], Tensor]):
        self.tokens, self.keep = tokens, keep
        self.segment: Segment | None = None
        self._in_graph = False
        self._handed: dict[int, States] = {}  # on the way forward, to the next segment
        self._kept: dict[tuple[int, int], States] = {}  # after a segment, by its number and layer
        self._starts: dict[int, States] = {}  # of the segment that has a graph
        self._ends: dict[int, States] = {}
        self._dends: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self._held: dict[int, _Held] = {}

    def begin(self, segment: Segment, in_graph: bool) -> None:
        """The next pass is that of a segment; with `in_graph`, `backward` follows."""
        self.segment, self._in_graph = segment, in_graph
        self._starts, self._ends = {}, {}

    def backward(self, roots: Sequence[Tensor]) -> None:
        """The gradients of the segment: of `roots`, and of all that later segments had of it."""
        tensors, gradients = list(roots), [torch.ones_like(root) for root in roots]
        for layer, ends in self._ends.items():
            for end, gradient in zip(ends, self._dends.get(layer, ()), strict=False):
                if gradient is not None and end.requires_grad:
                    tensors.append(end)
                    gradients.append(gradient)
        self._ends = {}
        torch.autograd.backward(tensors, gradients)
        self._dends = {i: (conv.grad, ssm.grad) for i, (conv, ssm) in self._starts.items()}
        self._starts = {}

    # --- what layers ask for ------------------------------------------------------------------

    def recurrent(self, mixer: Any) -> "_States":
        assert self.segment is not None
        return _States(self, mixer.layer_idx, self.segment)

    def attend(
        self, layer_idx: int | None, q: Tensor, k: Tensor, v: Tensor, *, impl: str
    ) -> Tensor:
        segment = self.segment
        assert layer_idx is not None and segment is not None
        if not (segment.before or segment.leaves):
            return ops.attention(q, k, v, layout=segment.layout, impl=impl)
        if layer_idx not in self._held:
            self._held[layer_idx] = _Held(k, self.tokens)
        keys, values = _Behind.apply(k, v, self._held[layer_idx], segment)  # [before + n, J, P]
        entering, end = segment.entering, segment.before + segment.entering
        parts = []
        if entering:
            of_first = (t if segment.behind is None else t[:end] for t in (keys, values))
            parts.append(
                ops.cached_attention(
                    q[:entering],
                    *(t.transpose(0, 1)[None] for t in of_first),
                    layout=SequenceLayout.from_lengths([entering], q.device),
                    starts=(segment.before,),
                    positions=segment.held,
                    impl=impl,
                )
            )
        if segment.behind is not None:
            k, v = (t[end:] if end else t for t in (keys, values))
            parts.append(ops.attention(q[entering:], k, v, layout=segment.behind, impl=impl))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # --- the states of mixers -----------------------------------------------------------------

    def states_before(self, layer: int, segment: Segment) -> States:
        """What a layer's first document begins with; with a graph, leaves of it."""
        if not self._in_graph:
            return self._handed[layer]
        if layer not in self._starts:  # a checkpoint asks again
            conv, ssm = self._kept[segment.number - 1, layer]
            device = segment.layout.device
            self._starts[layer] = (
                conv.to(device, non_blocking=True).detach().requires_grad_(),
                ssm.to(device, non_blocking=True).detach().requires_grad_(),
            )
        return self._starts[layer]

    def states_after(self, layer: int, segment: Segment, states: States) -> None:
        """What a layer's last document ends with, where it goes on."""
        if self._in_graph:
            self._ends.setdefault(layer, states)
            return
        self._handed[layer] = states
        self._kept[segment.number, layer] = self.keep(states[0]), self.keep(states[1])


class _States:
    """The `RecurrentState` of a mixer in one segment: up to three pieces, of which only the first
    has states before it, and only the last hands its own on."""

    has_graph = False

    def __init__(self, carry: SegmentCarry, layer: int, segment: Segment):
        self.carry, self.layer, self.segment = carry, layer, segment
        self.enters = self.leaves = False  # of the piece that is scanned

    def for_one_token(self) -> None:
        """A segment is no decode step."""

    def pieces(self) -> Iterator[tuple[Tensor | None, SequenceLayout]]:
        """The document that enters, those that lie here whole, and the one that goes on."""
        segment, lengths = self.segment, self.segment.layout.lengths
        first = 1 if segment.before else 0
        last = len(lengths) - 1 if segment.leaves else len(lengths)
        cuts = sorted({0, first, max(first, last), len(lengths)})
        device = segment.layout.device
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            self.enters = start == 0 and bool(segment.before)
            self.leaves = end == len(lengths) and segment.leaves
            if end - start == len(lengths):
                yield None, segment.layout
                return
            offsets = segment.layout.offsets
            places = torch.arange(offsets[start], offsets[end], device=device)
            yield places, SequenceLayout.from_lengths(lengths[start:end], device)

    def read(self, tokens: Tensor, in_graph: bool) -> dict[str, Any]:
        states: dict[str, Any] = {"return_final_states": self.leaves}
        if self.enters:
            conv, ssm = self.carry.states_before(self.layer, self.segment)
            states |= {"conv_states": conv, "ssm_states": ssm}
        return states

    def write(self, conv: Tensor, ssm: Tensor) -> None:
        if self.leaves:
            self.carry.states_after(self.layer, self.segment, (conv[-1:], ssm[-1:]))

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))


class _Held:
    """Keys and values of a layer `[T, J, P]`, and their gradients in fp32 or wider."""

    def __init__(self, k: Tensor, tokens: int):
        self.keys, self.values = (k.new_empty(tokens, *k.shape[1:]) for _ in range(2))
        self.written: set[int] = set()
        self._gradients: tuple[Tensor, Tensor] | None = None

    def write(self, k: Tensor, v: Tensor, segment: Segment) -> None:
        """Store those of a segment, once: what is computed again is the same."""
        if segment.number not in self.written:
            self.keys[segment.tokens] = k
            self.values[segment.tokens] = v
            self.written.add(segment.number)

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        if self._gradients is None:
            dtype = torch.promote_types(self.keys.dtype, torch.float32)
            new = (torch.zeros_like(t, dtype=dtype) for t in (self.keys, self.values))
            self._gradients = (next(new), next(new))
        return self._gradients


class _Behind(torch.autograd.Function):
    """A segment's keys and values behind those of its first document that lie before it.

    `[n, J, P]` each -> `[before + n, J, P]` each. On the way back the gradients of what lies before
    are collected, and those that later segments have collected of the segment's own are added.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, held: _Held, segment: Segment) -> States:
        held.write(k, v, segment)
        ctx.held, ctx.segment = held, segment
        first = segment.start - segment.before
        keys, values = (t[first : segment.end].detach() for t in (held.keys, held.values))
        return keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkeys: Tensor, dvalues: Tensor) -> tuple[Tensor | None, ...]:
        segment, own = ctx.segment, []
        before = slice(segment.start - segment.before, segment.start)
        for gradient, held in zip((dkeys, dvalues), ctx.held.gradients, strict=True):
            held[before] += gradient[: segment.before]
            own.append((held[segment.tokens] + gradient[segment.before :]).to(gradient.dtype))
        return *own, None, None
