"""Stochastic rounding to bfloat16 that depends on nothing but what is rounded, and where and when.

A weight in bfloat16 has 8 bits of precision: an update below half of its last bit is lost when it
is rounded to the nearest, in every step anew. Rounded up with a probability equal to the part that
would be lost, it is kept on average (Gupta et al. 2015, arXiv 1502.02551).

The random bits are a hash of a key, which stands for the tensor and the step, and of the element's
number in the whole tensor. So a resumed run rounds as the uninterrupted one did, and however the
tensor is sharded.
"""

import functools
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 2**22  # elements hashed at once: a few temporaries of 16 MiB
CHUNK_OF_A_KERNEL = 2**30  # which has no temporaries


def rounding_key(name: str, step: int, seed: int = 0) -> int:
    """32 bits that stand for a tensor's name, a step and a run's seed."""
    return zlib.crc32(f"{seed}/{step}/{name}".encode())


def round_stochastically_(target: Tensor, value: Tensor, key: int, start: int = 0) -> None:
    """Write `value` into `target`, each element rounded up or down at random.

    Args:
        target: bfloat16, contiguous, of any shape.
        value: fp32 of the same number of elements; finite.
        key: of `rounding_key`.
        start: the number, in the whole tensor, of the first element.
    """
    assert target.dtype == torch.bfloat16 and target.is_contiguous()
    flat, values = target.view(-1), value.reshape(-1)
    run, size = (_compiled(), CHUNK_OF_A_KERNEL) if target.is_cuda else (rounded, CHUNK)
    for first in range(0, flat.numel(), size):
        # Filled in on the device: a copy from the host would wait for all that it has to do.
        numbers = what_rounds(key, start + first)
        told = torch.stack([value.new_full((), n, dtype=torch.int64) for n in numbers])
        flat[first : first + size] = run(values[first : first + size], told)


def what_rounds(key: int, first: int) -> list[int]:
    """What `rounded` is told: the first element's number in 32 bits, and the key, into which goes
    what is above them."""
    high, low = divmod(first, 2**32)
    return [low, _as_int32(key ^ (high * 0x9E3779B9 & 0xFFFFFFFF))]


def rounded(value: Tensor, told: Tensor) -> Tensor:
    """fp32 `[n]` -> bf16 `[n]`: 16 random bits are added below the bits that are kept.

    `told` int64 `[2]`, of `what_rounds`.
    """
    index = (torch.arange(len(value), dtype=torch.int64, device=value.device) + told[0]).to(
        torch.int32  # which wraps around
    )
    noise = _hash(index ^ told[1].to(torch.int32)) & 0xFFFF
    bits = (value.view(torch.int32) + noise) & -0x10000
    return bits.view(torch.float32).to(torch.bfloat16)  # exact: the lower half is 0


def _hash(x: Tensor) -> Tensor:
    """A permutation of 32 bits in which every bit of the result depends on all of `x`."""
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D
    x = (x ^ _shifted(x, 15)) * _as_int32(0x846CA68B)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x >> bits` with zeros from the left; an int32 would bring its sign along."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _as_int32(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """As one kernel: the hash is a dozen passes over memory otherwise."""
    return torch.compile(rounded, dynamic=True)
