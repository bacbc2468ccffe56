"""NeMo AutoModel's feed-forward layers, as Nemotron's blocks hold them, by this package's ops.

Letters: T packed tokens, D hidden size, E experts, K experts a token, X width the experts see, F
expert width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemotron_v3 import ops
from nemotron_v3.layers.linear import project
from nemotron_v3.nemo.classes import Accelerated, takes_place_of


@takes_place_of("layers.MLP", shared=True)
class MLP(Accelerated):
    is_gated: bool
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        if self.is_gated:
            return super().forward(x)
        return project(self.down_proj, ops.relu2(project(self.up_proj, x), impl=self.impl))


@takes_place_of("layers.Gate", shared=True)
class Gate(Accelerated):
    """A sigmoid router; what it is asked to watch besides goes on.

    Attributes with a value here are not there in every supported version.
    """

    weight: Tensor
    topk: int
    n_groups: int
    topk_groups: int
    n_experts: int
    norm_topk_prob: bool
    route_scale: float
    score_func: str
    aux_loss_coeff: float
    bias_update_factor: float
    e_score_correction_bias: Tensor | None
    router_weight_uses_score_correction_bias: bool = False
    router_replay: Any = None
    use_routing_core: bool = False

    def forward(
        self, x: Tensor, token_mask: Tensor, cp_mesh: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`[T, D]` -> weights `[T, K]` in fp32 or wider, expert numbers `[T, K]`, and the loss of
        their balance or None."""
        if not self._is_sigmoid_alone():
            return super().forward(x, token_mask, cp_mesh)
        bias = self.e_score_correction_bias
        if isinstance(bias, DTensor):  # replicated by a parallelizer
            bias = bias.to_local()
        weights, indices = ops.router(
            x,
            self.weight,
            x.new_zeros(self.n_experts, dtype=torch.float32) if bias is None else bias,
            top_k=self.topk,
            n_group=self.n_groups,
            topk_group=self.topk_groups,
            norm_topk_prob=self.norm_topk_prob,
            scaling_factor=self.route_scale,
            impl=self.impl,
        )
        self._watch(indices, token_mask)
        return weights, indices, None

    def _is_sigmoid_alone(self) -> bool:
        """Whether the router is the one that Nemotron has: scores by a sigmoid, and a bias that
        moves the choice alone."""
        others = (
            self.bias is not None,
            self.router_weight_uses_score_correction_bias,
            self.router_replay is not None,
            self.use_routing_core,
            self.aux_loss_coeff > 0,
            isinstance(self.weight, DTensor),
            self.n_groups > 1 and self.e_score_correction_bias is None,
        )
        return self.score_func == "sigmoid" and not any(others)

    @torch.no_grad()
    def _watch(self, indices: Tensor, token_mask: Tensor) -> None:
        """Count for their load metrics, and for the step that moves the bias."""
        balances = self.bias_update_factor > 0 and self.training
        if not (balances or self._track_load_balance):
            return
        load = self._compute_expert_load(indices, token_mask)
        if self._track_load_balance:
            self._last_expert_load = load
        if balances:
            before = self._cumulative_expert_load
            self._cumulative_expert_load = load if before is None else before + load


@takes_place_of("experts.GroupedExperts", shared=True)
class GroupedExperts(Accelerated):
    expert_bias: bool
    is_gated: bool
    use_mxfp8: bool
    gate_and_up_projs: Tensor
    down_projs: Tensor

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """`[T, X]`, real tokens `[T]`, weights and expert numbers `[T, K]` -> `[T, X]`; 0 at
        padding."""
        if self.gives_to_others() or self.is_gated or self.expert_bias or self.use_mxfp8:
            return super().forward(x, token_mask, weights, indices)
        y = ops.experts(
            x,
            indices,
            weights,
            self.gate_and_up_projs.to(x.dtype).transpose(1, 2),  # [E, F, X]
            self.down_projs.to(x.dtype).transpose(1, 2),  # [E, X, F]
            impl=self.impl,
        )
        return y.masked_fill(~token_mask[:, None], 0.0)

    def gives_to_others(self) -> bool:
        """Whether other processes hold some of the experts."""
        return isinstance(self.gate_and_up_projs, DTensor)
