"""What a layout checks where it is built: offsets, grids and masks that must fit each other."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def grid_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 2 else 1


def grid_size(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] if len(shape) == 2 else shape[0]


def all_equal(lengths: tuple[int, ...]) -> bool:
    """Whether all lengths are equal.

    A set would compare hashes, which a compiler takes for fixed numbers.
    """
    return all(length == lengths[0] for length in lengths[1:])


def no_documents_error(shape: tuple[int, ...]) -> ValueError:
    return ValueError(f"tokens of shape {tuple(shape)} hold no document: give at least one row")


def shortened(values: tuple[int, ...], most: int = 8) -> str:
    shown = ", ".join(map(str, values[:most]))
    return f"[{shown}, ... {len(values)} in all]" if len(values) > most else f"[{shown}]"


def check_tensor(name: str, x: Any) -> None:
    """Raises TypeError for what is no tensor, ValueError for one without values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: give a tensor")
    if x.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, and its values are needed: give them")


def agreed(name: str, alone: Any, of_queries: Any, of_keys: Any) -> Any:
    """The value of a setting that has names of its own for queries and keys; None: not given.

    Raises:
        ValueError: two of them that differ.
    """
    by_name = {name: alone, f"{name}_q": of_queries, f"{name}_kv": of_keys}
    given = [(key, value) for key, value in by_name.items() if value is not None]
    for key, value in given[1:]:
        first, its = given[0]
        if _plain(value) != _plain(its):
            raise ValueError(
                f"{first} {_plain(its)} and {key} {_plain(value)} contradict each other: every "
                f"token is a query and a key, so give {name} alone, or the same twice"
            )
    return given[0][1] if given else None


def _plain(value: Any) -> Any:
    return value.flatten().tolist() if isinstance(value, Tensor) and value.dim() else _whole(value)


def _whole(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def read_offsets(name: str, offsets: Tensor) -> list[int]:
    check_tensor(name, offsets)
    if offsets.dim() == 2 and offsets.shape[0] == 1:
        offsets = offsets[0]
    if offsets.dim() != 1 or offsets.numel() < 2 or offsets.is_floating_point():
        raise ValueError(
            f"{name} must be integers of shape (documents + 1,), got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)}"
        )
    values = offsets.tolist()
    if values[0] != 0 or any(b < a for a, b in pairwise(values)):
        raise ValueError(
            f"{name} must start at 0 and never decrease, got {shortened(tuple(values))}"
        )
    return values


def check_slots(offsets: list[int], slots: list[int]) -> None:
    if len(offsets) != len(slots):
        raise ValueError(
            f"cu_seqlens has {len(offsets) - 1} documents, cu_seqlens_padded {len(slots) - 1}"
        )
    for document, ((a, b), (start, end)) in enumerate(
        zip(pairwise(offsets), pairwise(slots), strict=True)
    ):
        if b - a > end - start:
            raise ValueError(
                f"document {document} has {b - a} tokens (cu_seqlens) but a place of "
                f"{end - start} (cu_seqlens_padded)"
            )


def lengths_among(
    offsets: list[int], rows: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Lengths of documents whose offsets count real tokens alone, `rows` where each row starts."""
    if offsets[-1] != rows[-1]:
        raise ValueError(
            f"cu_seqlens ends at {offsets[-1]}, but attention_mask has {rows[-1]} real tokens of "
            f"{grid_size(shape)}: they contradict each other; give one of them"
        )
    for row, border in enumerate(rows[1:-1]):
        if border not in offsets:
            raise ValueError(
                f"a document crosses from row {row} into row {row + 1} of the {shape} batch: "
                f"cu_seqlens must hold the row border {border}, counted in real tokens"
            )
    return tuple(b - a for a, b in pairwise(offsets))


def check_row_borders(shape: tuple[int, ...], slots: list[int]) -> None:
    if len(shape) == 1:
        return
    borders = set(slots)
    for row in range(1, shape[0]):
        if row * shape[1] not in borders:
            raise ValueError(
                f"a document crosses from row {row - 1} into row {row} of the {shape} batch: "
                f"cu_seqlens must hold the row border {row * shape[1]}"
            )


def check_qkv_format(qkv_format: str | None, shape: tuple[int, ...]) -> None:
    if qkv_format not in (None, "thd", "bshd"):
        raise ValueError(f"qkv_format must be 'thd' or 'bshd', got {qkv_format!r}")
    if qkv_format == "thd" and len(shape) == 2 and shape[0] != 1:
        raise ValueError(
            f"qkv_format='thd' means packed tokens, got a batch of shape {tuple(shape)}: give "
            "(tokens, hidden_size), or leave qkv_format out"
        )
    if qkv_format == "bshd" and len(shape) == 1:
        raise ValueError(
            f"qkv_format='bshd' means (batch, seq_len, hidden_size), got {shape[0]} tokens without "
            "a batch dimension: leave qkv_format out"
        )


def check_max_seqlen(max_seqlen: int | Tensor | None, lengths: tuple[int, ...]) -> None:
    if max_seqlen is not None and int(max_seqlen) < max(lengths, default=0):
        raise ValueError(
            f"max_seqlen is {int(max_seqlen)} but the longest document has {max(lengths)} tokens"
        )


def fit_grid(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    check_tensor(name, x)
    if tuple(x.shape) == tuple(shape):
        return x
    if x.numel() == grid_size(shape) and tuple(x.shape) == (1, *shape):
        return x[0]
    if tuple(shape) == (1, *x.shape):
        return x[None]
    raise ValueError(
        f"{name} has shape {tuple(x.shape)}, the tokens {tuple(shape)}: they must match"
    )


def fit_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    check_tensor("attention_mask", mask)
    if mask.dim() > 2:
        raise ValueError(
            f"a padding mask has shape (batch, seq_len), got {tuple(mask.shape)}: only an "
            "attention layer takes a 4-D mask"
        )
    return fit_grid("attention_mask", mask, shape)


def check_mask_agrees(name: str, layout: Any, mask: Tensor) -> None:
    """Raises ValueError unless a mask marks just the tokens that a layout, given as `name`, has."""
    real = torch.zeros(grid_size(layout.shape), dtype=torch.bool, device="cpu")
    real[slice(None) if layout.token_index is None else layout.token_index.cpu()] = True
    marked = (mask.detach().cpu() != 0).flatten()
    if not torch.equal(real, marked):
        raise ValueError(
            f"{name} and attention_mask contradict each other: {int(real.sum())} real tokens "
            f"and {int(marked.sum())} marked ones; give one of them"
        )
