"""Orders that are functions of names and numbers: the same on every machine and in every version.

Keys are the numbers that splitmix64 (Steele, Lea and Flood, OOPSLA 2014) gives from a start that is
a hash of the names; an order sorts by them.
"""

import hashlib

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def permutation(count: int, *names: str | int) -> Tensor:
    """The numbers below `count` in an order of its own for these names, int64 `[count]`."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return splitmix64(int.from_bytes(digest, "little"), count).argsort(stable=True)


def splitmix64(start: int, count: int) -> Tensor:
    """The first numbers of the generator that starts at `start`, as int64 `[count]` on the CPU."""
    start = (start + 2**63) % 2**64 - 2**63
    key = torch.arange(1, count + 1, device="cpu") * _STEP + start  # int64 wraps around, as it must
    key = (key ^ _shifted(key, 30)) * _FIRST
    key = (key ^ _shifted(key, 27)) * _SECOND
    return key ^ _shifted(key, 31)


def _shifted(key: Tensor, bits: int) -> Tensor:
    """Shifted to the right as if it had no sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)
