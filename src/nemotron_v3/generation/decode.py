"""A decode step on a CPU with as few calls as possible.

One token of a small model costs less arithmetic than the calls that ask for it: modules, checks,
views and fresh arrays take most of a step. So the weights, the views and the arrays are laid out
once for a cache, and a step is a list of in-place operations on them. It computes what the model's
`forward` computes, in the same precision and another order of sums, and takes over only where every
module is the plain one that it knows; hooks, adapters, other dtypes and other devices go through
`forward`.

Letters: B rows, one token each; D hidden size, V vocabulary; Mamba: H heads, P head width, G
groups, N state, W conv taps, C convolved channels; MoE: E experts, K choices a token, R = B*K
choices, X width the experts see, F expert width.
"""

import math
from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation.decode_parts import MLP, Form, Linear, Norm, WeightedRows, starts
from nemotron_v3.layers.hooks import is_observed
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.model import NemotronV3ForCausalLM, TiedHead
from nemotron_v3.ops._products import PackedWeight
from nemotron_v3.ops.cached_attention.portable import cached_attention
from nemotron_v3.ops.router.portable import choose, router

PLAIN_LAYERS = ("nemotron_v3.layers.", "nemotron_v3.model.")
PLAIN_TORCH = (nn.Linear, nn.Conv1d, nn.Embedding, nn.ModuleList)
# With more choices an expert on average the op for many tokens is as fast.
FEW_CHOICES = 4
# Elements of a weight whose product with one token, by BLAS, is less work than waking threads.
ONE_THREAD = 1 << 20


class DecodeStep:
    """One token a row for a cache, which moves on: call it with tokens `[B]` for logits `[B, V]`.

    The next call writes over the logits.

    Args:
        model: one that `fits` says yes to.
        cache: which nothing but this may touch as long as it is used.
    """

    def __init__(self, model: NemotronV3ForCausalLM, cache: NemotronHybridCache):
        self.cache = cache
        self.layout = SequenceLayout.plain(cache.batch_size, 1, cache.device).packed
        self._embeddings = model.model.embeddings.weight
        self.form = form = Form(model, self._embeddings, cache.batch_size)
        self._blocks = [
            _BLOCKS[block.block_type](self, block, layer)
            for layer, block in enumerate(model.model.layers)
        ]
        self._norm = Norm(form, model.model.norm_f, folded=True)
        head_bias = None if isinstance(model.lm_head, TiedHead) else model.lm_head.bias
        self._head = Linear(form, model.lm_head.weight, head_bias, self._norm)
        # The residual stream, as norms want it.
        self._stream = self._norm.argument(form)
        self._hidden = self._stream[..., :-1]
        small = all(math.prod(p.shape[-2:]) <= ONE_THREAD for p in model.parameters())
        self._one_thread = cache.batch_size == 1 and small and not form.streams

    @staticmethod
    def fits(model: NemotronV3ForCausalLM, cache: NemotronHybridCache) -> bool:
        """Whether a step computes what the model's `forward` would."""
        backend, kind = model.model.backend, model.model.embeddings.weight
        tensors = [*model.parameters(), *model.buffers(), *cache.ssm_states.values()]
        norms = [model.model.norm_f, *(block.norm for block in model.model.layers)]
        return (
            kind.device.type == "cpu"
            and kind.dtype in (torch.float32, torch.float64)
            and all(t.dtype == kind.dtype and t.device == kind.device for t in tensors)
            and all(type(p) is nn.Parameter for p in model.parameters())
            and len({norm.variance_epsilon for norm in norms}) == 1  # they share their argument
            and cache.rollback_window == 0
            and not torch.is_autocast_enabled("cpu")
            and backend.impl in ("auto", "portable")
            and (backend.attn, backend.linear) == ("sdpa", "torch")
            and all(map(_is_plain, model.modules()))
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        if not self._one_thread or threads == 1:
            return self._step(tokens)
        torch.set_num_threads(1)
        try:
            return self._step(tokens)
        finally:
            torch.set_num_threads(threads)

    @torch.no_grad()
    def _step(self, tokens: Tensor) -> Tensor:
        stream, hidden = self._stream, self._hidden
        with self.cache.step(self.layout) as self.step:
            torch.index_select(self._embeddings, 0, tokens, out=hidden)
            for block in self._blocks:
                block(stream, hidden)
            self.cache.finish(self.layout)
            return self._head(self._norm(stream, hidden))


def _is_plain(module: nn.Module) -> bool:
    known = type(module) in PLAIN_TORCH or type(module).__module__.startswith(PLAIN_LAYERS)
    adapted = getattr(module, "low_rank", None) is not None
    return known and not adapted and not is_observed(module)


class _MLPBlock:
    def __init__(self, step: DecodeStep, block: nn.Module, layer: int):
        form = step.form
        self._norm = Norm(form, block.norm, folded=True)
        self._mlp = MLP(form, block.mixer, self._norm)

    def __call__(self, stream: Tensor, hidden: Tensor) -> None:
        hidden.add_(self._mlp(self._norm(stream, hidden)))


class _AttentionBlock:
    def __init__(self, step: DecodeStep, block: nn.Module, layer: int):
        mixer, form = block.mixer, step.form
        self._step, self._layer = step, layer
        self._norm = Norm(form, block.norm, folded=True)
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        self._qkv = Linear.of(form, *projections, norm=self._norm)
        self._o = Linear.of(form, mixer.o_proj)
        parts = self._qkv.result.split([p.out_features for p in projections], dim=1)
        self._heads = [part.unflatten(1, (-1, mixer.head_dim)) for part in parts]

    def __call__(self, stream: Tensor, hidden: Tensor) -> None:
        self._qkv.write(self._norm(stream, hidden))
        q, k, v = self._heads
        state, step = self._step.step.begin(self._layer)
        keys, values = state.append(k, v, step)
        y = cached_attention(
            q,
            keys,
            values,
            layout=step.layout,
            starts=step.starts,
            positions=step.positions,
        )
        hidden.add_(self._o(y.flatten(1)))


class _MambaBlock:
    def __init__(self, step: DecodeStep, block: nn.Module, layer: int):
        mixer, state, form = block.mixer, step.cache.states[layer], step.form
        B, H, P = form.rows, mixer.num_heads, mixer.head_dim
        G, N = mixer.n_groups, mixer.ssm_state_size
        self._step, self._layer = step, layer
        self._norm = Norm(form, block.norm, folded=True)
        self._in = Linear.of(form, mixer.in_proj, norm=self._norm)
        z, xBC, self._dt = self._in.result.split([H * P, H * P + 2 * G * N, H], dim=1)
        self._gated = Norm(form, mixer.norm, G, folded=True)
        self._out = Linear.of(form, mixer.out_proj, norm=self._gated)
        self._product = self._gated.argument(form)  # [B, G, H/G*P + 1], of y and silu(z)
        self._yz = self._product[..., :-1]
        self._z = z.view(self._yz.shape)

        # The state [B, C, W] as [B, W, C] in memory: then its inputs move on in whole rows.
        if not state.conv.transpose(1, 2).is_contiguous():
            state.conv = state.conv.transpose(1, 2).contiguous().transpose(1, 2)
        self._conv = state.conv.transpose(1, 2)
        self._window = torch.empty_like(self._conv)
        self._inputs = (self._conv[:, 1:], xBC[:, None])
        self._taps = mixer.conv1d.weight.detach()[:, 0].t().contiguous()
        W, bias = len(self._taps), mixer.conv1d.bias
        self._terms = form.empty(W + (bias is not None), xBC.shape[1])
        self._products = self._terms[:, :W]
        if bias is not None:
            self._terms[:, W] = bias.detach()
        self._xBC = form.empty(xBC.shape[1])
        x, inputs, outputs = self._xBC.split([H * P, G * N, G * N], dim=1)
        self._x = x.unflatten(1, (H, P))
        self._B_row = inputs.unflatten(1, (G, 1, N))  # [B, G, 1, N]
        self._C_in_place = outputs.unflatten(1, (G, N))
        # A copy where rows do not follow each other.
        self._C = self._C_in_place if B == 1 else form.empty(G, N)
        self._C_row = self._C.view(B * G, 1, N)

        self._dt_bias, self._dt_limit = mixer.dt_bias.detach(), mixer.time_step_limit
        self._A, self._D = -mixer.A_log.detach().exp(), mixer.D.detach()[:, None]
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
        state, _ = self._step.step.begin(self._layer)
        state.touched = True
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
    def __init__(self, step: DecodeStep, block: nn.Module, layer: int):
        mixer, form = block.mixer, step.form
        self._norm, self._gate = Norm(form, block.norm), mixer.gate
        shared = mixer.shared_experts
        self._shared = None if shared is None else MLP(form, shared, self._norm)
        self._into = self._back = None
        if mixer.fc1_latent_proj is not None:
            self._into = Linear.of(form, mixer.fc1_latent_proj)
            self._back = Linear.of(form, mixer.fc2_latent_proj)
            self._latent_sum = torch.empty_like(self._into.result)
        self._experts = mixer.experts
        up, down = (p.detach() for p in (mixer.experts.up_proj, mixer.experts.down_proj))
        E, F_, X = up.shape
        B, K = form.rows, mixer.gate.top_k
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
            self._scores = WeightedRows(self._gate.weight.detach().t())

    def __call__(self, stream: Tensor, hidden: Tensor) -> None:
        x = self._norm(stream, hidden)
        weights, indices = self._choose(x)  # [B, K]
        if self._into is None:
            self._route(hidden, x, weights, indices)
        else:
            routed = self._latent_sum.zero_()
            self._route(routed, self._into(x), weights, indices)
            hidden.add_(self._back(routed))
        if self._shared is not None:
            hidden.add_(self._shared(x))

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts `[B, K]`, by the router itself where it does more than to route."""
        gate = self._gate
        if gate.observed or not gate.is_plain:
            return gate(x)
        options = {
            "top_k": gate.top_k,
            "n_group": gate.n_group,
            "topk_group": gate.topk_group,
            "norm_topk_prob": gate.norm_topk_prob,
            "scaling_factor": gate.scaling_factor,
        }
        bias = gate.e_score_correction_bias
        if self._streams:
            return choose(self._scores(x).sigmoid_(), bias, **options)
        return router(x, gate.weight, bias, **options)

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


_BLOCKS: dict[str, Callable[[DecodeStep, nn.Module, int], Callable[[Tensor], None]]] = {
    "mamba": _MambaBlock,
    "attention": _AttentionBlock,
    "mlp": _MLPBlock,
    "moe": _MoEBlock,
}
