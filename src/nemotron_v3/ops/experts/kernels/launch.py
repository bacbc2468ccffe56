"""The order of the kernels, and where each reads and writes.

Letters: T tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nemotron_v3.ops.common.host import interpreted, power_of_two
from nemotron_v3.ops.experts.kernels import combine, gradients, products, sort
from nemotron_v3.ops.experts.kernels.tables import Plan, Tiles

BLOCK = 256  # rows that a program of the sort takes
SLICES = 2  # parts of the columns in which rows are joined again: it bounds what they take
# Below it a weight is nothing: its row is stored unweighted and left out of the sums.
FLOOR = 1e-30


@dataclass(frozen=True)
class Sorted:
    """Where rows lie. `table` holds, one after the other, the int32 tensors that follow it.

    Each begins at a whole 16 bytes, for which kernels are compiled.

    Attributes:
        place: `[R]`, where each row (t, k) lies among the sorted ones; -1: its expert is not here.
        source: `[R]`, the token of each sorted row, -1 - token where its weight is nothing.
        offsets, tile_first: `[E + 1]`, first row and first tile of each expert.
        tile_expert: the expert of each tile.
        weights: `[R]` fp32, of the sorted rows.
    """

    table: Tensor
    place: Tensor
    source: Tensor
    offsets: Tensor
    tile_first: Tensor
    tile_expert: Tensor
    weights: Tensor

    @classmethod
    def of(cls, table: Tensor, weights: Tensor, E: int) -> "Sorted":
        R = weights.shape[0]
        sizes, places = [R, R, E + 1, E + 1], [_whole(n) for n in (R, R, E + 1, E + 1)]
        *parts, tile_expert = table.split([*places, table.shape[0] - sum(places)])
        parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        return cls(table, *parts, tile_expert, weights)

    @property
    def most_tiles(self) -> int:
        return self.tile_expert.shape[0]


class LowRank(NamedTuple):
    """What a product of rows is given besides: `rows` `[R, r]` and their `[E, N, r]` matrices."""

    rows: Tensor
    matrix: Tensor


def _whole(n: int) -> int:
    """Places for n int32 numbers that end at a whole 16 bytes."""
    return (n + 3) // 4 * 4


def table_length(R: int, E: int, tile: int) -> int:
    return 2 * (_whole(R) + _whole(E + 1)) + (R + tile - 1) // tile + E


def sorted_rows(like: Tensor, R: int, E: int, tile: int) -> Sorted:
    """A place for where R rows of E experts lie, in tiles of `tile` rows."""
    table = torch.empty(table_length(R, E, tile), dtype=torch.int32, device=like.device)
    return Sorted.of(table, torch.empty(R, dtype=torch.float32, device=like.device), E)


def sort_rows(indices: Tensor, weights: Tensor, tile: int, found: Sorted) -> None:
    """Writes where the rows of `indices` and `weights` `[T, K]`, contiguous, lie."""
    (R, K), E = (indices.numel(), indices.shape[1]), found.offsets.shape[0] - 1

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=indices.device)

    blocks = triton.cdiv(R, BLOCK)
    counts, totals = empty(blocks, E), empty(E)
    block_e = power_of_two(E + 1)
    sort.count_kernel[(blocks,)](indices, counts, R, E, BLOCK, block_e, num_warps=4)
    sort.scan_kernel[(triton.cdiv(E, 16),)](counts, totals, blocks, E, 64, 16, num_warps=4)
    sort.schedule_kernel[(1,)](
        totals, found.offsets, found.tile_first, found.tile_expert, E, tile, block_e, num_warps=4
    )
    sort.place_kernel[(blocks,)](
        *(indices, weights, counts, found.offsets, found.place, found.source, found.weights),
        *(R, E, K, FLOOR, BLOCK, 32),
        num_warps=4,
    )


def _descriptor(matrix: Tensor, block: list[int]):
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = matrix.view(-1, matrix.shape[-1])
    return TensorDescriptor.from_tensor(flat, block)


def _aligned(matrix: Tensor) -> bool:
    """Whether a descriptor can be made: rows of whole 16 bytes, and any at all."""
    whole = matrix.shape[-1] * matrix.element_size() % 16 == 0
    return whole and matrix.numel() > 0 and matrix.data_ptr() % 16 == 0


def _columns_descriptor(matrix: Tensor, tiles: Tiles, width: int, transposed: bool):
    return _descriptor(matrix, [tiles.k, width] if transposed else [width, tiles.k])


def _last_width(N: int, tiles: Tiles) -> int:
    """A power of two that holds the last columns where a quarter or half a tile does; else 0."""
    left = N % tiles.n
    if left == 0 or left > tiles.n // 2 or tiles.n < 64:
        return 0
    return tiles.n // 4 if left <= tiles.n // 4 else tiles.n // 2


def as_it_lies(stack: Tensor) -> Tensor:
    """`[E, M, N]` in whose matrices either rows or columns follow each other: itself where it
    can, since stacks are the largest tensors that there are."""
    return stack if stack.is_contiguous() or stack.mT.is_contiguous() else stack.contiguous()


def rows_product(
    tiles: Tiles,
    where: Sorted,
    a: Tensor,
    matrix: Tensor,
    out: Tensor,
    *,
    transposed: bool,
    gather: bool,
    column: int = 0,
    epilogue: int = products.PLAIN.value,
    hidden: Tensor | None = None,
    partial: Tensor | None = None,
    low: LowRank | None = None,
    scale: float = 1.0,
) -> None:
    """`out[r] = a[r] matrix[e]^T` (`matrix[e]` where `transposed`), columns from `column` on.

    `matrix` is `[E, N, K]`, or `[E, K, N]` where `transposed`, as `as_it_lies` gives it. Added is
    `low.rows[r]` times `low.matrix[e]`, which lies alike, both without gaps. `scale` is that of the
    epilogue SCALED.
    """
    if not matrix.is_contiguous():
        matrix, transposed = matrix.mT, not transposed
    rows, beside = (None, None) if low is None else (low.rows, low.matrix)
    E, R, N, K = matrix.shape[0], where.weights.shape[0], out.shape[1], a.shape[1]
    even = K % tiles.k == 0
    descriptor = tiles.descriptor and (not transposed or even) and _aligned(matrix)
    last = _last_width(N, tiles)
    mode = products.Mode(
        EPILOGUE=epilogue,
        FLOOR=FLOOR,
        GATHER=gather,
        TRANSPOSED=transposed,
        DESCRIPTOR=descriptor,
        LAST_N=last,
        EVEN_K=even,
        LOW=0 if rows is None else min(32, max(16, power_of_two(rows.shape[1]))),
    )
    sizes = products.Sizes(
        *(R, N, K, column, a.stride(0), matrix.stride(0), matrix.stride(1), matrix.shape[1]),
        out.stride(0),
        0 if hidden is None else hidden.stride(0),
        *((0, 0, 0) if low is None else (rows.shape[1], beside.stride(0), beside.stride(1))),
        scale,
    )
    products.rows_kernel[(where.most_tiles * triton.cdiv(N, tiles.n),)](
        *(a, matrix),
        _columns_descriptor(matrix, tiles, tiles.n, transposed) if descriptor else None,
        _columns_descriptor(matrix, tiles, last, transposed) if descriptor and last else None,
        *(out, hidden, partial, rows, beside, where.source, where.weights),
        *(where.offsets, where.tile_first, where.tile_expert, E, *sizes, tiles, mode),
        num_warps=tiles.warps,
    )


def weights_product(
    tiles: Tiles,
    where: Sorted,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    gather_a: bool = False,
    gather_b: bool = False,
    live: bool = False,
) -> None:
    """`out[e] = a_e^T b_e`; a or b may be read by token, what is not is read by row.

    `out` lies as `as_it_lies` has it. Where `live`, rows whose weight is nothing are left out.
    """
    if not out.is_contiguous():
        a, b, gather_a, gather_b, out = b, a, gather_b, gather_a, out.mT
    E, M, N = out.shape
    grid = (E * triton.cdiv(M, tiles.m) * triton.cdiv(N, tiles.n),)
    last = _last_width(N, tiles)
    dense = b if gather_a else a
    descriptor = tiles.descriptor and _aligned(dense)
    width = tiles.n if gather_a else tiles.m
    last_width = last if gather_a else tiles.m
    mode = gradients.Mode(gather_a, gather_b, live, descriptor, last)
    gradients.weights_kernel[grid](
        *(a, b),
        _descriptor(dense, [tiles.k, width]) if descriptor else None,
        _descriptor(dense, [tiles.k, last_width]) if descriptor and last else None,
        *(out, where.source, where.offsets, M, N, a.stride(0), b.stride(0), tiles, mode),
        num_warps=tiles.warps,
    )


def combine_rows(where: Sorted, rows: Tensor, weights: Tensor, out: Tensor, *, live: bool) -> None:
    """`out[t] = sum_k rows[place[t, k]]`; where `live`, without rows whose weight is nothing."""
    T, K = weights.shape
    X = out.shape[1]
    block_t, block_x = (16, power_of_two(X)) if interpreted() else (4, 512)
    combine.combine_kernel[(triton.cdiv(T, block_t) * triton.cdiv(X, block_x),)](
        *(rows, where.place, weights, out, T, X, rows.stride(0), out.stride(0)),
        *(K, FLOOR, block_t, block_x, live),
        num_warps=4,
    )


def column_slices(X: int, tile: int) -> list[tuple[int, int]]:
    """Borders of SLICES parts of the columns, at whole tiles."""
    tiles = triton.cdiv(X, tile)
    ends = [min(X, tiles * i // SLICES * tile) for i in range(SLICES + 1)]
    return [(a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b]


def join_products(
    tiles: Tiles,
    where: Sorted,
    a: Tensor,
    matrix: Tensor,
    weights: Tensor,
    out: Tensor,
    *,
    transposed: bool,
    live: bool,
    low: LowRank | None = None,
) -> None:
    """The product of every row, summed over each token's rows, some columns at a time."""
    slices = column_slices(out.shape[1], tiles.n)
    widest = max((end - start for start, end in slices), default=0)
    space = torch.empty(a.shape[0] * widest, dtype=out.dtype, device=out.device)
    for start, end in slices:
        rows = space[: a.shape[0] * (end - start)].view(a.shape[0], end - start)
        options = {"transposed": transposed, "gather": False, "column": start}
        rows_product(tiles, where, a, matrix, rows, **options, low=low)
        combine_rows(where, rows, weights, out[:, start:end], live=live)


def thin_product(
    plan: Plan,
    where: Sorted,
    a: Tensor,
    matrix: Tensor,
    out: Tensor,
    scale: float,
    *,
    transposed: bool = False,
    gather: bool = False,
) -> None:
    """`out[r] = scale a[r] matrix[e]^T`, of a matrix of few rows (columns where `transposed`)."""
    options = {"transposed": transposed, "gather": gather, "scale": scale}
    tiles, epilogue = plan.thin(out.shape[1]), products.SCALED.value
    rows_product(tiles, where, a, matrix, out, **options, epilogue=epilogue)


def up_rows(
    plan: Plan, where: Sorted, x: Tensor, up: Tensor, hidden: Tensor, low: LowRank | None = None
) -> None:
    """Writes `weights[r] relu(u)^2` of the sorted rows, `hidden` `[R, F]`."""
    epilogue = products.UP.value
    options = {"transposed": False, "gather": True, "epilogue": epilogue}
    rows_product(plan.up, where, x, up, hidden, **options, low=low)


def down_backward_rows(
    plan: Plan,
    where: Sorted,
    dy: Tensor,
    hidden: Tensor,
    down: Tensor,
    dweights: Tensor,
    du: Tensor,
    low: LowRank | None = None,
) -> None:
    """Writes dweights, and `du` `[R, F]`, the gradient of the rows before relu²."""
    R, F = hidden.shape
    parts = triton.cdiv(F, plan.down_backward.n)
    partial = torch.empty(parts, R, dtype=torch.float32, device=dy.device)
    epilogue = products.DOWN_BACKWARD.value
    options = {"transposed": True, "gather": True, "epilogue": epilogue}
    kept = {"hidden": hidden, "partial": partial}
    rows_product(plan.down_backward, where, dy, down, du, **options, **kept, low=low)
    combine.gather_sums_kernel[(triton.cdiv(R, 256),)](
        partial, where.place, dweights, R, parts, 256, num_warps=4
    )
