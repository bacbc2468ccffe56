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
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.model import NemotronV3ForCausalLM, TiedHead
from nemotron_v3.ops._products import PackedWeight, onednn_works
from nemotron_v3.ops.cached_attention.portable import cached_attention
from nemotron_v3.ops.router.portable import router

PLAIN_LAYERS = ("nemotron_v3.layers.", "nemotron_v3.model.")
PLAIN_TORCH = (nn.Linear, nn.Conv1d, nn.Embedding, nn.ModuleList)
# With more choices an expert on average the op for many tokens is as fast.
FEW_CHOICES = 4
# Rows of a batch, and elements of a model, whose weights are laid out a second time.
FEW_TOKENS, LAID_OUT = 16, 1 << 26
# Elements of a weight whose product with one token is less work than waking other threads.
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
        small = sum(p.numel() for p in model.parameters()) <= LAID_OUT
        lays_out = small and self._embeddings.dtype == torch.float32
        self.packs = lays_out and 1 < cache.batch_size <= FEW_TOKENS and onednn_works()
        self.streams = lays_out and cache.batch_size == 1
        self._blocks = [
            _BLOCKS[block.block_type](self, block, layer)
            for layer, block in enumerate(model.model.layers)
        ]
        self._norm = _Norm(self, model.model.norm_f)
        head_bias = None if isinstance(model.lm_head, TiedHead) else model.lm_head.bias
        self._head = _Linear(self, model.lm_head.weight, head_bias)
        small = all(math.prod(p.shape[-2:]) <= ONE_THREAD for p in model.parameters())
        self._one_thread = cache.batch_size == 1 and small

    @staticmethod
    def fits(model: NemotronV3ForCausalLM, cache: NemotronHybridCache) -> bool:
        """Whether a step computes what the model's `forward` would."""
        backend, kind = model.model.backend, model.model.embeddings.weight
        tensors = [*model.parameters(), *model.buffers(), *cache.ssm_states.values()]
        return (
            kind.device.type == "cpu"
            and kind.dtype in (torch.float32, torch.float64)
            and all(t.dtype == kind.dtype and t.device == kind.device for t in tensors)
            and all(type(p) is nn.Parameter for p in model.parameters())
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
        hidden = self._embeddings.index_select(0, tokens)  # [B, D], the residual stream
        for block in self._blocks:
            block(hidden)
        self.cache.finish(self.layout)
        return self._head(self._norm(hidden))

    def empty(self, *shape: int) -> Tensor:
        """An array `[B, *shape]` of the model's dtype."""
        return self._embeddings.new_empty(self.cache.batch_size, *shape)


def _is_plain(module: nn.Module) -> bool:
    known = type(module) in PLAIN_TORCH or type(module).__module__.startswith(PLAIN_LAYERS)
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    adapted = getattr(module, "low_rank", None) is not None
    return known and not hooked and not adapted


class _Norm:
    """RMS normalisation of `[B, groups, D / groups]`, one array for all results."""

    def __init__(self, step: DecodeStep, norm: nn.Module, groups: int = 1):
        width = len(norm.weight)
        self._result = step.empty(width)
        shape = (groups,) if groups > 1 else ()
        self._by_group = self._result.view(-1, *shape, width // groups)
        self._root = step.empty(*shape, 1)
        # weight x / sqrt(mean + eps) = (sqrt(n) weight) x / hypot(norm, sqrt(n eps)), n elements.
        n = width // groups
        self._weight = norm.weight.detach() * n**0.5
        self._shift = torch.empty_like(self._root).fill_((n * norm.variance_epsilon) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, D]` -> `[B, D]`."""
        groups, root = self._by_group, self._root
        if groups.dim() > 2:
            x = x.view(groups.shape)
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=root)
        torch.div(x, root.hypot_(self._shift), out=groups)
        return self._result.mul_(self._weight)


class _Linear:
    """A projection `[B, n] -> [B, m]`, into its own array or added to another.

    A step reads every weight once, from memory that is far away, and BLAS reads short rows at a
    third of what the memory gives. So one token takes a weighted sum of rows (`_Rows`), and a few
    tokens take a weight that oneDNN has packed for them, or `W x^T`; large models, many tokens and
    fp64 are BLAS's own.
    """

    def __init__(self, step: DecodeStep, weight: Tensor, bias: Tensor | None = None):
        weight = weight.detach()
        self._weight, self._bias = weight, None if bias is None else bias.detach()
        B, m = step.cache.batch_size, len(weight)
        self.result = step.empty(m)
        self._rows = self._columns = self._packed = None
        if step.streams:
            self._rows = _Rows(weight.t())
        elif step.packs:
            self._packed = PackedWeight(weight, B)
        elif 1 < B <= FEW_TOKENS:
            self._columns = weight.new_empty(m, B)

    @classmethod
    def of(cls, step: DecodeStep, *linears: nn.Module) -> Self:
        """Of layers side by side."""
        if len(linears) == 1:
            return cls(step, linears[0].weight, linears[0].bias)
        biased = linears[0].bias is not None
        return cls(
            step,
            torch.cat([linear.weight.detach() for linear in linears]),
            torch.cat([linear.bias.detach() for linear in linears]) if biased else None,
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self._rows is not None:
            self.result.copy_(self._rows(x))
        elif self._packed is not None:
            self.result.copy_(self._packed(x))
        elif self._columns is not None:
            torch.mm(self._weight, x.t(), out=self._columns)
            self.result.copy_(self._columns.t())
        else:
            torch.mm(x, self._weight.t(), out=self.result)
        return self.result if self._bias is None else self.result.add_(self._bias)

    def add_to(self, sum_: Tensor, x: Tensor) -> None:
        if self._rows is not None and self._bias is None:
            sum_.add_(self._rows(x))
        else:
            sum_.add_(self(x))


class _Rows:
    """A matrix `[n, m]` whose rows are summed with weights: `x W^T` for one x, with `W^T` here.

    What an embedding bag does for its rows; PyTorch's kernel for it streams through them at the
    rate of the memory, where products of a matrix and a vector reach half of it and less.
    """

    def __init__(self, rows: Tensor):
        self._rows = rows.contiguous()
        self._all = torch.arange(len(rows))
        self._start = torch.zeros(1, dtype=torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        """`[1, n]` -> `[1, m]`."""
        return self.sums(self._all, self._start, x[0])

    def sums(self, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
        """The sums of several runs in a list of row numbers, `[runs, m]`, each row weighted."""
        return torch.embedding_bag(self._rows, rows, starts, False, 0, False, weights)[0]


class _MLP:
    def __init__(self, step: DecodeStep, mlp: nn.Module):
        self._up, self._down = _Linear.of(step, mlp.up_proj), _Linear.of(step, mlp.down_proj)

    def add_to(self, sum_: Tensor, x: Tensor) -> None:
        self._down.add_to(sum_, self._up(x).relu_().square_())


class _MLPBlock:
    def __init__(self, step: DecodeStep, block: nn.Module, layer: int):
        self._norm, self._mlp = _Norm(step, block.norm), _MLP(step, block.mixer)

    def __call__(self, hidden: Tensor) -> None:
        self._mlp.add_to(hidden, self._norm(hidden))


class _AttentionBlock:
    def __init__(self, step: DecodeStep, block: nn.Module, layer: int):
        mixer = block.mixer
        self._step, self._layer = step, layer
        self._norm = _Norm(step, block.norm)
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        self._qkv, self._o = _Linear.of(step, *projections), _Linear.of(step, mixer.o_proj)
        parts = self._qkv.result.split([p.out_features for p in projections], dim=1)
        self._heads = [part.unflatten(1, (-1, mixer.head_dim)) for part in parts]

    def __call__(self, hidden: Tensor) -> None:
        self._qkv(self._norm(hidden))
        q, k, v = self._heads
        state, step = self._step.cache.begin(self._layer, self._step.layout)
        keys, values = state.append(k, v, step)
        y = cached_attention(
            q,
            keys,
            values,
            layout=step.layout,
            starts=step.starts,
            positions=step.positions,
        )
        self._o.add_to(hidden, y.flatten(1))


class _MambaBlock:
    def __init__(self, step: DecodeStep, block: nn.Module, layer: int):
        mixer, state = block.mixer, step.cache.states[layer]
        B, H, P = step.cache.batch_size, mixer.num_heads, mixer.head_dim
        G, N = mixer.n_groups, mixer.ssm_state_size
        self._step, self._layer = step, layer
        self._norm, self._gated = _Norm(step, block.norm), _Norm(step, mixer.norm, G)
        self._in, self._out = _Linear.of(step, mixer.in_proj), _Linear.of(step, mixer.out_proj)
        self._z, xBC, self._dt = self._in.result.split([H * P, H * P + 2 * G * N, H], dim=1)

        # The state [B, C, W] as [B, W, C] in memory: then its inputs move on in whole rows.
        if not state.conv.transpose(1, 2).is_contiguous():
            state.conv = state.conv.transpose(1, 2).contiguous().transpose(1, 2)
        self._conv = state.conv.transpose(1, 2)
        self._window = torch.empty_like(self._conv)
        self._inputs = (self._conv[:, 1:], xBC[:, None])
        self._taps = mixer.conv1d.weight.detach()[:, 0].t().contiguous()
        W, bias = len(self._taps), mixer.conv1d.bias
        self._terms = step.empty(W + (bias is not None), xBC.shape[1])
        self._products = self._terms[:, :W]
        if bias is not None:
            self._terms[:, W] = bias.detach()
        self._xBC = step.empty(xBC.shape[1])
        x, inputs, outputs = self._xBC.split([H * P, G * N, G * N], dim=1)
        self._x = x.unflatten(1, (H, P))
        self._B_row = inputs.unflatten(1, (G, 1, N))  # [B, G, 1, N]
        self._C_in_place = outputs.unflatten(1, (G, N))
        self._C_copy = step.empty(G, N)
        self._C_row = self._C_copy.view(B * G, 1, N)

        self._dt_bias, self._dt_limit = mixer.dt_bias.detach(), mixer.time_step_limit
        self._A, self._D = -mixer.A_log.detach().exp(), mixer.D.detach()[:, None]
        self._step_size, self._decay = step.empty(H), step.empty(H)
        self._dtx = step.empty(H, P)
        self._dtx_column = self._dtx.view(B, G, -1, 1)  # [B, G, H/G*P, 1]
        self._state, self._decay_4d = state.ssm, self._decay[..., None, None]
        self._by_group = state.ssm.view(B, G, -1, N)  # [B, G, H/G*P, N]
        self._transposed = state.ssm.view(B * G, -1, N).transpose(1, 2)
        self._y = step.empty(H * P)
        self._y_row, self._y_heads = self._y.view(B * G, 1, -1), self._y.view(B, H, P)

    def __call__(self, hidden: Tensor) -> None:
        self._step.cache.begin(self._layer, self._step.layout)
        self._in(self._norm(hidden))
        self._convolve()
        self._recur()
        y = F.silu(self._z).mul_(self._y)
        self._out.add_to(hidden, self._gated(y))

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
        self._C_copy.copy_(self._C_in_place)
        torch.bmm(self._C_row, self._transposed, out=self._y_row)
        self._y_heads.addcmul_(self._D, self._x)


class _MoEBlock:
    def __init__(self, step: DecodeStep, block: nn.Module, layer: int):
        mixer = block.mixer
        self._norm, self._gate = _Norm(step, block.norm), mixer.gate
        self._shared = _MLP(step, mixer.shared_experts)
        self._into = self._back = None
        if mixer.fc1_latent_proj is not None:
            self._into = _Linear.of(step, mixer.fc1_latent_proj)
            self._back = _Linear.of(step, mixer.fc2_latent_proj)
            self._latent_sum = torch.empty_like(self._into.result)
        self._experts = mixer.experts
        up, down = (p.detach() for p in (mixer.experts.up_proj, mixer.experts.down_proj))
        E, F_, X = up.shape
        B, K = step.cache.batch_size, mixer.gate.top_k
        self._streams = step.streams
        # Where the choices reach most experts anyway, all of them are two products.
        self._all = step.packs and B * K >= E
        self._few = B * K <= FEW_CHOICES * E and not (self._all or self._streams)
        if self._few:
            self._up, self._down = up.unbind(0), down.unbind(0)  # [F, X], [X, F] each
            self._h, self._y = step.empty(K, F_).view(B * K, F_), step.empty(K, X).view(B * K, X)
        if self._all:
            self._up_all = PackedWeight(up.view(E * F_, X), B)
            self._down_all = PackedWeight(down.transpose(0, 1).reshape(X, E * F_), B)
            self._by_expert = step.empty(E)
        if self._streams:
            self._up_rows = _Rows(up.transpose(1, 2).flatten(0, 1))  # [E*X, F]
            self._down_rows = _Rows(down.transpose(1, 2).flatten(0, 1))  # [E*F, X]
            # The numbers of these rows by expert, `[E, X]` and `[E, F]`; a run for each choice.
            self._of_up = torch.arange(E * X).view(E, X)
            self._of_down = torch.arange(E * F_).view(E, F_)
            self._runs, self._start = torch.arange(K) * X, torch.zeros(1, dtype=torch.int64)
            self._x = step.empty(K, X)

    def __call__(self, hidden: Tensor) -> None:
        x = self._norm(hidden)
        weights, indices = self._choose(x)  # [B, K]
        if self._into is None:
            self._route(hidden, x, weights, indices)
        else:
            routed = self._latent_sum.zero_()
            self._route(routed, self._into(x), weights, indices)
            self._back.add_to(hidden, routed)
        self._shared.add_to(hidden, x)

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts `[B, K]`, by the router itself only where someone watches it."""
        gate = self._gate
        if gate.observed:
            return gate(x)
        return router(
            x,
            gate.weight,
            gate.e_score_correction_bias,
            top_k=gate.top_k,
            n_group=gate.n_group,
            topk_group=gate.topk_group,
            norm_topk_prob=gate.norm_topk_prob,
            scaling_factor=gate.scaling_factor,
        )

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
        up = self._of_up.index_select(0, chosen).view(-1)
        down = self._of_down.index_select(0, chosen).view(-1)
        self._x.copy_(x[:, None])
        h = self._up_rows.sums(up, self._runs, self._x.view(-1))  # [K, F]
        h.relu_().square_().mul_(weights.view(-1, 1))
        sum_.add_(self._down_rows.sums(down, self._start, h.view(-1)))

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
