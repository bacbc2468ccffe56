"""Shapes that the tests and benchmarks of decode_experts share.

Letters: R rows, D hidden size, E experts, K choices a row, F expert width, X width the experts see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.ops.common.cases import Draw, Inputs
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.weights import Router


@dataclass(frozen=True)
class Case:
    """Rows whose numbers are in `idle` are not active. Of a `shared` of 0 there is none, of a
    `latent` of 0 the experts see D."""

    name: str
    rows: int
    hidden: int
    experts: int
    top_k: int
    wide: int
    shared: int = 0
    latent: int = 0
    routed: bool = True
    idle: tuple[int, ...] = ()
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    weights_use_bias: bool = False
    residual: bool = True
    wide_stream: bool = False  # stream, residual and result in fp32
    ranks: tuple[int, int] = (0, 0)  # of the updates of routed experts and of the shared one

    @property
    def seen(self) -> int:
        return self.latent or self.hidden

    def buffers(self, like: Tensor) -> Buffers:
        """Of the dtype and on the device of `like`."""
        sizes = (self.rows, self.hidden, self.experts, self.top_k, self.wide, self.seen)
        return Buffers.of(like, *sizes, self.shared)

    def router(self, gain: Tensor, gate: Tensor, bias: Tensor) -> Router:
        return Router(
            gain=gain,
            eps=1e-5,
            gate=gate,
            bias=bias,
            top_k=self.top_k,
            n_group=self.n_group,
            topk_group=self.topk_group,
            norm_topk_prob=self.norm_topk_prob,
            scaling_factor=2.5,
            weights_use_bias=self.weights_use_bias,
        )


CASES = (
    Case("one-row", 1, 64, 8, 2, 48, shared=80),
    Case("one-row-odd", 1, 72, 6, 3, 37, shared=50, wide_stream=True),
    Case("one-row-latent", 1, 64, 8, 2, 24, latent=40, residual=False),
    Case("one-row-shared", 1, 64, 4, 1, 24, shared=48, routed=False),
    Case("one-choice", 2, 64, 4, 1, 40, shared=33),
    Case("idle-rows", 17, 48, 6, 3, 70, shared=40, idle=(0, 5, 16)),
    Case("groups", 5, 64, 16, 3, 32, shared=64, n_group=4, topk_group=2, wide_stream=True),
    Case("biased-weights", 3, 40, 8, 2, 33, weights_use_bias=True, norm_topk_prob=False),
    Case("latent", 17, 64, 8, 2, 24, latent=40, residual=False, idle=(3,)),
    Case("shared-alone", 17, 64, 4, 1, 24, shared=48, routed=False, idle=(3,)),
    Case("forty-rows", 40, 64, 4, 4, 32, shared=36, idle=(39,)),
    Case("many-rows", 70, 32, 4, 2, 16, shared=20),
    Case("none-active", 3, 32, 4, 2, 16, shared=16, idle=(0, 1, 2)),
    Case("one-row-updated", 1, 64, 8, 2, 37, shared=50, ranks=(4, 7)),
    Case("one-row-updated-alone", 1, 64, 8, 2, 24, latent=40, residual=False, ranks=(16, 0)),
    Case("updated", 17, 48, 6, 3, 37, shared=40, idle=(0, 5), ranks=(16, 3)),
    Case("shared-updated", 3, 40, 4, 2, 24, shared=33, wide_stream=True, ranks=(0, 8)),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    """For `route`: stream, gain, gate and bias. For `experts`: what it finds in the buffers, the
    choices of each row, and the weights; None where a half has none."""
    draw = Draw(generator, dtype, device)
    R, D, E, K, F, X = case.rows, case.hidden, case.experts, case.top_k, case.wide, case.seen
    stream = draw.normal(R, D)
    tensors = {
        "stream": stream.to(draw.wide) if case.wide_stream else stream,
        "gain": 1 + draw.normal(D, scale=0.2),
        "gate": draw.normal(E, D, scale=D**-0.5),
        "bias": draw.normal(E, scale=0.1, wide=True),
        "normed": draw.normal(R, D),
        "weights": draw.uniform(R, K, low=0.1, high=1.0, wide=True),
        "latent": draw.normal(R, X) if case.latent else None,
        "up": draw.normal(E, F, X, scale=X**-0.5) if case.routed else None,
        "down": draw.normal(E, X, F, scale=F**-0.5) if case.routed else None,
        "shared_up": draw.normal(case.shared, D, scale=D**-0.5) if case.shared else None,
        "shared_down": draw.normal(D, case.shared, scale=D**-0.5) if case.shared else None,
    }
    sizes = {"up": (E, F, X), "down": (E, X, F)}
    sizes |= {"shared_up": (case.shared, D), "shared_down": (D, case.shared)}
    for name, (*stack, m, n) in sizes.items():
        rank = case.ranks[name.startswith("shared")]
        tensors[f"{name}_a"] = draw.normal(*stack, rank, n, scale=n**-0.5) if rank else None
        tensors[f"{name}_b"] = draw.normal(*stack, m, rank, scale=rank**-0.5) if rank else None
    order = torch.rand(R, E, generator=generator).argsort(1)
    active = torch.tensor([row not in case.idle for row in range(R)])
    chosen = order[:, :K].masked_fill(~active[:, None], -1)
    options = {"case": case, "active": active.to(device), "chosen": chosen.to(device)}
    return Inputs(tensors, options)
