"""The calls of one step of the whole model, on the buffers of a batch.

A step is a list of calls that are bound to their tensors: in a CUDA graph they run as they were
captured, and without one they run in the same order. Norms, gates and residual sums belong to the
projections beside them.

Letters: R rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.generation.choice import Asked
from nemotron_v3.generation.graphs.drawing import Drawing
from nemotron_v3.generation.graphs.slots import Slots
from nemotron_v3.generation.graphs.updates import update_of, updates_of
from nemotron_v3.model.head import TiedHead
from nemotron_v3.model.protocol import CausalLM
from nemotron_v3.ops.decode_attention.op import decode_attention
from nemotron_v3.ops.decode_attention.split import workspace_size
from nemotron_v3.ops.decode_experts import Buffers, Router, Updates, decode_experts, decode_route
from nemotron_v3.ops.decode_mamba2.op import decode_mamba2
from nemotron_v3.ops.skinny_linear import LowRank, Norm, skinny_linear

Call = Callable[[], object]


class Plan:
    """One token a row: tokens in `slots`, logits `[R, V]` out.

    Attributes:
        drawing: what chooses the next tokens, where the step is to do it.
    """

    def __init__(self, model: CausalLM, slots: Slots, asked: Asked | None = None):
        self.slots = slots
        weight = model.model.embeddings.weight.detach()
        self._embeddings = weight
        kind = torch.promote_types(weight.dtype, torch.float32)
        stream_dtype = kind if model.config.residual_in_fp32 else weight.dtype
        self.stream: Tensor = weight.new_zeros(slots.rows, weight.shape[1], dtype=stream_dtype)
        self.logits: Tensor = weight.new_zeros(slots.rows, len(weight))
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self._experts: dict[tuple[int, ...], Buffers] = {}
        self.calls: list[Call] = []
        for layer, block in enumerate(model.model.layers):
            add = getattr(self, f"_add_{block.block_type}")
            add(block.mixer, Norm(block.norm.weight.detach(), block.norm.variance_epsilon), layer)
        final, head = model.model.norm_f, model.lm_head
        bias = None if isinstance(head, TiedHead) else head.bias
        norm = Norm(final.weight.detach(), final.variance_epsilon)
        self.calls.append(
            partial(
                skinny_linear,
                self.stream,
                head.weight.detach(),
                biases=(None if bias is None else bias.detach(),),
                norm=norm,
                low_rank=_updates(head),
                out=self.logits,
            )
        )
        self.drawing = None if asked is None else Drawing(asked, self.logits, slots)

    @property
    def every_call(self) -> list[Call]:
        """Those of the layers, and the choice behind them."""
        return [*self.calls, *([] if self.drawing is None else [self.drawing])]

    @staticmethod
    def knows(block_type: str) -> bool:
        """Whether a step can hold blocks of this type."""
        return hasattr(Plan, f"_add_{block_type}")

    @torch.no_grad()
    def __call__(self) -> None:
        """Feed `slots.tokens` to the active rows that they do not end, and choose the next."""
        slots = self.slots
        ended = (slots.tokens[:, None] == slots.ends).any(1)
        slots.active.masked_fill_(ended, 0)
        slots.remember()
        self.stream.copy_(self._embeddings.index_select(0, slots.tokens))
        for call in self.calls:
            call()
        slots.positions.add_(slots.active)
        if self.drawing is not None:
            self.drawing()

    def _array(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An array `[R, *shape]` that all layers share."""
        key = (name, *shape, dtype)
        if key not in self._buffers:
            array = self.logits.new_zeros(self.slots.rows, *shape, dtype=dtype)
            self._buffers[key] = array
        return self._buffers[key]

    def _project(
        self,
        x: Tensor,
        *linears: Any,
        norm: Norm | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Add a projection to the calls: to `out`, or on top of the stream."""
        biases = [linear.bias for linear in linears]
        self.calls.append(
            partial(
                skinny_linear,
                x,
                *(linear.weight.detach() for linear in linears),
                biases=tuple(None if bias is None else bias.detach() for bias in biases),
                norm=norm,
                low_rank=_updates(*linears),
                residual=self.stream if out is None else None,
                out=self.stream if out is None else out,
            )
        )
        return self.stream if out is None else out

    def _add_mamba(self, mixer: Any, norm: Norm, layer: int) -> None:
        state, slots = self.slots.mamba[layer], self.slots
        projected = self._array("projected", mixer.in_proj.out_features)
        gated = self._array("gated", mixer.intermediate_size, dtype=torch.float32)
        self._project(self.stream, mixer.in_proj, norm=norm, out=projected)
        bias = mixer.conv1d.bias
        self.calls.append(
            partial(
                decode_mamba2,
                projected,
                state.conv,
                state.ssm,
                slots.positions,
                slots.active,
                conv_weight=mixer.conv1d.weight.detach()[:, 0],
                conv_bias=None if bias is None else bias.detach(),
                dt_bias=mixer.dt_bias.detach(),
                A_log=mixer.A_log.detach(),
                D=mixer.D.detach(),
                n_groups=mixer.n_groups,
                dt_limit=mixer.time_step_limit,
                out=gated,
            )
        )
        group = mixer.intermediate_size // mixer.n_groups
        gated_norm = Norm(mixer.norm.weight.detach(), mixer.norm.variance_epsilon, group)
        self._project(gated, mixer.out_proj, norm=gated_norm)

    def _add_attention(self, mixer: Any, norm: Norm, layer: int) -> None:
        state, slots = self.slots.attention[layer], self.slots
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        qkv = self._array("qkv", sum(p.out_features for p in projections))
        attended = self._array("attended", mixer.o_proj.in_features)
        self._project(self.stream, *projections, norm=norm, out=qkv)
        self.calls.append(
            partial(
                decode_attention,
                qkv,
                state.keys,
                state.values,
                slots.positions,
                slots.active,
                num_heads=mixer.num_attention_heads,
                num_kv_heads=mixer.num_key_value_heads,
                workspace=self._workspace(mixer, state.keys),
                out=attended,
            )
        )
        self._project(attended, mixer.o_proj)

    def _workspace(self, mixer: Any, keys: Tensor) -> Tensor:
        sizes = (self.slots.rows, mixer.num_attention_heads, mixer.head_dim, keys.shape[2])
        needed = workspace_size(*sizes)
        if ("parts", needed) not in self._buffers:
            self._buffers["parts", needed] = keys.new_empty(needed, dtype=torch.float32)
        return self._buffers["parts", needed]

    def _add_mlp(self, mixer: Any, norm: Norm, layer: int) -> None:
        wide = self._array("wide", mixer.up_proj.out_features)
        self._project(self.stream, mixer.up_proj, norm=norm, out=wide)
        self.calls.append(lambda: wide.copy_(ops.relu2(wide)))
        self._project(wide, mixer.down_proj)

    def _add_moe(self, moe: Any, norm: Norm, layer: int) -> None:
        slots, gate = self.slots, moe.gate
        up, down = moe.experts.up_proj.detach(), moe.experts.down_proj.detach()
        shared = moe.shared_experts
        if shared is not None:
            shared = (shared.up_proj.weight.detach(), shared.down_proj.weight.detach())
        E, F, X = up.shape
        D, K = self.stream.shape[1], gate.top_k
        sizes = (slots.rows, D, E, K, F, X, 0 if shared is None else len(shared[0]))
        if sizes not in self._experts:
            self._experts[sizes] = Buffers.of(up, *sizes)
        buffers = self._experts[sizes]
        router = Router(
            gain=norm.weight,
            eps=norm.eps,
            gate=gate.weight.detach(),
            bias=gate.e_score_correction_bias,
            top_k=K,
            n_group=gate.n_group,
            topk_group=gate.topk_group,
            norm_topk_prob=gate.norm_topk_prob,
            scaling_factor=gate.scaling_factor,
            weights_use_bias=gate.weights_use_bias,
        )
        self.calls.append(partial(decode_route, self.stream, router, slots.active, buffers))
        updates = updates_of(moe)
        if moe.fc1_latent_proj is None:
            self.calls.append(
                partial(
                    decode_experts,
                    buffers.normed,
                    (up, down),
                    shared,
                    slots.active,
                    buffers,
                    updates=updates,
                    residual=self.stream,
                    out=self.stream,
                )
            )
            return
        latent, routed = self._array("latent", X), self._array("routed", X)
        self._project(buffers.normed, moe.fc1_latent_proj, out=latent)
        self.calls.append(
            partial(
                decode_experts,
                latent,
                (up, down),
                None,
                slots.active,
                buffers,
                updates=Updates(updates.up, updates.down),
                out=routed,
            )
        )
        self._project(routed, moe.fc2_latent_proj)
        if shared is not None:
            self.calls.append(
                partial(
                    decode_experts,
                    buffers.normed,
                    None,
                    shared,
                    slots.active,
                    buffers,
                    updates=updates._replace(up=None, down=None),
                    residual=self.stream,
                    out=self.stream,
                )
            )


def _updates(*linears: Any) -> tuple[LowRank | None, ...] | None:
    """Of projections side by side; None where none has one."""
    found = tuple(map(update_of, linears))
    return found if any(found) else None
