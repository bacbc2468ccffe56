"""Weights in 8 and 4 bits against their definition, computed in fp64 with each rounding named."""

import itertools

import pytest
import torch
from torch import Tensor

from nemotron_v3.layers.dequantise import dequantise, unpack_fp4

FP8 = torch.float8_e4m3fn
BYTES = torch.arange(256, dtype=torch.uint8)


def by_definition(
    values: Tensor, scale: Tensor, global_scale: Tensor | None, divides: bool, dtype: torch.dtype
) -> Tensor:
    """`values` fp64 [N, K]; every product in fp64, where two fp32 numbers lose nothing, then
    rounded to fp32, and at the end once to `dtype`."""
    factor = scale.double()
    if global_scale is not None:
        wide = global_scale.double().reshape(*global_scale.shape, 1, 1)
        factor = (factor / wide if divides else factor * wide).float().double()
    N, K = values.shape[-2:]
    n, k = factor.shape[-2:]
    rows = torch.arange(N) // (N // n)
    columns = torch.arange(K) // (K // k)
    return (values * factor[..., rows, :][..., columns]).float().to(dtype)


# What the eight codes of e2m1 without a sign stand for, by the format's definition.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp4_values(codes: Tensor) -> Tensor:
    signed = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], dtype=torch.float64)
    pairs = torch.stack((codes.long() & 15, codes.long() >> 4), dim=-1)
    return signed[pairs].flatten(-2)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )  # fmt: skip


def every_finite_fp8(*shape: int) -> Tensor:
    finite = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    count = torch.Size(shape).numel()
    return finite.repeat(-(-count // len(finite)))[:count].view(FP8).view(shape)


def test_every_pair_of_fp4_codes_has_its_values_signed_zeros_included():
    assert same_bits(unpack_fp4(BYTES[None]).double(), fp4_values(BYTES[None]))


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
GLOBALS = (1e-30, 2.0**-140, 3.1e-5, 0.37, 1.0, 8.9e3, 2e35)


@pytest.mark.parametrize(("dtype", "divides"), list(itertools.product(DTYPES, (False, True))))
def test_nvfp4_is_its_equation_to_the_bit(dtype, divides):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (48, 256), dtype=torch.uint8, generator=generator)
    scale = every_finite_fp8(48, 32).float().abs().to(FP8)
    for number in GLOBALS:
        global_scale = torch.tensor(number)
        told = dequantise(codes, scale, global_scale, divides=divides, dtype=dtype)
        assert same_bits(
            told, by_definition(fp4_values(codes), scale, global_scale, divides, dtype)
        )


SHAPES = {"tensor": (1, 1), "row": (256, 1), "block": (2, 3), "tall": (2, 1), "wide": (1, 3)}


@pytest.mark.parametrize("scales", SHAPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_its_equation_to_the_bit(scales, scale_dtype):
    codes = every_finite_fp8(256, 384)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(SHAPES[scales], generator=generator).add(1e-3).to(scale_dtype)
    for dtype in DTYPES:
        told = dequantise(codes, scale, dtype=dtype)
        assert same_bits(told, by_definition(codes.double(), scale, None, False, dtype))


def test_each_expert_of_a_stack_has_its_own_global_scale():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 32, 24), dtype=torch.uint8, generator=generator)
    scale = torch.rand(3, 32, 3, generator=generator).add(0.1).to(FP8)
    global_scale = torch.tensor([1e-4, 3e-2, 7.0])
    stack = dequantise(codes, scale, global_scale, dtype=torch.bfloat16)
    experts = zip(codes, scale, global_scale, strict=True)
    single = [dequantise(*one, dtype=torch.bfloat16) for one in experts]
    assert same_bits(stack, torch.stack(single))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("divides", [False, True])
def test_a_gpu_gives_the_bits_of_a_cpu(divides):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (48, 256), dtype=torch.uint8, generator=generator)
    scale = every_finite_fp8(48, 32).float().abs().to(FP8)
    fp8, tile = every_finite_fp8(256, 384), torch.rand(2, 3, generator=generator)
    for dtype, number in itertools.product(DTYPES, GLOBALS):
        nvfp4 = (codes, scale, torch.tensor(number))
        here = dequantise(*nvfp4, divides=divides, dtype=dtype)
        there = dequantise(*(t.cuda() for t in nvfp4), divides=divides, dtype=dtype)
        assert same_bits(there.cpu(), here)
        there = dequantise(fp8.cuda(), tile.cuda(), dtype=dtype)
        assert same_bits(there.cpu(), dequantise(fp8, tile, dtype=dtype))
