"""The gradients of the convolution (README.md, 'How the portable form computes the backward').

Letters: T packed tokens, n_docs documents, C channels, W taps; u is the sum before the activation.
"""

import torch
from torch import Tensor

from nemotron_v3.ops.causal_conv1d.portable_borders import Borders
from nemotron_v3.ops.causal_conv1d.portable_taps import head_inputs, sum_of_taps
from nemotron_v3.ops.common.blocks import Workspace, row_blocks
from nemotron_v3.ops.common.precision import WIDE

# Rows of partial sums over tokens: a pass over fewer is mostly the call.
SUMMED = 128


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    borders: Borders,
    activation: str | None,
    dy: Tensor,
    dx: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias and the initial states; that of x is written to `dx`."""
    gradients = _Gradients(x, weight, bias, activation, dx)
    gradients.add_stream(borders, dy)
    dstates = gradients.add_heads(initial_states, borders, dy)
    dbias = None if bias is None else gradients.dbias.to(bias.dtype)
    return gradients.dtaps.t().to(weight.dtype), dbias, dstates


class _Gradients:
    """`du` is the gradient of u; then, with `inputs` as `sum_of_taps` takes them,

    dinputs[i + j] += taps[j] du_i,   dtaps[j] = sum_i du_i inputs[i + j],   dbias = sum_i du_i.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dx: Tensor
    ):
        self.x, self.dx, self.silu = x, dx, activation == "silu"
        self.dtype = WIDE[x.dtype]
        self.taps = weight.t().to(self.dtype).contiguous()  # [W, C]
        self.bias = None if bias is None else bias.to(self.dtype)
        self.work = Workspace(x, self.dtype)
        self.dtaps = torch.zeros_like(self.taps)
        self.dbias = torch.zeros_like(self.taps[0])

    def du(self, inputs: Tensor, dy: Tensor, out: Tensor) -> Tensor:
        """`[..., n + W - 1, C]` and `[..., n, C]` -> `[..., n, C]`."""
        if not self.silu:
            return out.copy_(dy)
        u = sum_of_taps(inputs, self.taps, self.bias, out=self.work("u", *dy.shape))
        return torch.ops.aten.silu_backward(dy.to(self.dtype), u, grad_input=out)

    def add_sums(self, du: Tensor, inputs: Tensor) -> None:
        """`[n, C]`, `[n + W - 1, C]`: the sums over tokens."""
        self.dbias += du.sum(0)
        rows = min(SUMMED, len(du))
        whole = len(du) - len(du) % rows
        for j, dtap in enumerate(self.dtaps):
            # Rows are multiplied and added in one pass onto few rows, which stay in a cache.
            sums = self.work("sums", rows, du.shape[1]).zero_()
            for i in range(0, whole, rows):
                sums.addcmul_(du[i : i + rows], inputs[i + j : i + j + rows])
            dtap += sums.sum(0)
            if whole < len(du):
                dtap += (du[whole:] * inputs[whole + j : len(du) + j]).sum(0)

    def add_stream(self, borders: Borders, dy: Tensor) -> None:
        """All tokens but the heads, whose du is left out; the heads' dx so far is what later
        tokens of their document contribute."""
        (T, C), W = self.x.shape, len(self.taps)
        for start, end in row_blocks(T, C, self.x.device):
            # dx_t needs du of t and the W - 1 tokens after it, each of them W - 1 inputs before it.
            first, last = max(start, W - 1), min(end + W - 1, T)
            du = self.work("du", end - start + W - 1, C)
            du[: first - start] = 0
            du[max(0, last - start) :] = 0
            if first < last:
                inputs = self.x[first - (W - 1) : last].to(self.dtype)
                some = du[first - start : last - start]
                self.du(inputs, dy[first:last], out=some)
                some.index_fill_(0, borders.heads_among_tokens(first, last), 0)
                if first < end:
                    self.add_sums(some[: end - first], inputs[: end - first + W - 1])
            # The same taps, backwards.
            dx = self.dx[start:end]
            if dx.dtype == self.dtype:
                sum_of_taps(du, self.taps.flip(0), None, out=dx)
            else:
                dx.copy_(sum_of_taps(du, self.taps.flip(0), None))

    def add_heads(self, states: Tensor | None, borders: Borders, dy: Tensor) -> Tensor | None:
        """The heads, document by document; returns the gradient of the initial states."""
        W = len(self.taps)
        dstates = None if states is None else torch.zeros_like(states)
        for documents, heads, inputs in head_inputs(self.x, states, borders, W):
            D, _, C = inputs.shape
            dy_heads = inputs.new_zeros(D * (W - 1), C)
            rows = dy.index_select(0, heads.sources).to(self.dtype)
            dy_heads.index_copy_(0, heads.places, rows)
            dy_heads = dy_heads.view(D, W - 1, C)
            du = self.du(inputs, dy_heads, out=torch.empty_like(dy_heads))
            dinputs = torch.zeros_like(inputs)
            for j, tap in enumerate(self.taps):
                dinputs[:, j : j + W - 1].addcmul_(du, tap)
                self.dtaps[j] += (du * inputs[:, j : j + W - 1]).sum((0, 1))
            self.dbias += du.sum((0, 1))
            dtokens = dinputs[:, W - 1 :].flatten(0, 1).index_select(0, heads.places)
            self.dx.index_add_(0, heads.sources, dtokens.to(self.dx.dtype))
            if dstates is not None:
                dstates[documents, :, 1:] = dinputs[:, : W - 1].transpose(1, 2).to(dstates.dtype)
        return dstates
