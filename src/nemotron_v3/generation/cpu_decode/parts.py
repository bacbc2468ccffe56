"""What the blocks of a decode step share: norms and projections of a few tokens on a CPU.

Letters: B rows, one token each; D hidden size; n inputs, m outputs of a projection.
"""

from typing import Self

import torch
from torch import Tensor

from nemotron_v3.layers.decode_weights import MLPWeights, NormWeights, Projection
from nemotron_v3.model.protocol import CausalLM
from nemotron_v3.ops.common.onednn import PackedWeight, onednn_works

# Rows of a batch, and elements of a model, whose weights are laid out a second time.
FEW_TOKENS, LAID_OUT = 16, 1 << 26
# Elements whose weighted sum is worth a thread.
THREAD = 1 << 17


class Form:
    """How many rows a step has, and how it multiplies them by weights.

    Attributes:
        rows: B.
        streams: one row by weighted sums, from copies of the weights.
        packs: a few rows by products with packed copies of the weights.
    """

    def __init__(self, model: CausalLM, like: Tensor, rows: int):
        self.rows: int = rows
        self._like = like
        small = sum(p.numel() for p in model.parameters()) <= LAID_OUT
        copies = small and like.dtype == torch.float32
        self.streams: bool = copies and rows == 1
        self.packs: bool = copies and 1 < rows <= FEW_TOKENS and onednn_works()

    @property
    def copies(self) -> bool:
        """Whether projections have copies of their weights."""
        return self.streams or self.packs

    def empty(self, *shape: int) -> Tensor:
        """An array `[B, *shape]` of the model's dtype."""
        return self._like.new_empty(self.rows, *shape)


class Norm:
    """RMS normalisation of `[B, groups, n]`, one array for all results.

    `x / sqrt(mean(x^2) + eps)` is `sqrt(n) x / |(x, sqrt(n eps))|`: an argument has one element
    more in each group, which stays what it is.

    Args:
        folded: the projections that follow take the weight, where they have a copy of their own.
    """

    def __init__(self, form: Form, norm: NormWeights, groups: int = 1, folded: bool = False):
        shape = (groups,) if groups > 1 else ()
        n = len(norm.weight) // groups
        self._shape, self._last = (*shape, n + 1), (n * norm.eps) ** 0.5
        self._result = form.empty(len(norm.weight))
        self._by_group = self._result.view(-1, *shape, n)
        self._root = form.empty(*shape, 1)
        weight = norm.weight * n**0.5
        self.folded: Tensor | None = weight if folded and form.copies else None
        self._weight = None if self.folded is not None else weight

    def argument(self, form: Form) -> Tensor:
        """An array `[B, groups, n + 1]`, or `[B, n + 1]`, for what is normalised."""
        array = form.empty(*self._shape)
        array[..., -1] = self._last
        return array

    def __call__(self, argument: Tensor, x: Tensor) -> Tensor:
        """An argument, and all of it but the last element of each group -> `[B, D]`."""
        torch.linalg.vector_norm(argument, dim=-1, keepdim=True, out=self._root)
        torch.div(x, self._root, out=self._by_group)
        return self._result if self._weight is None else self._result.mul_(self._weight)


class Linear:
    """A projection `[B, n] -> [B, m]`, of what a norm may leave to it.

    A step reads every weight once, from memory that is far away, and BLAS reads short rows at a
    third of what the memory gives. So one token takes a weighted sum of rows (`WeightedRows`), and
    a few tokens take a weight that oneDNN has packed for them, or `W x^T`; large models, many
    tokens and fp64 are BLAS's own.
    """

    def __init__(
        self,
        form: Form,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Norm | None = None,
    ):
        if norm is not None and norm.folded is not None:
            weight = weight * norm.folded
        self._weight, self._bias = weight, bias
        B, m = form.rows, len(weight)
        self.result: Tensor = form.empty(m)
        self._rows = self._columns = self._packed = None
        if form.streams:
            self._rows = WeightedRows(weight.t())
        elif form.packs:
            self._packed = PackedWeight(weight, B)
        elif 1 < B <= FEW_TOKENS:
            self._columns = weight.new_empty(m, B)

    @classmethod
    def of(cls, form: Form, *projections: Projection, norm: Norm | None = None) -> Self:
        """Of projections side by side, which all have a bias or none has."""
        if len(projections) == 1:
            return cls(form, *projections[0], norm)
        biases = [projection.bias for projection in projections if projection.bias is not None]
        weight = torch.cat([projection.weight for projection in projections])
        return cls(form, weight, torch.cat(biases) if biases else None, norm)

    def __call__(self, x: Tensor) -> Tensor:
        """In an array that the next call may write over."""
        if self._rows is not None:
            y = self._rows(x)
        elif self._packed is not None:
            y = self._packed(x)
        elif self._columns is not None:
            y = self.result
            torch.mm(self._weight, x.t(), out=self._columns)
            y.copy_(self._columns.t())
        else:
            y = torch.mm(x, self._weight.t(), out=self.result)
        return y if self._bias is None else y.add_(self._bias)

    def write(self, x: Tensor) -> None:
        """In `result`, whose views are laid out."""
        if self._rows is not None and self._bias is None:
            torch.sum(self._rows.parts(x), 0, True, out=self.result)
        elif (y := self(x)) is not self.result:
            self.result.copy_(y)


class WeightedRows:
    """A matrix `[n, m]` whose rows are summed with weights: `x W^T` for one x, with `W^T` here.

    What an embedding bag does for its rows; PyTorch's kernel for it streams through them at the
    rate of the memory, where products of a matrix and a vector reach half of it and less. A bag is
    one thread's, so a large matrix is several.
    """

    def __init__(self, rows: Tensor):
        self._rows = rows.contiguous()
        self._all, self._starts = torch.arange(len(rows)), starts(*rows.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """`[1, n]` -> `[1, m]`."""
        parts = self.parts(x)
        return parts if len(parts) == 1 else parts.sum(0, True)

    def parts(self, x: Tensor) -> Tensor:
        """`[1, n]` -> `[parts, m]`, whose sum is the product."""
        return self.sums(self._all, self._starts, x[0])

    def sums(self, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
        """The sums of several runs in a list of row numbers, `[runs, m]`, each row weighted."""
        return torch.embedding_bag(self._rows, rows, starts, False, 0, False, weights)[0]


def starts(rows: int, width: int) -> Tensor:
    """Where as many equal runs of rows begin as threads have enough to do."""
    runs = max(1, min(torch.get_num_threads(), rows * width // THREAD))
    return torch.arange(runs) * (rows // runs)


class MLP:
    """`down_proj(relu(up_proj(x))^2)` of `[B, D]`, behind a norm."""

    def __init__(self, form: Form, mlp: MLPWeights, norm: Norm):
        self._up = Linear.of(form, mlp.up_proj, norm=norm)
        self._down = Linear.of(form, mlp.down_proj)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._up(x).relu_().square_())
