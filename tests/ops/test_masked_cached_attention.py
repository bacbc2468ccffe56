"""Attention behind a cache where a 4-D mask decides, by the accuracy rule."""

import math

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.cached_attention.masked import reference
from nemotron_v3.ops.common.cases import Inputs
from tests.accuracy import check

# rows, tokens held, new tokens, query heads, key heads, head width
SHAPES = [(2, 5, 3, 4, 2, 16), (1, 0, 4, 3, 1, 8), (3, 7, 1, 4, 4, 8)]


def make_inputs(shape, kind, dtype, generator):
    rows, held, new, heads, key_heads, width = shape
    L = held + new
    tensors = {
        "q": torch.randn(rows * new, heads, width, generator=generator).to(dtype),
        "keys": torch.randn(rows, key_heads, L + 2, width, generator=generator).to(dtype),
        "values": torch.randn(rows, key_heads, L + 2, width, generator=generator).to(dtype),
    }
    mask = torch.rand(rows, heads, new, L, generator=generator) < 0.6
    mask[..., -1] = True
    mask[0, :, 0] = False  # a query that may attend nothing
    if kind == "additive":
        bias = torch.randn(mask.shape, generator=generator).to(dtype)
        mask = bias.masked_fill(~mask, -math.inf)[:1, :1]
    options = {"mask": mask, "layout": SequenceLayout.plain(rows, new)}
    return Inputs(tensors, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_exact_as_plain_pytorch(shape, kind, dtype):
    rows, held = shape[:2]

    def function(layout, **arguments):
        return ops.cached_attention(
            **arguments, layout=layout, starts=(held,) * rows, positions=torch.full((rows,), held)
        )

    check(function, reference, lambda g: make_inputs(shape, kind, dtype, g), dtype=dtype)


def test_the_reference_with_a_causal_mask_is_the_reference_without():
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs(SHAPES[0], "bool", torch.float64, generator)
    rows, held, new, *_ = SHAPES[0]
    causal = torch.ones(new, held + new, dtype=torch.bool).tril(held)
    more = {
        "layout": inputs.options["layout"], "starts": (held,) * rows,
        "positions": torch.full((rows,), held), "impl": "reference",
    }  # fmt: skip
    masked = ops.cached_attention(**inputs.tensors, mask=causal[None, None], **more)
    torch.testing.assert_close(masked, ops.cached_attention(**inputs.tensors, **more))
