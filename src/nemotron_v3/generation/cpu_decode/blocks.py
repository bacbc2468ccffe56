"""The blocks of a decode step on a CPU: each lays its arrays out once and then computes in place.

Letters: B rows, one token each; D hidden size; Mamba: H heads, P head width, G groups, N state, W
conv taps, C convolved channels; MoE: E experts, K choices a token, R = B*K choices, X width the
experts see, F expert width.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.cache import NemotronHybridCache, Transaction
from nemotron_v3.cache.states import KeyValueState, MambaState
from nemotron_v3.generation.cpu_decode.parts import MLP, Form, Linear, Norm, WeightedRows, starts
from nemotron_v3.layers.decode_weights import AttentionWeights, Mamba2Weights, MoEWeights
from nemotron_v3.ops.common.onednn import PackedWeight

# With more choices an expert on average the op for many tokens is as fast.
FEW_CHOICES = 4


class Step(Protocol):
    """What a block knows of the step that it is a part of."""

    cache: NemotronHybridCache
    form: Form
    transaction: Transaction


class _MLPBlock:
    def __init__(self, step: Step, block: Any, layer: int):
        form = step.form
        self._norm = Norm(form, block.norm.decode_weights(), folded=True)
        self._mlp = MLP(form, block.mixer.decode_weights(), self._norm)

    def __call__(self, stream: Tensor, hidden: Tensor) -> None:
        hidden.add_(self._mlp(self._norm(stream, hidden)))


class _AttentionBlock:
    def __init__(self, step: Step, block: Any, layer: int):
        weights: AttentionWeights = block.mixer.decode_weights()
        form = step.form
        self._step, self._layer = step, layer
        self._norm = Norm(form, block.norm.decode_weights(), folded=True)
        projections = (weights.q_proj, weights.k_proj, weights.v_proj)
        self._qkv = Linear.of(form, *projections, norm=self._norm)
        self._o = Linear.of(form, weights.o_proj)
        parts = self._qkv.result.split([len(p.weight) for p in projections], dim=1)
        self._heads = [part.unflatten(1, (-1, weights.head_dim)) for part in parts]

    def __call__(self, stream: Tensor, hidden: Tensor) -> None:
        self._qkv.write(self._norm(stream, hidden))
        q, k, v = self._heads
        state = self._step.transaction.begin(self._layer)
        assert isinstance(state, KeyValueState)
        tokens = state.step
        keys, values = state.append(k, v)
        y = ops.cached_attention(
            q,
            keys,
            values,
            layout=tokens.layout,
            starts=tokens.starts,
            positions=tokens.positions,
            impl="portable",
        )
        hidden.add_(self._o(y.flatten(1)))


class _MambaBlock:
    def __init__(self, step: Step, block: Any, layer: int):
        weights: Mamba2Weights = block.mixer.decode_weights()
        state, form = step.cache.states[layer], step.form
        assert isinstance(state, MambaState)
        B, H, P = form.rows, len(weights.A_log), weights.head_dim
        G, N = weights.n_groups, weights.state_size
        self._step, self._layer = step, layer
        self._norm = Norm(form, block.norm.decode_weights(), folded=True)
        self._in = Linear.of(form, weights.in_proj, norm=self._norm)
        z, xBC, self._dt = self._in.result.split([H * P, H * P + 2 * G * N, H], dim=1)
        self._gated = Norm(form, weights.norm, G, folded=True)
        self._out = Linear.of(form, weights.out_proj, norm=self._gated)
        self._product = self._gated.argument(form)  # [B, G, H/G*P + 1], of y and silu(z)
        self._yz = self._product[..., :-1]
        self._z = z.view(self._yz.shape)

        # The state [B, C, W] as [B, W, C] in memory: then its inputs move on in whole rows.
        if not state.conv.transpose(1, 2).is_contiguous():
            state.conv = state.conv.transpose(1, 2).contiguous().transpose(1, 2)
        self._conv = state.conv.transpose(1, 2)
        self._window = torch.empty_like(self._conv)
        self._inputs = (self._conv[:, 1:], xBC[:, None])
        self._taps = weights.conv_weight.t().contiguous()
        W, bias = len(self._taps), weights.conv_bias
        self._terms = form.empty(W + (bias is not None), xBC.shape[1])
        self._products = self._terms[:, :W]
        if bias is not None:
            self._terms[:, W] = bias
        self._xBC = form.empty(xBC.shape[1])
        x, inputs, outputs = self._xBC.split([H * P, G * N, G * N], dim=1)
        self._x = x.unflatten(1, (H, P))
        self._B_row = inputs.unflatten(1, (G, 1, N))  # [B, G, 1, N]
        self._C_in_place = outputs.unflatten(1, (G, N))
        # A copy where rows do not follow each other.
        self._C = self._C_in_place if B == 1 else form.empty(G, N)
        self._C_row = self._C.view(B * G, 1, N)

        self._dt_bias, self._dt_limit = weights.dt_bias, weights.dt_limit
        self._A, self._D = -weights.A_log.exp(), weights.D[:, None]
        self._step_size, self._decay = form.empty(H), form.empty(H)
        self._dtx = form.empty(H, P)
        self._dtx_column = self._dtx.view(B, G, -1, 1)  # [B, G, H/G*P, 1]
        self._state, self._decay_4d = state.ssm, self._decay[..., None, None]
        self._by_group = state.ssm.view(B, G, -1, N)  # [B, G, H/G*P, N]
        self._transposed = state.ssm.view(B * G, -1, N).transpose(1, 2)
        self._y = form.empty(H * P)
        self._y_row, self._y_heads = self._y.view(B * G, 1, -1), self._y.view(B, H, P)
        self._y_groups = self._y.view(self._yz.shape)

    def __call__(self, stream: Tensor, hidden: Tensor) -> None:
        state = self._step.transaction.begin(self._layer)
        assert isinstance(state, MambaState)
        state.overwritten = True
        self._in.write(self._norm(stream, hidden))
        self._convolve()
        self._recur()
        torch.mul(F.silu(self._z), self._y_groups, out=self._yz)
        hidden.add_(self._out(self._gated(self._product, self._yz)))

    def _convolve(self) -> None:
        torch.cat(self._inputs, 1, out=self._window)
        self._conv.copy_(self._window)
        torch.mul(self._window, self._taps, out=self._products)
        torch.sum(self._terms, 1, out=self._xBC)
        F.silu(self._xBC, inplace=True)

    def _recur(self) -> None:
        """`S <- exp(dt A) S + dt x B^T`, `y = S C + D x`."""
        torch.add(self._dt, self._dt_bias, out=self._step_size)
        dt = F.softplus(self._step_size)
        if self._dt_limit != (0.0, float("inf")):
            dt.clamp_(*self._dt_limit)
        torch.mul(dt, self._A, out=self._decay).exp_()
        self._state.mul_(self._decay_4d)
        torch.mul(self._x, dt[..., None], out=self._dtx)
        self._by_group.addcmul_(self._dtx_column, self._B_row)
        # C from the left: a batch of (matrix, column) products runs several times slower.
        if self._C is not self._C_in_place:
            self._C.copy_(self._C_in_place)
        torch.bmm(self._C_row, self._transposed, out=self._y_row)
        self._y_heads.addcmul_(self._D, self._x)


class _MoEBlock:
    def __init__(self, step: Step, block: Any, layer: int):
        weights: MoEWeights = block.mixer.decode_weights()
        form = step.form
        self._norm = Norm(form, block.norm.decode_weights())
        self._router: Any = weights.router
        shared = weights.shared
        self._shared = None if shared is None else MLP(form, shared, self._norm)
        self._into = self._back = None
        if weights.into_latent is not None and weights.from_latent is not None:
            self._into = Linear.of(form, weights.into_latent)
            self._back = Linear.of(form, weights.from_latent)
            self._latent_sum = torch.empty_like(self._into.result)
        self._experts, up, down = weights.experts, weights.up_proj, weights.down_proj
        E, F_, X = up.shape
        B, K = form.rows, self._router.top_k
        self._streams = form.streams
        # Where the choices reach most experts anyway, all of them are two products.
        self._all = form.packs and B * K >= E
        self._few = B * K <= FEW_CHOICES * E and not (self._all or self._streams)
        if self._few:
            self._up, self._down = up.unbind(0), down.unbind(0)  # [F, X], [X, F] each
            self._h, self._y = form.empty(K, F_).view(B * K, F_), form.empty(K, X).view(B * K, X)
        if self._all:
            self._up_all = PackedWeight(up.view(E * F_, X), B)
            self._down_all = PackedWeight(down.transpose(0, 1).reshape(X, E * F_), B)
            self._by_expert = form.empty(E)
        if self._streams:
            self._up_rows = WeightedRows(up.transpose(1, 2).flatten(0, 1))  # [E*X, F]
            self._down_rows = WeightedRows(down.transpose(1, 2).flatten(0, 1))  # [E*F, X]
            # The numbers of these rows by expert, `[E, X]` and `[E, F]`; a run for each choice.
            self._of_up = torch.arange(E * X).view(E, X)
            self._of_down = torch.arange(E * F_).view(E, F_)
            self._chosen_up = torch.empty(K, X, dtype=torch.int64)
            self._chosen_down = torch.empty(K, F_, dtype=torch.int64)
            self._runs, self._starts = torch.arange(K) * X, starts(K * F_, X)
            self._x = form.empty(K, X)
            self._scores = WeightedRows(self._router.weight.detach().t())

    def __call__(self, stream: Tensor, hidden: Tensor) -> None:
        x = self._norm(stream, hidden)
        weights, indices = self._choose(x)  # [B, K]
        if self._into is None or self._back is None:
            self._route(hidden, x, weights, indices)
        else:
            routed = self._latent_sum.zero_()
            self._route(routed, self._into(x), weights, indices)
            hidden.add_(self._back(routed))
        if self._shared is not None:
            hidden.add_(self._shared(x))

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts `[B, K]`, by the router itself where it does more than to route."""
        router = self._router
        if router.observed or not router.is_plain:
            return router(x)
        bias, options = router.e_score_correction_bias, router.options()
        if self._streams:
            return ops.choose_experts(self._scores(x).sigmoid_(), bias, **options)
        return ops.router(x, router.weight, bias, impl="portable", **options)

    def _route(self, sum_: Tensor, x: Tensor, weights: Tensor, indices: Tensor) -> None:
        """Add the experts' outputs `[B, X]`, each with its weight."""
        if self._streams:
            self._route_one(sum_, x, weights, indices)
        elif self._all:
            self._route_all(sum_, x, weights, indices)
        elif self._few:
            self._route_few(sum_, x, weights, indices)
        else:
            sum_.add_(self._experts(x, indices, weights))

    def _route_one(self, sum_: Tensor, x: Tensor, weights: Tensor, indices: Tensor) -> None:
        """One token: a sum of rows for each expert, then one over the rows of all of them."""
        chosen = indices[0]
        up = torch.index_select(self._of_up, 0, chosen, out=self._chosen_up).view(-1)
        down = torch.index_select(self._of_down, 0, chosen, out=self._chosen_down).view(-1)
        self._x.copy_(x[:, None])
        h = self._up_rows.sums(up, self._runs, self._x.view(-1))  # [K, F]
        h.relu_().square_().mul_(weights.view(-1, 1))
        sum_.add_(self._down_rows.sums(down, self._starts, h.view(-1)).sum(0, True))

    def _route_all(self, sum_: Tensor, x: Tensor, weights: Tensor, indices: Tensor) -> None:
        """Every expert, with weight 0 where it was not chosen."""
        by_expert = self._by_expert.zero_().scatter_(1, indices, weights)
        h = self._up_all(x).relu_().square_()
        h.view(*by_expert.shape, -1).mul_(by_expert[..., None])
        sum_.add_(self._down_all(h))

    def _route_few(self, sum_: Tensor, x: Tensor, weights: Tensor, indices: Tensor) -> None:
        """Choices by expert, so that each expert's weights are read once."""
        chosen, order = indices.view(-1).sort(stable=True)  # [R]
        tokens = order // indices.shape[1]
        runs = [(expert, len(list(run))) for expert, run in groupby(chosen.tolist())]
        sizes = [size for _, size in runs]
        x_parts = x.index_select(0, tokens).split(sizes)
        h_parts, y_parts = self._h.split(sizes), self._y.split(sizes)
        for (expert, _), part, h in zip(runs, x_parts, h_parts, strict=True):
            torch.mm(part, self._up[expert].t(), out=h)
        self._h.relu_().square_().mul_(weights.view(-1, 1).index_select(0, order))
        for (expert, _), h, y in zip(runs, h_parts, y_parts, strict=True):
            torch.mm(h, self._down[expert].t(), out=y)
        sum_.index_add_(0, tokens, self._y)


# By block type.
BLOCKS: dict[str, Callable[[Step, Any, int], Callable[[Tensor, Tensor], None]]] = {
    "mamba": _MambaBlock,
    "attention": _AttentionBlock,
    "mlp": _MLPBlock,
    "moe": _MoEBlock,
}
