"""The routed experts' weights, and low-rank updates beside them.

Letters: T packed tokens, K experts a token, E experts, X width the experts see, F expert width, r
rank.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nemotron_v3 import ops
from nemotron_v3.config import MoEConfig
from nemotron_v3.layers import graph_ops
from nemotron_v3.layers.narrow import keeping_codes, wide

STACKS = ("up_proj", "down_proj")


class LowRankUpdates(nn.Module):
    """A low-rank update of both matrices of each expert: `W[e] + scale b[e] a[e]` (LoRA, Hu et al.
    2021, arXiv 2106.09685).

    Attributes:
        up_a, up_b: `[E, r, X]`, `[E, F, r]`. down_a, down_b: `[E, r, F]`, `[E, X, r]`. Every a is
            drawn from uniform(-1/sqrt(inputs), 1/sqrt(inputs)), every b is 0.
        scale: of both updates, alpha / r.
        merged: whether the stacks hold the sum now.
    """

    def __init__(
        self, up_proj: Tensor, down_proj: Tensor, rank: int, alpha: float, dtype: torch.dtype | None
    ):
        super().__init__()
        E, F, X = up_proj.shape
        factory_kwargs = {"dtype": dtype or up_proj.dtype, "device": up_proj.device}
        self.scale: float = alpha / rank
        self.up_a: nn.Parameter = nn.Parameter(torch.empty(E, rank, X, **factory_kwargs))
        self.up_b: nn.Parameter = nn.Parameter(torch.empty(E, F, rank, **factory_kwargs))
        self.down_a: nn.Parameter = nn.Parameter(torch.empty(E, rank, F, **factory_kwargs))
        self.down_b: nn.Parameter = nn.Parameter(torch.empty(E, X, rank, **factory_kwargs))
        self._kept: list[tuple[Tensor, int | None]] = []  # each stack's old values, and its version
        self.register_state_dict_pre_hook(_refuse_merged)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw anew: the updates are 0 then."""
        for a, b in self._pairs():
            bound = 1 / math.sqrt(a.shape[2])
            a.uniform_(-bound, bound)
            b.zero_()

    @property
    def merged(self) -> bool:
        return bool(self._kept)

    def merge_(
        self, up_proj: Tensor, down_proj: Tensor, keep_on: torch.device | str | None
    ) -> None:
        kept = []
        stacks = (up_proj, down_proj)
        try:
            for weight, (a, b) in zip(stacks, self._pairs(), strict=True):
                base = ops.merge_low_rank_(weight, a, b, scale=self.scale, keep_on=keep_on)
                kept.append((base, _version(weight)))
        except BaseException:
            if kept:
                ops.unmerge_low_rank_(up_proj, kept[0][0])
            raise
        self._kept = kept

    def unmerge_(self, up_proj: Tensor, down_proj: Tensor) -> None:
        stacks = (up_proj, down_proj)
        merges = zip(STACKS, stacks, self._pairs(), self._kept, strict=True)
        for name, weight, (a, b), (base, version) in merges:
            if _version(weight) != version and not self._is_sum(weight, base, a, b):
                raise RuntimeError(
                    f"{name} or its update was changed after the merge, and unmerging would undo "
                    "that too: remove_low_rank() keeps the stacks as they are"
                )
        for weight, (base, _) in zip(stacks, self._kept, strict=True):
            ops.unmerge_low_rank_(weight, base)
        self._kept = []

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.up_a, self.up_b), (self.down_a, self.down_b)

    def _is_sum(self, weight: Tensor, base: Tensor, a: Tensor, b: Tensor) -> bool:
        """Whether a merge gives this weight; a copy of a module has the values, not the version."""
        if base.dtype != weight.dtype:
            return True  # unmerging says so
        again = base.to(weight.device, copy=True)
        ops.merge_low_rank_(again, a, b, scale=self.scale)
        return torch.equal(again, weight)

    def extra_repr(self) -> str:
        return f"rank={self.up_a.shape[1]}, scale={self.scale:g}, merged={self.merged}"


def _version(weight: Tensor) -> int | None:
    """A number that changes with the values in place; there is none in inference mode."""
    return None if weight.is_inference() else weight._version


def _refuse_merged(module: LowRankUpdates, prefix: str, keep_vars: bool) -> None:
    if module.merged:
        raise RuntimeError(
            f"{prefix}: a state dict would hold the merged updates twice, in the stacks and "
            "beside them: unmerge_low_rank() first, or remove_low_rank() to keep the sum"
        )


class NemotronV3Experts(nn.Module):
    """The routed experts as two stacked tensors: `up_proj [E, F, X]`, `down_proj [E, X, F]`.

    Attributes:
        low_rank: a `LowRankUpdates` beside the stacks, or None.
        local: what a call computes with in place of a stack or an update, both itself unless
            another function is put there (stacks spread over processes).
    """

    def __init__(self, config: MoEConfig, dtype: torch.dtype | None, impl: str):
        super().__init__()
        E, F, X = (
            config.n_routed_experts,
            config.moe_inter_dim,
            config.moe_latent_size or config.dim,
        )
        self.impl = impl
        self.up_proj: nn.Parameter = nn.Parameter(torch.empty(E, F, X, dtype=dtype))
        self.down_proj: nn.Parameter = nn.Parameter(torch.empty(E, X, F, dtype=dtype))
        self.low_rank: LowRankUpdates | None = None
        self.local: Callable[[Tensor], Tensor] | None = None  # as in `KeepsFp32`

    @property
    def op(self) -> str:
        """The op of `nemotron_v3.ops` that a call runs."""
        updated = self.low_rank is not None and not self.low_rank.merged
        return "grouped_low_rank" if updated else "experts"

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """`[T, X]`, expert numbers and weights `[T, K]` -> `[T, X]`."""
        up, down = wide(self.up_proj), wide(self.down_proj)
        if up is self.up_proj and down is self.down_proj:
            if self.local is not None:
                up, down = self.local(up), self.local(down)
            return self._compute(x, indices, weights, up, down)
        with keeping_codes((self.up_proj, up), (self.down_proj, down)):
            return self._compute(x, indices, weights, up, down)

    def _compute(
        self, x: Tensor, indices: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        low = self.low_rank
        if low is None or low.merged:
            compiling = torch.compiler.is_compiling()
            if compiling and not x.is_cuda and not torch.is_autocast_enabled("cpu"):
                return graph_ops.experts(x, indices, weights, up_proj, down_proj, self.impl)
            return ops.experts(x, indices, weights, up_proj, down_proj, impl=self.impl)
        updates = low.up_a, low.up_b, low.down_a, low.down_b
        if self.local is not None:
            updates = map(self.local, updates)
        return ops.grouped_low_rank(
            x, indices, weights, up_proj, down_proj, *updates, scale=low.scale, impl=self.impl
        )

    def add_low_rank(
        self, rank: int, *, alpha: float | None = None, dtype: torch.dtype | None = None
    ) -> LowRankUpdates:
        """Put a low-rank update beside each expert's matrices; it is 0 until it is trained.

        What is trained is the caller's to say: the stacks' `requires_grad` stays as it is, and a
        frozen stack costs no gradient.

        Args:
            rank: r of both updates.
            alpha: the updates are scaled by alpha / rank; None is `rank`.
            dtype: of the new parameters; None is that of the stacks.

        Returns:
            What is `self.low_rank` from now on.

        Raises:
            ValueError: a rank below 1, or an update that is there already.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if self.low_rank is not None:
            raise ValueError("there is a low-rank update already: remove_low_rank() first")
        alpha = rank if alpha is None else alpha
        self.low_rank = LowRankUpdates(self.up_proj, self.down_proj, rank, alpha, dtype)
        return self.low_rank

    def merge_low_rank(self, *, keep_on: torch.device | str | None = None) -> None:
        """Add the updates to the stacks in place, rounded once, and compute with the sum alone.

        Args:
            keep_on: the device of the old stacks, which are kept; None is their own.

        Raises:
            ValueError: no update, or a merged one; nothing is changed.
        """
        self._updates(merged=False).merge_(self.up_proj, self.down_proj, keep_on)

    def unmerge_low_rank(self) -> None:
        """Give the stacks back what they held before the merge, bit for bit.

        Raises:
            ValueError: no merged update, or stacks of another dtype since.
            RuntimeError: stacks that were changed since. Nothing is changed then.
        """
        self._updates(merged=True).unmerge_(self.up_proj, self.down_proj)

    def remove_low_rank(self) -> None:
        """Drop the updates; what was merged stays in the stacks.

        Raises:
            ValueError: no update.
        """
        self._updates(merged=None)
        self.low_rank = None

    def _updates(self, merged: bool | None) -> LowRankUpdates:
        if self.low_rank is None:
            raise ValueError("there is no low-rank update: add_low_rank(rank) first")
        if merged is not None and self.low_rank.merged != merged:
            state = "not merged" if merged else "merged already"
            raise ValueError(f"the low-rank update is {state}")
        return self.low_rank
