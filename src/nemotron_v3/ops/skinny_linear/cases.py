"""Shapes that the tests and benchmarks of skinny_linear share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    """`norm` is the size of its groups, 0 for one of all inputs, None for none."""

    name: str
    rows: int
    inputs: int
    outputs: tuple[int, ...]
    norm: int | None = None
    bias: bool = False
    residual: bool = False
    wide: bool = False  # x in fp32, as a mixer hands it on
    wide_stream: bool = False  # residual and result in fp32
    strided: bool = False
    ranks: tuple[int, ...] = ()  # of updates, 0 for none


CASES = (
    Case("one-row", 1, 256, (96,)),
    Case("one-row-normed", 1, 200, (33, 70), norm=0, bias=True),
    Case("one-row-by-group", 1, 256, (70,), norm=64, residual=True, wide=True),
    Case("one-row-odd-groups", 1, 144, (40,), norm=48, residual=True, wide=True),
    Case("two-rows", 2, 320, (64, 32, 16), norm=0),
    Case("seventeen-rows", 17, 192, (130,), residual=True, strided=True),
    Case("by-group", 17, 256, (70,), norm=64, residual=True, wide=True, wide_stream=True),
    Case("forty-rows", 40, 97, (33, 20), norm=0, bias=True, strided=True),
    Case("wide-stream", 33, 64, (48,), residual=True, wide_stream=True),
    Case("many-rows", 130, 64, (24,), norm=0),
    Case("one-row-updated", 1, 200, (33, 70, 20), norm=0, bias=True, ranks=(4, 0, 7)),
    Case("one-row-updated-groups", 1, 256, (40,), norm=64, residual=True, wide=True, ranks=(16,)),
    Case("one-row-updated-odd", 1, 192, (40,), norm=64, residual=True, wide=True, ranks=(3,)),
    Case("rows-updated", 17, 97, (33, 70), norm=0, residual=True, ranks=(0, 16)),
    Case("rows-updated-groups", 5, 128, (40,), norm=32, wide=True, wide_stream=True, ranks=(20,)),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    """`weights` and `biases` by number: `weight_0`, `bias_0`, ...; None is no bias, norm, sum."""
    draw = Draw(generator, dtype, device, case.strided)
    R, n, m = case.rows, case.inputs, sum(case.outputs)
    x = draw.activation(R, n)
    tensors: dict[str, Tensor | None] = {"x": x.to(draw.wide) if case.wide else x}
    for place, size in enumerate(case.outputs):
        tensors[f"weight_{place}"] = draw.normal(size, n, scale=n**-0.5)
        tensors[f"bias_{place}"] = draw.normal(size) if case.bias else None
    for place, (size, rank) in enumerate(zip(case.outputs, case.ranks, strict=False)):
        tensors[f"a_{place}"] = draw.normal(rank, n, scale=n**-0.5) if rank else None
        tensors[f"b_{place}"] = draw.normal(size, rank, scale=rank**-0.5) if rank else None
    tensors["gain"] = None if case.norm is None else 1 + draw.normal(n, scale=0.2)
    stream = draw.wide if case.wide_stream else dtype
    tensors["residual"] = draw.normal(R, m).to(stream) if case.residual else None
    return Inputs(tensors, {"group": case.norm or 0, "wide_stream": case.wide_stream})
