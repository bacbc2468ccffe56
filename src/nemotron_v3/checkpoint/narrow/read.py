"""The values of narrow weights, streamed from a checkpoint, and their scales looked at first."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from nemotron_v3.checkpoint.narrow.layouts import StoredNarrow
from nemotron_v3.layers.dequantise import dequantise, factors

ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # elements of a weight dequantised at once
_NAN = 0x7F  # the code of NaN in float8_e4m3fn, without the sign


class Stored(Protocol):
    """The tensors of a checkpoint by the names that they are stored under."""

    def tensor(self, name: str) -> Tensor: ...

    def drop(self, name: str) -> None: ...


def parts_of(stored: Stored, weight: StoredNarrow) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales `[n, k]` and the global scale (fp32, no dimensions) as they are in the file."""
    scale = stored.tensor(weight.scale).reshape(weight.tiles)
    if weight.global_scale is None:
        return stored.tensor(weight.codes), scale, None
    number = stored.tensor(weight.global_scale).reshape(()).to(torch.float32)
    return stored.tensor(weight.codes), scale, number


def row_blocks(
    stored: Stored,
    weight: StoredNarrow,
    dtype: torch.dtype,
    device: torch.device | None = None,
    most: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a narrow weight in order, each time with their values `[rows, K]`.

    Args:
        dtype: of the values, rounded to once.
        device: where they are computed; None is the CPU.
        most: elements at once, if a row has no more; None is what suits the device.
    """
    device = device or torch.device("cpu")
    most = most or ELEMENTS.get(device.type, ELEMENTS["cpu"])
    codes, scale, number = parts_of(stored, weight)
    (N, K), (n, _) = weight.shape, weight.tiles
    tall = N // n if n > 1 else 1
    step = max(1, most // K // tall) * tall
    scale, number = scale.to(device), None if number is None else number.to(device)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        some = scale[rows.start // tall : -(-rows.stop // tall)] if n > 1 else scale
        here = codes[rows].to(device)
        yield rows, dequantise(here, some, number, divides=weight.divides, dtype=dtype)
        stored.drop(weight.codes)
    stored.drop(weight.scale)


def scale_problems(stored: Stored, weights: Iterable[StoredNarrow]) -> list[str]:
    """Problems with the scales of quantised weights, one line for each; reads no codes
    unless a scale is 0, which stands for nothing but zeros."""
    problems = []
    for weight in weights:
        codes, scale, number = parts_of(stored, weight)
        if not _all_plain(scale, number, weight.divides):
            problem = _problem(codes, scale, number, weight)
            problems += [] if problem is None else [problem]
        stored.drop(weight.scale)
    return problems


def _all_plain(scale: Tensor, number: Tensor | None, divides: bool) -> bool:
    """Whether all scales, times the global one, are above 0 and finite, as nearly all are."""
    if scale.dtype == torch.float8_e4m3fn:
        low, high = scale.view(torch.uint8).aminmax()
        if low < 1 or high >= _NAN:
            return False
        low, high = low.view(scale.dtype), high.view(scale.dtype)
    else:
        low, high = scale.aminmax()
    ends = factors(torch.stack((low, high)), number, divides)
    return bool(((ends > 0) & ends.isfinite()).all())


def _problem(
    codes: Tensor, scale: Tensor, number: Tensor | None, weight: StoredNarrow
) -> str | None:
    wide = scale.to(torch.float32)
    for name, values in ((weight.global_scale, number), (weight.scale, wide)):
        if values is not None and (bad := values[~(values.isfinite() & (values >= 0))]).numel():
            return f"{name} holds {bad[0].item()} ({bad.numel():,} of {values.numel():,} scales)"
    factor = factors(scale, number, weight.divides)
    if number is not None and not factor.isfinite().all():
        return f"{weight.global_scale} is {number.item()}: with {weight.scale} out of fp32's range"
    (N, _), (n, k) = weight.shape, weight.tiles
    empty = (codes.view(torch.uint8) & (0x77 if weight.layout == "nvfp4" else 0x7F)) == 0
    nothing = empty.unflatten(-1, (k, -1)).all(-1).unflatten(0, (n, N // n)).all(1)  # [n, k]
    if not (lost := (factor == 0) & ~nothing).any():
        return None
    at_0 = number is not None and (number == 0 or weight.divides)
    return (
        f"{weight.global_scale if at_0 else weight.scale} is 0 for {int(lost.sum()):,} of "
        f"{lost.numel():,} scales beside codes that are not 0"
    )
