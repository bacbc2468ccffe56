"""Shapes that the tests and benchmarks of experts share."""

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
    used: int | None = None
    strided: bool = False
    elsewhere: int = 0


CASES = (
    Case("one-token", 1, 64, 48, 8, 2),
    Case("one-expert", 3, 32, 80, 4, 1),
    Case("all-experts", 17, 48, 40, 6, 6),
    Case("idle-experts", 65, 40, 72, 16, 3, used=5),
    Case("crowded-expert", 129, 32, 48, 8, 2, used=2),
    Case("odd", 127, 33, 67, 7, 3, strided=True),
    Case("elsewhere", 65, 40, 72, 6, 3, elsewhere=9),
    Case("all-elsewhere", 5, 32, 48, 4, 2, elsewhere=5),
    Case("no-tokens", 0, 32, 48, 8, 2),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    tokens, experts, used = case.tokens, case.experts, case.used or case.experts
    order = torch.rand(tokens, used, generator=generator).argsort(dim=1)
    tensors = {
        "x": draw.activation(tokens, case.width),
        "weights": draw.uniform(tokens, case.top_k, low=0.05, high=1.0, wide=True),
        "up_proj": draw.normal(experts, case.expert_width, case.width, scale=case.width**-0.5),
        "down_proj": draw.normal(
            experts, case.width, case.expert_width, scale=case.expert_width**-0.5
        ),
    }
    indices = order[:, : case.top_k].contiguous()
    if case.elsewhere:
        indices[: case.elsewhere] = indices[case.elsewhere :, ::2] = experts
    return Inputs(tensors, {"indices": indices.to(device)})
