"""What an adapter changed in a checkpoint that was written, computed once more in another way.

A conversion is read back and compared bit for bit with what was to be written. That shows the disk,
not the sum: here each merged tensor is compared with `W + scale * B A` in fp64.

Letters: O rows of a weight (its outputs), I columns (its inputs), r rank of an adapter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.checkpoint.convert_pieces import LowRank, Part, Source, StoredPiece
from nemotron_v3.checkpoint.errors import CheckpointError

# Elements of a weight that are compared at a time: ten arrays of them in fp64 are 5 MB.
BLOCK = 1 << 16


@dataclass(frozen=True)
class MergedTensor:
    """A tensor that an adapter changed.

    Attributes:
        name: in the written checkpoint.
        change: the length (Frobenius norm) of the change over that of the base's tensor; None where
            the adapter put another tensor in its place.
        error: the largest distance from the exact sum over the distance that rounding allows, so
            that 1 is the most that can be right; 0 where a tensor was put in its place.
    """

    name: str
    change: float | None
    error: float


def merged_tensors(pieces: Sequence[StoredPiece], written: Source) -> list[MergedTensor]:
    """Each merged tensor of `pieces`, as the checkpoint `written` holds it.

    Raises:
        CheckpointError: a tensor is further from `W + scale * B A` than its dtype and a sum in fp32
            explain, all listed.
    """
    found = [_measure(piece, written) for piece in pieces if piece.merged]
    wrong = [f"{m.name} is {m.error:.3g} roundings off" for m in found if not m.error <= 1]
    if wrong:
        raise CheckpointError("merged tensors are not the sum of base and adapter", wrong)
    return found


def _measure(piece: StoredPiece, written: Source) -> MergedTensor:
    flat = written.tensor(piece.name).reshape(-1)
    position, base_square, change_square, error = 0, 0.0, 0.0, 0.0
    for part in piece.parts:
        tensor = part.source.tensor(part.name)
        count = (tensor if part.expert is None else tensor[part.expert]).numel()
        if part.update is not None:
            stored = flat[position : position + count]
            for base, exact, bound in _exact_rows(part, part.update, piece.dtype):
                got = stored[: base.numel()].reshape(base.shape).double()
                stored = stored[base.numel() :]
                error = max(error, float(((got - exact).abs() / bound).max()))
                base_square += float(base.square().sum())
                change_square += float((exact - base).square().sum())
            written.drop(piece.name)
        position += count
    if all(part.update is None for part in piece.parts):
        return MergedTensor(piece.name, None, 0.0)
    change = (change_square / base_square) ** 0.5 if base_square else float("inf")
    return MergedTensor(piece.name, change, error)


def _exact_rows(
    part: Part, update: LowRank, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of the base, of the changed weight in fp64, and how far rounding may take a value."""
    tensor = part.source.tensor(part.name)
    weight = tensor if part.expert is None else tensor[part.expert]
    a, rank = update.A.double(), update.A.shape[0]
    rows = max(1, BLOCK // weight.shape[1])
    computed = torch.promote_types(torch.promote_types(weight.dtype, update.A.dtype), torch.float32)
    unit = torch.finfo(computed).eps / 2
    for start in range(0, weight.shape[0], rows):
        base = weight[start : start + rows].double()
        b = update.B[start : start + rows].double()
        exact = base + update.scale * (b @ a)
        # Higham, Accuracy and Stability, 3.1: a sum of r products and W, each operation rounded.
        terms = base.abs() + abs(update.scale) * (b.abs() @ a.abs())
        slack = (rank + 4) * unit * terms
        if update.magnitude is not None:
            length = exact.norm(dim=1, keepdim=True)
            factor = update.magnitude[start : start + rows, None].double() / length
            exact = exact * factor
            # The length is a sum over I squares; then a product and a quotient are rounded.
            width = weight.shape[1]
            slack = slack * factor.abs() + exact.abs() * (
                (width + 4) * unit + slack.norm(dim=1, keepdim=True) / length
            )
        last = torch.finfo(dtype)
        yield base, exact, slack + last.eps / 2 * (exact.abs() + slack) + last.tiny * last.eps
        part.source.drop(part.name)
