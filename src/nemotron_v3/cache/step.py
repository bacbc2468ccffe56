"""One forward pass over a cache as a transaction: `with cache.step(layout) as step:`."""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from nemotron_v3.cache.checks import check_no_step_missed, check_rows, no_state_error
from nemotron_v3.cache.data import HALF_WAY, CacheData
from nemotron_v3.cache.states import LayerState
from nemotron_v3.cache.tokens import Step
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import kept


class Transaction:
    """The layers of one forward pass: what they write of a cache belongs together.

    From the first layer on the cache is withheld until the pass is over, so that whatever stops it
    (an error, an interrupt, want of memory) leaves no half of a pass that can be taken for a whole
    one. Where the first layer fails by itself, it is undone and the cache is as it was; where that
    cannot be, or other layers or the head fail after it, the cache stays withheld.

    Args:
        cache: what is written.
        layout: the new tokens, one document a row.
    """

    def __init__(self, cache: CacheData, layout: SequenceLayout):
        self._cache, self._layout = cache, layout
        self._step: Step | None = None
        # The layer that is at work, and the tensors that it found.
        self._at_work: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._has_begun = False
        self._has_layers = False  # whether a layer has handed its result on

    def __enter__(self) -> Self:
        return self

    def begin(self, layer_idx: int | None) -> LayerState:
        """The state of a layer, which it moves on from now; its `step` are the tokens.

        Raises:
            ValueError: a layer without state, or tokens that do not fit.
            RuntimeError: the cache is withheld, or a step has gone by without this layer.
        """
        cache = self._cache
        if layer_idx is None or layer_idx not in cache.states:
            raise no_state_error(layer_idx, cache.states)
        if cache.withheld is not None and not self._has_begun:
            raise RuntimeError(cache.withheld)
        if layer_idx in cache._updated:
            cache.finish()
        if cache._behind:
            check_no_step_missed(layer_idx, cache._behind, cache.lengths)
        step = cache._step
        if step is None:
            lengths, positions = tuple(cache._lengths), cache.positions
            check_rows(self._layout, lengths, positions.device, cache.max_length)
            positions = kept(positions.clone())
            step = Step(self._layout.packed, lengths, positions, cache.rollback_window)
        elif step is not self._step and step.lengths != self._layout.lengths:
            raise ValueError(
                f"layer {layer_idx} gets {list(self._layout.lengths)} tokens, the layers before it "
                f"in this pass got {list(step.lengths)}: give all the same"
            )
        if self._has_begun:
            self._has_layers = True
        state = cache.states[layer_idx]
        state.step, state.overwritten = step, False
        self._step = step
        self._at_work = layer_idx, state.pair()
        self._has_begun = True
        cache.withheld = HALF_WAY
        cache._step = step
        cache._updated.add(layer_idx)
        return state

    def layer_is_done(self) -> None:
        """Mark the writes of the layer at work as complete: its result is handed on."""
        self._has_layers = self._has_begun

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._has_begun:
            return
        if kind is None:
            self._cache.withheld = None
        elif not self._has_layers:
            self._undo()

    @torch.no_grad()
    def _undo(self) -> None:
        """Take back what the one layer that has begun, and failed, has written."""
        if self._at_work is None or self._step is None:
            return
        cache, (layer_idx, before) = self._cache, self._at_work
        begun = layer_idx in cache._updated  # an interrupt may have come before it was added
        if begun and not cache.states[layer_idx].undo(before, self._step.positions):
            return
        cache._updated.discard(layer_idx)
        if not cache._updated:
            cache._step = None
        cache.withheld = None
