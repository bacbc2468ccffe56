"""Shapes that the tests and benchmarks of grouped_low_rank share."""

from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    """`used` experts are chosen from, the others get no token. `elsewhere`: of so many tokens all
    choices, and of the others each second, are of an expert that is not here."""

    name: str
    tokens: int
    width: int
    expert_width: int
    experts: int
    top_k: int
    rank: int
    scale: float = 1.0
    used: int | None = None
    strided: bool = False
    elsewhere: int = 0


CASES = (
    Case("one-token", 1, 24, 16, 8, 2, 4),
    Case("rank-one", 17, 32, 40, 4, 1, 1, scale=0.5),
    Case("idle-experts", 65, 40, 24, 16, 3, 8, scale=2.0, used=5),
    Case("odd", 127, 33, 19, 7, 3, 5, strided=True),
    Case("elsewhere", 97, 32, 40, 6, 3, 4, scale=0.5, elsewhere=9),
    Case("no-tokens", 0, 16, 24, 8, 2, 4),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    T, X, F, E, r = case.tokens, case.width, case.expert_width, case.experts, case.rank
    order = torch.rand(T, case.used or E, generator=generator).argsort(dim=1)
    tensors = {
        "x": draw.activation(T, X),
        "weights": draw.uniform(T, case.top_k, low=0.05, high=1.0, wide=True),
        "up_proj": draw.normal(E, F, X, scale=X**-0.5),
        "down_proj": draw.normal(E, X, F, scale=F**-0.5),
        "up_a": draw.normal(E, r, X, scale=X**-0.5),
        "up_b": draw.normal(E, F, r, scale=r**-0.5),
        "down_a": draw.normal(E, r, F, scale=F**-0.5),
        "down_b": draw.normal(E, X, r, scale=r**-0.5),
    }
    indices = order[:, : case.top_k].contiguous()
    if case.elsewhere:
        indices[: case.elsewhere] = indices[case.elsewhere :, ::2] = E
    return Inputs(tensors, {"indices": indices.to(device), "scale": case.scale})
