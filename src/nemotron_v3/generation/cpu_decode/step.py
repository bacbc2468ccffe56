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

import torch
from torch import Tensor, nn

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation.cpu_decode.blocks import BLOCKS
from nemotron_v3.generation.cpu_decode.parts import Form, Linear, Norm
from nemotron_v3.generation.plain import why_called
from nemotron_v3.layers.decode_weights import Projection
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.protocol import CausalLM

# Elements of a weight whose product with one token, by BLAS, is less work than waking threads.
ONE_THREAD = 1 << 20


class DecodeStep:
    """One token a row for a cache, which moves on: call it with tokens `[B]` for logits `[B, V]`.

    The next call writes over the logits.

    Args:
        model: one that `fits` says yes to.
        cache: which nothing but this may touch as long as it is used.
    """

    def __init__(self, model: CausalLM, cache: NemotronHybridCache):
        self.cache = cache
        self.layout: SequenceLayout = SequenceLayout.plain(cache.batch_size, 1, cache.device).packed
        self._embeddings = model.model.embeddings.weight.detach()
        form = Form(model, self._embeddings, cache.batch_size)
        self.form: Form = form
        self._blocks = [
            BLOCKS[block.block_type](self, block, layer)
            for layer, block in enumerate(model.model.layers)
        ]
        self._norm = Norm(form, model.model.norm_f.decode_weights(), folded=True)
        self._head = Linear.of(form, Projection.of(model.lm_head), norm=self._norm)
        # The residual stream, as norms want it.
        self._stream = self._norm.argument(form)
        self._hidden = self._stream[..., :-1]
        small = all(math.prod(p.shape[-2:]) <= ONE_THREAD for p in model.parameters())
        self._one_thread = cache.batch_size == 1 and small and not form.streams

    @staticmethod
    def fits(model: CausalLM, cache: NemotronHybridCache) -> bool:
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
            and all(block.block_type in BLOCKS for block in model.model.layers)
            and not any(map(why_called, model.modules()))
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
        with self.cache.step(self.layout) as self.transaction:
            torch.index_select(self._embeddings, 0, tokens, out=hidden)
            for block in self._blocks:
                block(stream, hidden)
            self.cache.finish(self.layout)
            return self._head(self._norm(stream, hidden))
