"""What a cache holds: states by layer, a length on each row, and the pass that is under way."""

import torch
from torch import Tensor

from nemotron_v3.cache.states import LayerState
from nemotron_v3.cache.tokens import Step
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layout import SequenceLayout

HALF_WAY = (
    "a forward pass failed half-way: layers of the cache hold its tokens, though nobody has its "
    "result; restore a snapshot, or make a new cache"
)


class CacheData:
    """The data of a `NemotronHybridCache`, and its step from one pass to the next."""

    config: NemotronV3Config
    dtype: torch.dtype
    states: dict[int, LayerState]
    positions: Tensor  # int64 [rows], as `_lengths`
    max_length: int | None
    rollback_window: int
    withheld: str | None
    _lengths: list[int]  # tokens each row held when the present pass began
    _floors: list[int]  # the earliest position whose mamba state is kept, or 0
    _step: Step | None  # the present pass
    _updated: set[int]  # the layers that it has reached
    _behind: frozenset[int]  # layers that a pass has left out

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each row holds, on the host; `positions` is the same on the device."""
        return tuple(self._lengths) if self._step is None else self._step.ends

    def finish(self, layout: SequenceLayout | None = None) -> None:
        """End the forward pass, of `layout` where no layer has a state: the positions move on."""
        if self._step is None and not self.states and layout is not None:
            self._step = Step(layout.packed, tuple(self._lengths), self.positions)
        step = self._step
        if step is None:
            return
        lengths, floors = list(step.ends), list(step.ends)
        if self.rollback_window:
            reach = [end - self.rollback_window for end in lengths]
            floors = list(map(max, self._floors, reach))
        moved = step.layout.uniform_length
        moved = step.layout.cu_seqlens.diff() if moved is None else moved
        behind = self._behind
        if any(step.layout.lengths):
            behind = behind | (self.states.keys() - self._updated)
        withheld, self.withheld = self.withheld, self.withheld or HALF_WAY
        self.positions.add_(moved)
        self._lengths, self._floors, self._behind = lengths, floors, behind
        self._step = None
        self._updated.clear()
        self.withheld = withheld

    def _refuse_withheld(self) -> None:
        if self.withheld is not None:
            raise RuntimeError(self.withheld)

    def _settle(self) -> None:
        """Close a forward pass that is complete; one that is not cannot be read."""
        self._refuse_withheld()
        if self._step is not None and len(self._updated) < len(self.states):
            raise RuntimeError(
                f"the cache is in the middle of a forward pass ({len(self._updated)} of "
                f"{len(self.states)} layers updated): restore a snapshot if a pass failed, or call "
                "finish() if layers were called one by one"
            )
        if self._step is not None:
            self.finish()
