"""The values of weights that are kept in 8 or 4 bits: codes times the scales beside them.

Letters: N rows of a weight (its outputs), K columns (its inputs), E experts.

Three steps and one rounding, as the makers of the formats define them: a code's value is exact in
fp32; the scales are multiplied in fp32; value times scale is rounded to fp32 and then once to the
dtype asked for. Scales in 16 bits would be off by up to 0.4 %, all weights of a tensor alike.
"""

import torch
from torch import Tensor


def unpack_fp4(codes: Tensor) -> Tensor:
    """Pairs of e2m1 codes in uint8 `[..., K/2]`, column 2i in the low half -> fp32 `[..., K]`.

    A code has a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    """
    # e4m3 has one more mantissa bit below and two more exponent bits above: the same bits there
    # stand for 1/64 of the value, subnormal numbers too.
    low = (codes & 0x07) << 2 | (codes & 0x08) << 4
    high = (codes & 0x70) >> 2 | (codes & 0x80)
    bits = torch.stack((low, high), dim=-1).flatten(-2)
    return bits.view(torch.float8_e4m3fn).to(torch.float32).mul_(64.0)


def factors(scale: Tensor, global_scale: Tensor | None, divides: bool) -> Tensor:
    """What codes are multiplied by, in fp32, of the shape of `scale`.

    Args:
        scale: `[N or fewer, K or fewer]`, or `[E, ...]`; fp8, 16 bits or fp32.
        global_scale: fp32, one number, or `[E]`: one for each expert; None where there is none.
        divides: whether the global scale is the reciprocal of a factor.
    """
    factor = scale.to(torch.float32)
    if global_scale is None:
        return factor
    wide = global_scale.reshape(*global_scale.shape, *[1] * (scale.dim() - global_scale.dim()))
    return factor / wide if divides else factor * wide


def dequantise(
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor | None = None,
    *,
    divides: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight `[N, K]`, or a stack `[E, N, K]` of them, that codes and scales stand for.

    Args:
        codes: float8_e4m3fn `[N, K]`, or uint8 `[N, K/2]`: two e2m1 codes each.
        scale: `[n, k]` where n divides N and k divides K: each scale holds for a tile of
            `N/n x K/k`. `[1, 1]` is one for the whole weight, `[N, K/16]` NVFP4's.
        global_scale, divides: see `factors`.
        dtype: what the product is rounded to.
    """
    values = unpack_fp4(codes) if codes.dtype == torch.uint8 else codes.to(torch.float32)
    factor = factors(scale, global_scale, divides)  # [n, k]
    rows, columns = values.shape[-2] // factor.shape[-2], values.shape[-1] // factor.shape[-1]
    if rows > 1 and factor.shape[-2] > 1:
        factor = factor.repeat_interleave(rows, dim=-2)  # [N, k]
    tiles = values.unflatten(-1, (-1, columns))  # [N, k, K/k]
    return tiles.mul_(factor.unsqueeze(-1)).flatten(-2).to(dtype)
